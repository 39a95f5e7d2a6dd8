// Runs one tile, or one piece of large groups, on the CPU: update, sums, shrinkage and apply, for any layout
// and type. cpu/executor.cpp makes a TileRunner for each; tiles of very small groups go to short_groups.h
// instead.
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/cut.h"
#include "cpu/scratch.h"

namespace cges::cpu {

// A tile is updated and summed in blocks of rows: so few that a block's z is still in the L1 when it is
// summed, and fewer where rows are wide.
constexpr int64_t kBlockRows = 16;
constexpr int64_t kBlockBytes = 256 << 10;  // the most bytes of z in a block

// elementwise: no groups are needed. whole: groups that fit a tile. piece: a part of groups that do not fit.
enum class TileKind { elementwise, whole, piece };

// Sums, (s, t) and `alive` are kept for each "stat column". That is each column of the tile if it is summed
// by columns, and each group otherwise. A group has fold_ stat columns.
template <typename T>
class TileRunner {
 public:
  using A = Compute<T>;
  using Solver = ShrinkageSolver<A>;

  TileRunner(const StepTensor& tensor, const Layout& layout, const Tile& tile, TileKind kind,
             Scratch& scratch)
      : tensor_(tensor),
        tile_(tile),
        L_(layout),
        by_columns_(summed_by_columns(layout)),
        group0_(tile.c0 / layout.R2),
        groups_((tile.c1 + layout.R2 - 1) / layout.R2 - group0_),
        fold_(by_columns_ ? layout.R2 : 1),
        thresholds_(tensor.thresholds().template as<A>()),
        states_(states_of(tensor.h->rule).n),
        update_(tensor, *tensor.h),
        freeze_groups_(tensor.h->freeze == Freeze::group && tensor.has_groups && !has_ones(tensor)),
        block_rows_(std::clamp(kBlockBytes / (block_columns(layout, tile, kind) * int64_t{sizeof(A)}),
                               int64_t{1}, kBlockRows)),
        z_in_w_(holds_z(tensor)),
        z_stays_(z_in_w_ || kind != TileKind::piece) {
    scratch.reset();
    if (kind != TileKind::elementwise) {
      const int64_t n = groups_ * fold_;
      s_ = scratch.take<A>(n);
      t_ = scratch.take<A>(n);
      alive_ = scratch.take<A>(n);
      std::fill_n(alive_, n, A(0));
      sums_ = {tensor.h->searches() ? scratch.take<double>(n) : nullptr, scratch.take<double>(n),
               scratch.take<double>(n)};
      if (kind == TileKind::whole) solvers_ = scratch.take<Solver>(groups_);
    }
    const int64_t z_rows = z_stays_ ? tile.rows() : std::min(block_rows_, tile.rows());
    if (!z_in_w_) z_ = scratch.take<A>(z_rows * tile.columns());
    if (!z_stays_) unused_states_ = scratch.take<T>(states_ * tile.columns());
  }

  // The columns by which a block's rows are counted. Rows are summed block by block, so blocks must be the
  // same however many threads share the columns.
  static int64_t block_columns(const Layout& layout, const Tile& tile, TileKind kind) {
    const bool shared = kind == TileKind::piece && summed_by_columns(layout);
    return shared ? std::min(layout.row_length(), kPieceRowBytes / int64_t{sizeof(A)}) : tile.columns();
  }

  // Without norms w = soft(z, c), or z itself if nothing shrinks. The norms of a group of one element are
  // |u|.
  void run_elementwise() {
    update_rows(tile_.r0, tile_.r1, /*keep_states=*/true);
    const int64_t n = tile_.rows() * tile_.columns();
    if (has_ones(tensor_) && thresholds_.need_norms())
      ops_.apply_ones(n, z(tile_.r0), thresholds_, tensor_.h->exact, w(tile_.r0));
    else if (thresholds_.c != A(0))
      ops_.apply_run(n, z(tile_.r0), {A(1), thresholds_.c}, w(tile_.r0));
    else if (!z_in_w_)
      ops_.store(n, z(tile_.r0), w(tile_.r0));
  }

  // Whole groups. z is still in the cache when a sweep reads it again and when it is shrunk.
  void run_whole() {
    for (int64_t g = 0; g < groups_; ++g) solvers_[g].start(thresholds_);
    sum(solvers_, /*first=*/true);
    while (!solve(tensor_, groups_, solvers_, sums_)) sum(solvers_, /*first=*/false);
    apply(solvers_);
    for (int64_t g = 0; tensor_.held != nullptr && g < groups_; ++g)
      (*tensor_.held)[group0_ + g] = !is_alive(g);
  }

