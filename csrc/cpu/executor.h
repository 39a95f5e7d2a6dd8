// One fused step over many tensors on the CPU.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "common/layout.h"
#include "cpu/rows.h"

namespace cges {

// One tensor of one step. All pointers share the layout's memory order.
struct TensorStep {
  void* w;
  const void* grad;  // null: no SGD, the prox alone
  void* buf;         // null: no momentum
  bool first;        // the buffer holds nothing yet
  c10::ScalarType dtype;
  Layout layout;
  bool has_groups;  // whether a, b and group-wise freezing apply
  const Hyperparameters* h;
};

void cpu_step(const std::vector<TensorStep>& tensors);

// For tests: at most so many bytes of z in a tile (never more than the L2), so that small groups count as
// large.
void limit_z_bytes(int64_t bytes);

}  // namespace cges
