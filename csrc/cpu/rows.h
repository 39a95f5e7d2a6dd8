// The CPU executor's loops over contiguous runs of memory, as a table of functions. tile.h and short_groups.h
// call them; their bodies are in rows.inc, written so that the compiler vectorises them. Every formula is
// taken from sgd.h, adamw.h or shrinkage.h. rows.cpp compiles the bodies once for each instruction set and
// picks one at run time.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "common/step.h"

namespace cges::cpu {

constexpr int64_t kLine = 64;              // the bytes of a cache line
constexpr int64_t kShortGroup = 64;        // the most elements of groups that are solved side by side
constexpr int64_t kShortColumn = kSorted;  // the same for columns in sequential mode
constexpr int64_t kTogether = 64;          // the number of short groups that are solved at once
constexpr int64_t kSumRows = 32;           // rows summed in the compute type before they are added in double

// The update of a tensor: its phase, the rule, and the rule's numbers in the compute type.
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

// The addresses of some elements in each of a tensor's arrays; null if there is no such array. New states go
// to `new_states`, whose rows lie `out_stride` apart.
template <typename T>
struct Places {
  const T *w, *grad;
  std::array<const T*, kMostStates> states;
  std::array<T*, kMostStates> new_states;
  int64_t out_stride;

  // The addresses `in` elements further on in the arrays that are read, and `out` in those that are written.
  Places moved(int64_t in, int64_t out) const {
    Places at{w + in, grad ? grad + in : nullptr, states, new_states, out_stride};
    for (int s = 0; s < kMostStates; ++s) {
      if (states[s]) at.states[s] += in;
      if (new_states[s]) at.new_states[s] += out;
    }
    return at;
  }
};

// Arrays with the sums of many columns or groups. `count` is null where it is not needed.
template <typename S>
struct Sums {
  S *count, *l1, *l2_squared;
  Sums operator+(int64_t i) const { return {count == nullptr ? nullptr : count + i, l1 + i, l2_squared + i}; }
};

// Sums over many rows are kept in double, so that a long group loses no accuracy.
using ColumnSums = Sums<double>;

// The shape of some rows of a tile. Strides are in elements; the stride of z may differ.
struct Rows {
  int64_t rows, columns, stride;
  int64_t z_stride;
};

template <typename T>
struct RowOps {
  using A = Compute<T>;

  // Writes z and the new states from w, the gradient and the states. z may be w itself unless `freeze`. With
  // `freeze`, a weight that is 0 stays 0, and its states become 0.
  void (*update)(const Update<A>&, bool freeze, const Rows&, const Places<T>&, A* z);
  // Adds to sums[j] the group_stats of column j of z [rows, columns] at threshold t[j]. Rows lie `stride`
  // apart.
  void (*column_stats)(int64_t rows, int64_t columns, int64_t stride, const A* z, const A* t,
                       ColumnSums sums);
  // Adds to sums[0] the group_stats of n contiguous elements at threshold t.
  void (*run_stats)(int64_t n, const A* z, A t, ColumnSums sums);
  // Sets alive[j] to 1 where w[j] is not 0, and leaves the others as they are.
  void (*find_alive)(int64_t n, const T* w, A* alive);
  // Sets x[j] to 0 where alive[j] is 0.
  void (*mask)(int64_t n, const A* alive, T* x);
  // w = s * soft(z, t), with an (s, t) for each column or one for the whole run. z may be w itself.
  void (*apply_columns)(const Rows&, const A* z, const A* s, const A* t, T* w);
  void (*apply_run)(int64_t n, const A* z, Shrinkage<A>, T* w);
  // Solves and applies elements that are each a group of its own. z may be w itself.
  void (*apply_ones)(int64_t n, const A* z, const Thresholds<A>&, bool exact, T* w);
  // (s, t) of groups of at most kShortGroup elements. In each of `rows` rows of z, which lie `stride` apart,
  // a group has `run` contiguous elements, one group after the other. Up to 3 elements behind z may be read.
  // s and t must have room for the number of groups rounded up to a multiple of kTogether.
  void (*solve_short)(int64_t groups, int64_t rows, int64_t run, const A* z, int64_t stride,
                      const Thresholds<A>&, bool exact, A* s, A* t);
  // w = s * soft(z, t) for neighbouring runs of `run` elements, each with its own (s, t). z must not be w.
  void (*apply_short)(int64_t groups, int64_t run, const A* z, const A* s, const A* t, T* w);
  // w = z, for a step that shrinks nothing.
  void (*store)(int64_t n, const A* z, T* w);
};

// The functions for the best instruction set that this processor has.
template <typename T>
const RowOps<T>& row_ops();

}  // namespace cges::cpu