  // Sums a piece of large groups at each group's t. In the first pass it also finds which of them have a
  // weight that is not zero. All arrays begin at the piece's first group.
  void sum_piece(const Solver* solvers, Sums<A> out, bool* alive, bool first) {
    sum(solvers, first);
    std::copy_n(sums_.l1, groups_, out.l1);
    std::copy_n(sums_.l2_squared, groups_, out.l2_squared);
    if (tensor_.h->searches()) std::copy_n(sums_.count, groups_, out.count);
    for (int64_t g = 0; first && g < groups_; ++g) alive[g] = is_alive(g);
  }

  // Applies a piece in the last pass. `alive` now tells of whole groups.
  void apply_piece(const Solver* solvers, const bool* alive) {
    for (int64_t g = 0; freeze_groups_ && g < groups_; ++g)
      std::fill_n(alive_ + g * fold_, fold_, A(alive[g]));
    apply(solvers);
  }

  // Advances each open search by its group's sums. Returns whether all are done.
  static bool solve(const StepTensor& tensor, int64_t groups, Solver* solvers, ColumnSums sums) {
    const Thresholds<A> thresholds = tensor.thresholds().template as<A>();
    const bool searches = tensor.h->searches();
    bool all_done = true;
    for (int64_t g = 0; g < groups; ++g) {
      if (solvers[g].done) continue;
      const double count = searches ? sums.count[g] : 0;
      solvers[g].solve_shrinkage({A(count), A(sums.l1[g]), A(sums.l2_squared[g])}, thresholds,
                                 tensor.h->exact, std::numeric_limits<A>::epsilon());
      all_done &= solvers[g].done;
    }
    return all_done;
  }

 private:
  int64_t offset(int64_t r) const { return L_.offset(tile_.k1, r, 0) + tile_.c0; }
  // The tile's first element in row r, in each array.
  T* w(int64_t r) const { return static_cast<T*>(tensor_.w) + offset(r); }
  T* state(int s, int64_t r) const {
    return tensor_.states[s] ? static_cast<T*>(tensor_.states[s]) + offset(r) : nullptr;
  }
  const T* grad(int64_t r) const {
    return tensor_.grad ? static_cast<const T*>(tensor_.grad) + offset(r) : nullptr;
  }

  A* z(int64_t r) const {
    if constexpr (std::is_same_v<T, A>)
      if (z_in_w_) return w(r);
    const int64_t row = r - tile_.r0;
    return z_ + (z_stays_ ? row : row % block_rows_) * tile_.columns();
  }
  int64_t z_stride() const { return z_in_w_ ? L_.row_length() : tile_.columns(); }

  template <typename F>
  void for_each_block(F f) const {
    for (int64_t r = tile_.r0; r < tile_.r1; r += block_rows_) f(r, std::min(r + block_rows_, tile_.r1));
  }

  // Calls f(group, begin, end) for each group's contiguous part of a row, in columns of the tile.
  template <typename F>
  void for_each_segment(F f) const {
    for (int64_t g = 0; g < groups_; ++g)
      f(g, std::max((group0_ + g) * L_.R2 - tile_.c0, int64_t{0}),
        std::min((group0_ + g + 1) * L_.R2, tile_.c1) - tile_.c0);
  }

  Rows rows(int64_t r0, int64_t r1) const { return {r1 - r0, tile_.columns(), L_.row_length(), z_stride()}; }

  // Takes each group's sums at its t. The first time it makes z.
  void sum(const Solver* solvers, bool first) {
    for (double* sum : {sums_.count, sums_.l1, sums_.l2_squared})
      if (sum != nullptr) std::fill_n(sum, groups_ * fold_, 0.0);
    for (int64_t g = 0; g < groups_; ++g) std::fill_n(t_ + g * fold_, fold_, solvers[g].at.t);
    if (!first && z_stays_)
      add_stats(tile_.r0, tile_.r1);
    else
      for_each_block([&](int64_t r0, int64_t r1) {
        if (first) find_alive(r0, r1);
        update_rows(r0, r1, /*keep_states=*/z_stays_);
        add_stats(r0, r1);
      });
    fold_sums();
  }

  // Shrinks z and writes w. Where z did not stay, it is made again from w, which no pass has changed yet.
  void apply(const Solver* solvers) {
    spread(solvers);
    if (z_stays_)
      apply_rows(tile_.r0, tile_.r1, solvers);
    else
      for_each_block([&](int64_t r0, int64_t r1) {
        update_rows(r0, r1, /*keep_states=*/true);
        apply_rows(r0, r1, solvers);
      });
  }

