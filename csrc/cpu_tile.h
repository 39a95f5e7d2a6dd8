// One tile of one tensor on the CPU: update, statistics, shrinkage, apply, for any layout and type.
#pragma once
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "cpu_step.h"

namespace cges {

constexpr int64_t kNarrow = 64;     // groups with shorter runs in each of their rows are summed by columns
constexpr int64_t kBlockRows = 16;  // rows whose z is still in cache when their statistics are taken
constexpr int64_t kBlockElements = 32768;  // the same of a piece, whose rows are wide
constexpr int64_t kMaxColumns = 2048;      // of a tile of more than one group

// How far ahead of use the rows of a tile are fetched, in bytes of each tensor, where they lie far apart.
// Rows a multiple of the L1's 4 KB ways apart fall into the same few of its sets: those rows are fetched into
// the L2, and earlier.
constexpr int64_t kPrefetchL1 = 3072, kPrefetchL2 = 6144, kL1Way = 4096;

// Whether rows lie a multiple of 4 KB apart.
inline bool rows_alias(const Layout& layout, int64_t element_size) {
  return layout.row_length() * element_size % kL1Way == 0;
}

// Rows [r0, r1) and columns [c0, c1) of the [R1, K2*R2] matrix at k1: whole groups, or a piece of large ones.
// Small matrices share a tile: it goes on with the same rows and columns at the k1 up to k1_end.
struct Tile {
  int32_t tensor;
  int64_t k1, k1_end, r0, r1, c0, c1;
  int64_t elements() const { return (k1_end - k1) * rows() * columns(); }
  int64_t rows() const { return r1 - r0; }
  int64_t columns() const { return c1 - c0; }
};

// Whether weights can hold z between two passes: they are wide enough, and nobody asks for their zeros again.
inline bool holds_z(const TensorStep& step) {
  return (step.dtype == c10::kFloat || step.dtype == c10::kDouble) && step.h->freeze != Freeze::element;
}

// What the pieces of a large group add up to.
struct PieceSums {
  GroupStats<double> stats;
  bool alive;

  void operator+=(const PieceSums& other) {
    stats.count += other.stats.count;
    stats.l1 += other.stats.l1;
    stats.l2_squared += other.stats.l2_squared;
    alive |= other.alive;
  }
};

// One thread's scratch, handed out anew for each tile. Pages that no tile needs are never touched.
class Scratch {
 public:
  explicit Scratch(size_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(kLine, bytes))), bytes_(bytes) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  void reset() { used_ = 0; }
  template <typename T>
  T* take(int64_t n) {
    T* array = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += (n * sizeof(T) + kLine - 1) / kLine * kLine;
    TORCH_INTERNAL_ASSERT(used_ <= bytes_, "a tile needs more scratch than it may");
    return array;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t bytes_, used_ = 0;
};

// elementwise: no norm is needed; whole: groups that fit; piece: a part of groups that do not.
enum class TileKind { elementwise, whole, piece };

template <typename T>
class TileRunner {
  using A = Compute<T>;

 public:
  using Solver = ShrinkageSolver<A>;

