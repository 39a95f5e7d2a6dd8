// A tile of groups of a few elements each: a block of them at a time goes through update, sums, shrinkage and
// apply while it is in the L1.
#pragma once
#include <algorithm>

#include "cpu/cut.h"
#include "cpu/scratch.h"

namespace cges::cpu {

constexpr int64_t kShortBlock = 1024;  // elements, about

template <typename T>
void run_short_groups(const Slot& slot, const Layout& L, const Tile& tile, Scratch& scratch) {
  using A = Compute<T>;
  const RowOps<T>& ops = row_ops<T>();
  const auto thresholds = slot.thresholds().template as<A>();
  const auto scalars = slot.h->sgd.template as<A>();
  const RowUpdate update{slot.phase, slot.h->nesterov, slot.h->sgd.weight_decay != 0};
  const bool freeze = slot.h->freeze == Freeze::group;
  const int64_t rows = L.R1, run = L.R2, groups = tile.columns() / run;
  const int64_t block = std::max(kShortBlock / (L.group_size() * kTogether), int64_t{1}) * kTogether;

  scratch.reset();
  A* const s = scratch.take<A>(block);
  A* const t = scratch.take<A>(block);
  A* const z = scratch.take<A>(block * L.group_size() + 3);  // see solve_short
  bool* const dead = scratch.take<bool>(block);
  for (int64_t g0 = 0; g0 < groups; g0 += block) {
    const int64_t n = std::min(block, groups - g0), columns = n * run, stride = L.row_length();
    const int64_t at = L.offset(tile.k1, 0, 0) + tile.c0 + g0 * run;
    T* const w = static_cast<T*>(slot.w) + at;
    T* const buf = slot.buf ? static_cast<T*>(slot.buf) + at : nullptr;
    const T* const grad = slot.grad ? static_cast<const T*>(slot.grad) + at : nullptr;

    const auto each_element = [&](T* x, auto f) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < n; ++g)
          for (int64_t k = 0; k < run; ++k) f(g, x[r * stride + g * run + k]);
    };
    std::fill_n(dead, n, freeze);
    if (freeze) each_element(w, [&](int64_t g, T x) { dead[g] &= x == T(0); });
    const Rows m{rows, columns, stride, columns, 0, rows, false, false};
    ops.sgd_update(update, freezes_elements(slot), m, w, grad, buf, buf, stride, z, scalars);
    ops.solve_short(n, rows, run, z, columns, thresholds, slot.h->exact, s, t);
    if (run == 1)
      ops.apply_columns(m, z, s, t, w);
    else
      for (int64_t r = 0; r < rows; ++r) ops.apply_short(n, run, z + r * columns, s, t, w + r * stride);
    for (T* tensor : {w, buf})
      if (freeze && tensor != nullptr) each_element(tensor, [&](int64_t g, T& x) { x = dead[g] ? T(0) : x; });
  }
}

}  // namespace cges::cpu