  // Makes z of some rows, and the new states unless a later pass will make them again (`keep_states`).
  void update_rows(int64_t r0, int64_t r1, bool keep_states) {
    if (z_in_w_ && tensor_.phase == Phase::prox_alone) return;
    Places<T> at{w(r0), grad(r0), {}, {}, keep_states ? L_.row_length() : 0};
    for (int s = 0; s < states_; ++s) {
      at.states[s] = state(s, r0);
      at.new_states[s] = keep_states ? state(s, r0) : unused_states_ + s * tile_.columns();
    }
    ops_.update(update_, freezes_elements(tensor_), rows(r0, r1), at, z(r0));
  }

  // Finds which groups have a weight that is not zero, before z takes the place of w.
  void find_alive(int64_t r0, int64_t r1) {
    if (!freeze_groups_) return;
    for (int64_t r = r0; r < r1; ++r) {
      const T* const row = w(r);
      if (by_columns_)
        ops_.find_alive(tile_.columns(), row, alive_);
      else
        for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
          if (std::any_of(row + begin, row + end, [](T x) { return x != T(0); })) alive_[g] = A(1);
        });
    }
  }

  void add_stats(int64_t r0, int64_t r1) {
    if (by_columns_) {
      for (int64_t r = r0; r < r1; r += kSumRows)
        ops_.column_stats(std::min(kSumRows, r1 - r), tile_.columns(), z_stride(), z(r), t_, sums_);
      return;
    }
    for (int64_t r = r0; r < r1; ++r)
      for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
        ops_.run_stats(end - begin, z(r) + begin, t_[g], sums_ + g);
      });
  }

  // If groups have several stat columns, adds up the sums of these for each group.
  void fold_sums() {
    for (double* sum : {sums_.count, sums_.l1, sums_.l2_squared})
      for (int64_t g = 0; sum != nullptr && fold_ > 1 && g < groups_; ++g)
        sum[g] = std::accumulate(sum + g * fold_, sum + (g + 1) * fold_, 0.0);
  }

  bool is_alive(int64_t g) const {
    return !freeze_groups_ ||
           std::any_of(alive_ + g * fold_, alive_ + (g + 1) * fold_, [](A x) { return x != 0; });
  }

  // Copies each group's (s, t) and whether it is alive to its stat columns.
  void spread(const Solver* solvers) {
    any_dead_ = false;
    for (int64_t g = 0; g < groups_; ++g) {
      const bool alive = is_alive(g);
      any_dead_ |= !alive;
      if (!by_columns_) continue;
      std::fill_n(s_ + g * fold_, fold_, solvers[g].at.s);
      std::fill_n(t_ + g * fold_, fold_, solvers[g].at.t);
      if (freeze_groups_) std::fill_n(alive_ + g * fold_, fold_, A(alive));
    }
  }

  void apply_rows(int64_t r0, int64_t r1, const Solver* solvers) {
    if (by_columns_ && thresholds_.any()) ops_.apply_columns(rows(r0, r1), z(r0), s_, t_, w(r0));
    for (int64_t r = r0; r < r1; ++r) {
      if (thresholds_.any() && !by_columns_)
        for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
          ops_.apply_run(end - begin, z(r) + begin, solvers[g].at, w(r) + begin);
        });
      if (!thresholds_.any() && !z_in_w_) ops_.store(tile_.columns(), z(r), w(r));
      if (!any_dead_) continue;
      zero_dead_groups(w(r));
      for (int s = 0; s < states_; ++s)
        if (state(s, r) != nullptr) zero_dead_groups(state(s, r));
    }
  }

  void zero_dead_groups(T* x) const {
    if (by_columns_) return ops_.mask(tile_.columns(), alive_, x);
    for_each_segment([&](int64_t g, int64_t begin, int64_t end) {
      if (!is_alive(g)) std::fill(x + begin, x + end, T(0));
    });
  }

  const StepTensor& tensor_;  // outlives this object
  const Tile tile_;
  const Layout L_;
  const bool by_columns_;
  const int64_t group0_, groups_, fold_;
  const Thresholds<A> thresholds_;
  const int states_;  // the number of states that the rule keeps
  const Update<A> update_;
  const bool freeze_groups_;
  const int64_t block_rows_;
  const bool z_in_w_;   // whether z lies in w's memory, or else in scratch
  const bool z_stays_;  // whether z stays from the first pass to the last, or else is made again in each
  A* z_ = nullptr;
  A *s_ = nullptr, *t_ = nullptr, *alive_ = nullptr;  // one entry for each stat column
  ColumnSums sums_{};
  Solver* solvers_ = nullptr;
  T* unused_states_ = nullptr;  // a row for new states that are not kept
  bool any_dead_ = false;
  const RowOps<T>& ops_ = row_ops<T>();
};

}  // namespace cges::cpu
