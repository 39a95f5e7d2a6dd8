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
  const bool freeze = slot.h->freeze == Freeze::group, exact = slot.h->exact;
  const int64_t rows = L.R1, run = L.R2, groups = tile.columns() / run;
  const int64_t block = std::max(kShortBlock / (L.group_size() * kTogether), int64_t{1}) * kTogether;

  scratch.reset();
  A* const s = scratch.take<A>(block);
  A* const t = scratch.take<A>(block);
  A* const z = scratch.take<A>(block * L.group_size() + 3);  // see solve_short
  A* const alive = scratch.take<A>(block * run);             // by column
  for (int64_t g0 = 0; g0 < groups; g0 += block) {
    const int64_t n = std::min(block, groups - g0), columns = n * run, stride = L.row_length();
    const int64_t at = L.offset(tile.k1, 0, 0) + tile.c0 + g0 * run;
    T* const w = static_cast<T*>(slot.w) + at;
    T* const buf = slot.buf ? static_cast<T*>(slot.buf) + at : nullptr;
    const T* const grad = slot.grad ? static_cast<const T*>(slot.grad) + at : nullptr;

    if (freeze) std::fill_n(alive, columns, A(0));
    for (int64_t r = 0; freeze && r < rows; ++r) ops.find_alive(columns, w + r * stride, alive);
    for (int64_t g = 0; freeze && run > 1 && g < n; ++g) {
      A* const of_group = alive + g * run;
      std::fill_n(of_group, run, *std::max_element(of_group, of_group + run));
    }
    const Rows m{rows, columns, stride, columns, 0, rows, false, false};
    ops.sgd_update(update, freezes_elements(slot), m, w, grad, buf, buf, stride, z, scalars);
    if (thresholds.need_norms()) ops.solve_short(n, rows, run, z, columns, thresholds, exact, s, t);
    if (thresholds.need_norms() && run == 1) ops.apply_columns(m, z, s, t, w);
    for (int64_t r = 0; r < rows; ++r) {
      const A* const z_row = z + r * columns;
      T* const w_row = w + r * stride;
      if (!thresholds.any())
        ops.store(columns, z_row, w_row);
      else if (!thresholds.need_norms())
        ops.apply_run(columns, z_row, {A(1), thresholds.c}, w_row);
      else if (run > 1)
        ops.apply_short(n, run, z_row, s, t, w_row);
      if (freeze) ops.mask(columns, alive, w_row);
      if (freeze && buf != nullptr) ops.mask(columns, alive, buf + r * stride);
    }
  }
}

}  // namespace cges::cpu