  TileRunner(const TensorStep& step, const Layout& layout, const Tile& tile, TileKind kind, Scratch& scratch)
      : step_(step),
        tile_(tile),
        L_(layout),
        narrow_(layout.R2 < kNarrow && layout.R1 > 1),
        group0_(tile.c0 / layout.R2),
        groups_((tile.c1 + layout.R2 - 1) / layout.R2 - group0_),
        fold_(narrow_ ? layout.R2 : 1),
        thresholds_(thresholds_of(step)),
        scalars_{A(step.h->sgd.lr), A(step.h->sgd.momentum), A(step.h->sgd.one_minus_dampening),
                 A(step.h->sgd.weight_decay), A(step.h->sgd.grad_sign)},
        update_{step.grad == nullptr  ? Momentum::no_grad
                : step.buf == nullptr ? Momentum::none
                : step.first          ? Momentum::first
                                      : Momentum::running,
                step.h->nesterov, step.h->sgd.weight_decay != 0},
        freeze_groups_(step.h->freeze == Freeze::group && step.has_groups),
        aliases_(rows_alias(layout, sizeof(T))),
        block_rows_(kind == TileKind::piece
                        ? std::clamp(kBlockElements / tile.columns(), int64_t{1}, kBlockRows)
                        : kBlockRows),
        z_in_w_(kind == TileKind::piece && holds_z(step)),
        z_stride_(z_in_w_ ? layout.row_length() : tile.columns()),
        rows_ahead_(tile.rows() == 1 || tile.columns() == layout.row_length()
                        ? 0
                        : (aliases_ ? kPrefetchL2 : kPrefetchL1) / (tile.columns() * sizeof(T)) + 1) {
    scratch.reset();
    const bool is_piece = kind == TileKind::piece;
    if (!z_in_w_)
      z_ = scratch.take<A>(tile.columns() * (is_piece ? std::min(tile.rows(), block_rows_) : tile.rows()));
    if (kind == TileKind::elementwise) return;
    const int64_t n = groups_ * fold_;
    s_ = scratch.take<A>(n);
    t_ = scratch.take<A>(n);
    alive_ = scratch.take<A>(n);
    std::fill_n(alive_, n, A(0));
    sums_ = {step.h->exact ? scratch.take<double>(n) : nullptr, scratch.take<double>(n),
             scratch.take<double>(n)};
    if (kind == TileKind::whole) solvers_ = scratch.take<Solver>(groups_);
    if (is_piece && !z_in_w_) unused_buf_ = scratch.take<T>(tile.columns());
  }

  static Thresholds<A> thresholds_of(const TensorStep& step) {
    const Thresholds<double>& h = step.h->thresholds;
    return {A(h.a), A(h.b), A(h.c)};
  }

  // No norm is needed: w = soft(z, c), or z itself.
  void run_elementwise() {
    update_rows(tile_.r0, tile_.r1, z_, /*keep_buf=*/true);
    const int64_t n = tile_.rows() * tile_.columns();
    thresholds_.any() ? ops_.apply_run(n, z_, {A(1), thresholds_.c}, w(tile_.r0))
                      : ops_.store(n, z_, w(tile_.r0));
  }

  // Whole groups: z stays in scratch between the reduction and the apply.
  void run_whole() {
    for (int64_t g = 0; g < groups_; ++g) solvers_[g].start(thresholds_);
    begin_sums(solvers_);
    for_each_block([&](int64_t r0, int64_t r1) {
      A* z = z_ + (r0 - tile_.r0) * tile_.columns();
      find_alive(r0, r1);
      update_rows(r0, r1, z, /*keep_buf=*/true);
      add_stats(r1 - r0, z);
    });
    while (!solve(step_, groups_, solvers_, [&](int64_t g) { return group_sums(g); })) {
      begin_sums(solvers_);
      add_stats(tile_.rows(), z_);
    }
    spread(solvers_);
    apply_rows(tile_.r0, tile_.r1, z_, solvers_);
  }

  // A piece of large groups: its sums at each group's t. The first pass leaves z in w; where w's type is too
  // narrow for z, or its zeros are still needed, each pass makes z anew and nothing is written. `solvers` and
  // `out` begin at this tile's first group.
  void sum_piece(const Solver* solvers, PieceSums* out, bool first) {
    begin_sums(solvers);
    for_each_block([&](int64_t r0, int64_t r1) {
      if (first) find_alive(r0, r1);
      add_stats(r1 - r0, piece_z(r0, r1, first, /*keep_buf=*/z_in_w_));
    });
    for (int64_t g = 0; g < groups_; ++g) out[g] = {group_sums(g), is_alive(g)};
  }

