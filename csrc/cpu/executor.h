// One fused step over many tensors on the CPU.
#pragma once
#include <cstdint>
#include <vector>

#include "common/step.h"

namespace cges::cpu {

// By group, whether the last step found it all zero and held it so, states included: another step of the same
// kind would change nothing. A byte each, since threads write them side by side.
using HeldGroups = std::vector<uint8_t>;

// One tensor of one step.
struct StepTensor : TensorShape, TensorInStep {  // not skipped
  const Hyperparameters* h;
  HeldGroups* held = nullptr;  // these groups are passed by; the step says which are held after it

  Thresholds<double> thresholds() const { return h->thresholds(); }
};

void step(const std::vector<StepTensor>& tensors);

// For tests: at most so many bytes of z in a tile (never more than the L2), so that small groups count as
// large.
void limit_z_bytes(int64_t bytes);

// For tests and counts: vectors of at most so many bytes, so that other instruction sets than the best run.
void limit_vector_bytes(int64_t bytes);

}  // namespace cges::cpu
