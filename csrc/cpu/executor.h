// The CPU executor as its caller sees it: one fused step over many tensors. plan/executor.cpp calls it.
#pragma once
#include <cstdint>
#include <vector>

#include "common/step.h"

namespace cges::cpu {

// For each group, whether the last step found it all zero and held it and its states at zero. Another step of
// the same kind would change nothing. Each group has a whole byte, because several threads write at once.
using HeldGroups = std::vector<uint8_t>;

// One tensor of one step; none of them is skipped.
struct StepTensor : TensorShape, TensorInStep {
  const Hyperparameters* h;
  HeldGroups* held = nullptr;  // the step skips these groups, and records the groups that it holds itself

  Thresholds<double> thresholds() const { return h->thresholds(); }
};

void step(const std::vector<StepTensor>& tensors);

// For tests: allows at most so many bytes of z in a tile (and never more than the L2), so that small groups
// count as large ones.
void limit_z_bytes(int64_t bytes);

// For tests and for counting instructions: allows vectors of at most so many bytes, so that an instruction
// set other than the processor's best is used.
void limit_vector_bytes(int64_t bytes);

}  // namespace cges::cpu