  // The last pass; `alive[g]` says whether the whole group has a weight to keep.
  void apply_piece(const Solver* solvers, const PieceSums* totals) {
    for (int64_t g = 0; g < groups_; ++g) std::fill_n(alive_ + g * fold_, fold_, A(totals[g].alive));
    spread(solvers);
    const auto apply = [&](int64_t r0, int64_t r1) {
      apply_rows(r0, r1, piece_z(r0, r1, false, /*keep_buf=*/true), solvers);
    };
    z_in_w_ ? apply(tile_.r0, tile_.r1) : for_each_block(apply);
  }

  // Feeds each open search its group's sums; true when all are done.
  template <typename SumsOf>
  static bool solve(const TensorStep& step, int64_t groups, Solver* solvers, SumsOf sums_of) {
    const Thresholds<A> thresholds = thresholds_of(step);
    bool all_done = true;
    for (int64_t g = 0; g < groups; ++g) {
      if (solvers[g].done) continue;
      const GroupStats<double> sums = sums_of(g);
      solvers[g].solve_shrinkage({A(sums.count), A(sums.l1), A(sums.l2_squared)}, thresholds, step.h->exact,
                                 std::numeric_limits<A>::epsilon());
      all_done &= solvers[g].done;
    }
    return all_done;
  }

  int64_t groups() const { return groups_; }

 private:
  int64_t offset(int64_t r) const { return L_.offset(tile_.k1, r, 0) + tile_.c0; }
  T* w(int64_t r) const { return static_cast<T*>(step_.w) + offset(r); }
  T* buf(int64_t r) const { return step_.buf ? static_cast<T*>(step_.buf) + offset(r) : nullptr; }
  const T* grad(int64_t r) const {
    return step_.grad ? static_cast<const T*>(step_.grad) + offset(r) : nullptr;
  }

  template <typename F>
  void for_each_block(F f) const {
    for (int64_t r = tile_.r0; r < tile_.r1; r += block_rows_) f(r, std::min(r + block_rows_, tile_.r1));
  }

  // Each group's contiguous part of one row of the tile: f(group, begin, end).
  template <typename F>
  void for_each_segment(F f) const {
    for (int64_t g = 0; g < groups_; ++g)
      f(g, std::max((group0_ + g) * L_.R2 - tile_.c0, int64_t{0}),
        std::min((group0_ + g + 1) * L_.R2, tile_.c1) - tile_.c0);
  }

  Rows rows(int64_t r0, int64_t r1) const {
    return {r1 - r0,     tile_.columns(), L_.row_length(), z_stride_,
            rows_ahead_, tile_.r1 - r0,   r0 == tile_.r0,  aliases_};
  }

  void update_rows(int64_t r0, int64_t r1, A* z, bool keep_buf) {
    ops_.sgd_update(update_, step_.h->freeze == Freeze::element, rows(r0, r1), w(r0), grad(r0), buf(r0),
                    keep_buf ? buf(r0) : unused_buf_, keep_buf ? L_.row_length() : 0, z, scalars_);
  }

  // z of some rows of a piece, updated now or, where w has held it since the first pass, then.
  A* piece_z(int64_t r0, int64_t r1, bool first, bool keep_buf) {
    if constexpr (std::is_same_v<T, A>) {
      if (z_in_w_) {
        if (first && step_.grad != nullptr) update_rows(r0, r1, w(r0), keep_buf);
        return w(r0);
      }
    }
    update_rows(r0, r1, z_, keep_buf);
    return z_;
  }

