// Runs a tile whose groups have only a few elements each (at most kShortGroup). A block of them at a time
// goes through update, sums, shrinkage and apply while it is in the L1. cpu/executor.cpp makes a ShortGroups
// for each such tile; the loops are in short_groups.inc.
#pragma once
#include <algorithm>

#include "cpu/cut.h"
#include "cpu/scratch.h"

namespace cges::cpu {

constexpr int64_t kShortBlock = 2048;  // the approximate number of elements in a block

template <typename T>
class ShortGroups {
 public:
  using A = Compute<T>;

  ShortGroups(const StepTensor& tensor, const Layout& layout, Scratch& scratch)
      : tensor_(tensor),
        L_(layout),
        thresholds_(tensor.thresholds().template as<A>()),
        update_(tensor, *tensor.h),
        freeze_(tensor.h->freeze == Freeze::group),
        most_(std::max(kShortBlock / (layout.group_size() * kTogether), int64_t{1}) * kTogether),
        scratch_(scratch) {}

  // Small matrices are put side by side, so that there are many groups to solve at once. Other tiles are run
  // a block of columns at a time.
  void run(const Tile& tile) {
    const int64_t matrices = most_ / L_.K2;
    if (tile.columns() == L_.row_length() && L_.R1 > 1 && L_.K2 <= kTogether / 2)
      for (int64_t k1 = tile.k1; k1 < tile.k1_end; k1 += matrices)
        run_matrices(k1, std::min(matrices, tile.k1_end - k1));
    else
      for (int64_t k1 = tile.k1; k1 < tile.k1_end; ++k1)
        for (int64_t c = tile.c0; c < tile.c1; c += most_ * L_.R2)
          run_columns(k1, c, std::min(most_ * L_.R2, tile.c1 - c));
  }

 private:
  T* w(int64_t at) const { return static_cast<T*>(tensor_.w) + at; }
  // The tensor's arrays from element `at` on. New states replace the old ones, in rows `stride` apart.
  Places<T> places(int64_t at, int64_t stride) const {
    Places<T> all{w(at), tensor_.grad ? static_cast<const T*>(tensor_.grad) + at : nullptr, {}, {}, stride};
    for (int s = 0; s < kMostStates; ++s)
      if (tensor_.states[s] != nullptr)
        all.states[s] = all.new_states[s] = static_cast<T*>(tensor_.states[s]) + at;
    return all;
  }

  // Runs columns [c, c + columns) of the matrix at k1.
  void run_columns(int64_t k1, int64_t c, int64_t columns) {
    const int64_t at = L_.offset(k1, 0, 0) + c, stride = L_.row_length();
    A* const z = take_block(columns);
    find_alive(columns, w(at), stride);
    for (int64_t g = 0; tensor_.held != nullptr && g < columns / L_.R2; ++g)
      (*tensor_.held)[c / L_.R2 + g] = alive_[g * L_.R2] == 0;
    const Rows m{L_.R1, columns, stride, columns};
    const Places<T> all = places(at, stride);
    ops_.update(update_, freezes_elements(tensor_), m, all, z);
    shrink(columns, z, w(at), stride);
    for (T* const state : all.new_states)
      for (int64_t r = 0; freeze_ && state != nullptr && r < L_.R1; ++r)
        ops_.mask(columns, alive_, state + r * stride);
  }

  // Runs some small matrices from k1 on. They are one run of memory, so they are updated as one row; then
  // their z is copied into one wide matrix, in which they lie side by side, and the result is copied back.
  void run_matrices(int64_t k1, int64_t matrices) {
    const int64_t at = L_.offset(k1, 0, 0), columns = matrices * L_.row_length(), n = L_.R1 * columns;
    A* const wide = take_block(columns);
    A* const z = scratch_.take<A>(n);
    T* const result = scratch_.take<T>(n);
    // For each row of each matrix: f(index of its first element in memory, the same in the wide matrix).
    const auto each_row = [&](auto f) {
      for (int64_t q = 0; q < matrices; ++q)
        for (int64_t r = 0; r < L_.R1; ++r)
          f((q * L_.R1 + r) * L_.row_length(), r * columns + q * L_.row_length());
    };
    const auto copy = [&](const auto* from, auto* to) {
      for (int64_t i = 0; i < L_.row_length(); ++i) to[i] = from[i];
    };
    if (freeze_) each_row([&](int64_t i, int64_t j) { copy(w(at + i), result + j); });
    find_alive(columns, result, columns);
    const Rows m{1, n, n, n};
    const Places<T> all = places(at, n);
    ops_.update(update_, freezes_elements(tensor_), m, all, z);
    each_row([&](int64_t i, int64_t j) { copy(z + i, wide + j); });
    shrink(columns, wide, result, columns);
    each_row([&](int64_t i, int64_t j) { copy(result + j, w(at + i)); });
    for (T* const state : all.new_states)
      if (freeze_ && state != nullptr)
        each_row([&](int64_t i, int64_t j) { ops_.mask(L_.row_length(), alive_ + j % columns, state + i); });
  }

  // Takes room for s, t and alive, and returns room for z.
  A* take_block(int64_t columns) {
    scratch_.reset();
    s_ = scratch_.take<A>(most_);
    t_ = scratch_.take<A>(most_);
    alive_ = scratch_.take<A>(columns);
    return scratch_.take<A>(L_.R1 * columns + 3);  // solve_short may read 3 elements behind z
  }

  // If groups are frozen, sets alive_ for each column: 1 if its group has a weight that is not zero.
  void find_alive(int64_t columns, const T* w, int64_t stride) {
    if (!freeze_) return;
    std::fill_n(alive_, columns, A(0));
    for (int64_t r = 0; r < L_.R1; ++r) ops_.find_alive(columns, w + r * stride, alive_);
    for (A* group = alive_; L_.R2 > 1 && group < alive_ + columns; group += L_.R2)
      std::fill_n(group, L_.R2, *std::max_element(group, group + L_.R2));
  }

  // Solves the groups of z and writes w. The rows of w lie `stride` apart, those of z `columns`.
  void shrink(int64_t columns, const A* z, T* w, int64_t stride) {
    const int64_t groups = columns / L_.R2;
    if (thresholds_.need_norms()) {
      ops_.solve_short(groups, L_.R1, L_.R2, z, columns, thresholds_, tensor_.h->exact, s_, t_);
      const Rows m{L_.R1, columns, stride, columns};
      if (L_.R2 == 1) ops_.apply_columns(m, z, s_, t_, w);
    }
    for (int64_t r = 0; r < L_.R1; ++r, z += columns, w += stride) {
      if (!thresholds_.any())
        ops_.store(columns, z, w);
      else if (!thresholds_.need_norms())
        ops_.apply_run(columns, z, {A(1), thresholds_.c}, w);
      else if (L_.R2 > 1)
        ops_.apply_short(groups, L_.R2, z, s_, t_, w);
      if (freeze_) ops_.mask(columns, alive_, w);
    }
  }

  const StepTensor& tensor_;  // outlives this object
  const Layout L_;
  const Thresholds<A> thresholds_;
  const Update<A> update_;
  const bool freeze_;
  const int64_t most_;  // the most groups in a block, a multiple of kTogether
  Scratch& scratch_;
  A *s_ = nullptr, *t_ = nullptr, *alive_ = nullptr;
  const RowOps<T>& ops_ = row_ops<T>();
};

}  // namespace cges::cpu
