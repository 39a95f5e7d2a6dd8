// Loops over contiguous runs of memory, written so that the compiler vectorises them; every formula is
// sgd.h's, adamw.h's or shrinkage.h's. rows.cpp compiles the bodies once per instruction set and picks one at run time.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "common/step.h"

namespace cges::cpu {

constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kShortGroup = kSorted;  // elements of a group, at most, for many to be solved side by side
constexpr int64_t kTogether = 64;         // groups
constexpr int64_t kSumRows = 32;          // rows summed in the compute type before double takes over

// How a tensor is updated: in which phase, by which rule, with that one's numbers.
template <typename A>
struct Update {
  Phase phase;
  Rule rule;
  bool nesterov, decays;
  SgdScalars<A> sgd{};
  AdamwScalars<A> adamw{};

  Update(const TensorInStep& tensor, const Hyperparameters& h)
      : phase(tensor.phase), rule(h.rule), nesterov(h.nesterov), decays(h.sgd.weight_decay != 0) {
    if (rule == Rule::sgd) {
      sgd = h.sgd.as<A>();
    } else {
      adamw = {h.adamw, h.adamw.lr, correct(h.adamw, h.adamw.lr, tensor.count)};
      decays = adamw.decay != 0;
    }
  }
};

// The same place of each of a tensor's arrays, null where there is none; and where the new states go, whose rows
// lie `out_stride` apart.
template <typename T>
struct Places {
  const T *w, *grad;
  std::array<const T*, kMostStates> states;
  std::array<T*, kMostStates> new_states;
  int64_t out_stride;

  // So many elements further on, where there is anything.
  Places moved(int64_t in, int64_t out) const {
    Places at{w + in, grad ? grad + in : nullptr, states, new_states, out_stride};
    for (int s = 0; s < kMostStates; ++s) {
      if (states[s]) at.states[s] += in;
      if (new_states[s]) at.new_states[s] += out;
    }
    return at;
  }
};

// The sums of many columns or groups; count is null where it is not needed.
template <typename S>
struct Sums {
  S *count, *l1, *l2_squared;
  Sums operator+(int64_t i) const { return {count == nullptr ? nullptr : count + i, l1 + i, l2_squared + i}; }
};

// Running ones are in double, so that a long group loses nothing to the order of its sums.
using ColumnSums = Sums<double>;

// Some rows of a tile.
struct Rows {
  int64_t rows, columns, stride;  // in elements
  int64_t z_stride;               // of the same rows of z
};

template <typename T>
struct RowOps {
  using A = Compute<T>;

  // z[i], which may be w[i] itself unless `freeze`, and the new states, from w[i], the gradient and the states;
  // where `freeze`, what is 0 stays 0, its states too.
  void (*update)(const Update<A>&, bool freeze, const Rows&, const Places<T>&, A* z);
  // sums[j] += the statistics of column j of z [rows, columns] (rows `stride` apart) at threshold t[j].
  void (*column_stats)(int64_t rows, int64_t columns, int64_t stride, const A* z, const A* t,
                       ColumnSums sums);
  // The same of one run of n elements, all at threshold t, to sums[0].
  void (*run_stats)(int64_t n, const A* z, A t, ColumnSums sums);
  // alive[j] = 1 where w[j] is anything but 0; else as it was.
  void (*find_alive)(int64_t n, const T* w, A* alive);
  // x = 0 where alive is 0.
  void (*mask)(int64_t n, const A* alive, T* x);
  // w = s * soft(z, t) with one (s, t) per column, or one for the run; z may be w itself.
  void (*apply_columns)(const Rows&, const A* z, const A* s, const A* t, T* w);
  void (*apply_run)(int64_t n, const A* z, Shrinkage<A>, T* w);
  // The same of elements that are each a group.
  void (*apply_ones)(int64_t n, const A* z, const Thresholds<A>&, bool exact, T* w);
  // (s, t) of groups of at most kShortGroup elements: `rows` runs of `run` elements, `stride` apart in z, which
  // goes on for 3 elements more. There is room for whole multiples of kTogether groups in s and t.
  void (*solve_short)(int64_t groups, int64_t rows, int64_t run, const A* z, int64_t stride,
                      const Thresholds<A>&, bool exact, A* s, A* t);
  // w = s * soft(z, t) of neighbouring runs, each with its own (s, t); z may not be w.
  void (*apply_short)(int64_t groups, int64_t run, const A* z, const A* s, const A* t, T* w);
  // w = z, where nothing shrinks.
  void (*store)(int64_t n, const A* z, T* w);
};

// The best implementation that this processor runs.
template <typename T>
const RowOps<T>& row_ops();

}  // namespace cges::cpu