  void find_alive(int64_t r0, int64_t r1) {
    if (!freeze_groups_) return;
    for (int64_t r = r0; r < r1; ++r) {
      const T* const row = w(r);
      if (narrow_)
        ops_.find_alive(tile_.columns(), row, alive_);
      else
        for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
          if (std::any_of(row + begin, row + end, [](T x) { return x != T(0); })) alive_[g] = A(1);
        });
    }
  }

  void begin_sums(const Solver* solvers) {
    for (double* sum : {sums_.count, sums_.l1, sums_.l2_squared})
      if (sum != nullptr) std::fill_n(sum, groups_ * fold_, 0.0);
    for (int64_t g = 0; g < groups_; ++g) std::fill_n(t_ + g * fold_, fold_, solvers[g].at.t);
  }

  void add_stats(int64_t rows, const A* z) {
    if (narrow_) {
      for (int64_t r = 0; r < rows; r += kSumRows)
        ops_.column_stats(std::min(kSumRows, rows - r), tile_.columns(), z_stride_, z + r * z_stride_, t_,
                          sums_);
      return;
    }
    for (int64_t r = 0; r < rows; ++r, z += z_stride_)
      for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
        ops_.run_stats(end - begin, z + begin, t_[g], sums_ + g);
      });
  }

  GroupStats<double> group_sums(int64_t g) const {
    GroupStats<double> total{0, 0, 0};
    for (int64_t j = g * fold_; j < (g + 1) * fold_; ++j) {
      if (sums_.count != nullptr) total.count += sums_.count[j];
      total.l1 += sums_.l1[j];
      total.l2_squared += sums_.l2_squared[j];
    }
    return total;
  }

  bool is_alive(int64_t g) const {
    return !freeze_groups_ ||
           std::any_of(alive_ + g * fold_, alive_ + (g + 1) * fold_, [](A x) { return x != 0; });
  }

  // (s, t) of each group to its columns, and which groups are frozen.
  void spread(const Solver* solvers) {
    any_dead_ = false;
    for (int64_t g = 0; g < groups_; ++g) {
      const bool alive = is_alive(g);
      any_dead_ |= !alive;
      if (!narrow_) continue;
      std::fill_n(s_ + g * fold_, fold_, solvers[g].at.s);
      std::fill_n(t_ + g * fold_, fold_, solvers[g].at.t);
      if (freeze_groups_) std::fill_n(alive_ + g * fold_, fold_, A(alive));
    }
  }

  void apply_rows(int64_t r0, int64_t r1, const A* z, const Solver* solvers) {
    const int64_t n = tile_.columns();
    if (narrow_ && thresholds_.any()) ops_.apply_columns(rows(r0, r1), z, s_, t_, w(r0));
    for (int64_t r = r0; r < r1; ++r, z += z_stride_) {
      if (!thresholds_.any())
        z_in_w_ ? void() : ops_.store(n, z, w(r));
      else if (!narrow_)
        for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
          ops_.apply_run(end - begin, z + begin, solvers[g].at, w(r) + begin);
        });
      if (any_dead_)
        for (T* x : {w(r), buf(r)})
          if (x) zero_dead_groups(x);
    }
  }

  void zero_dead_groups(T* x) const {
    if (narrow_) return ops_.mask(tile_.columns(), alive_, x);
    for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
      if (!is_alive(g)) std::fill(x + begin, x + end, T(0));
    });
  }

  const TensorStep& step_;  // outlives this object
  const Tile tile_;
  const Layout L_;
  const bool narrow_;
  const int64_t group0_, groups_, fold_;
  const Thresholds<A> thresholds_;
  const SgdScalars<A> scalars_;
  const RowUpdate update_;
  const bool freeze_groups_, aliases_;
  const int64_t block_rows_;
  const bool z_in_w_;  // where a piece leaves z between passes
  const int64_t z_stride_, rows_ahead_;
  A *z_ = nullptr, *s_ = nullptr, *t_ = nullptr, *alive_ = nullptr;  // the last three by stat column
  ColumnSums sums_{};
  Solver* solvers_ = nullptr;
  T* unused_buf_ = nullptr;
  bool any_dead_ = false;
  const RowOps<T>& ops_ = row_ops<T>();
};

}  // namespace cges
