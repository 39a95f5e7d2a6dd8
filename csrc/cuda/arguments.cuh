// What a kernel is given: the only argument of each.
#pragma once
#include "cuda/rule.cuh"

namespace cges::cuda {

constexpr int kMostArguments = 32764;  // bytes; CUDA >= 12.1, sm_70 on
// A launch with the most takes some 3 us longer than with these, which hold the 161 tensors of ResNet-50.
constexpr int kFewArguments = 5120, kFewTensors = 176;

// What travels with each step: of a launch,
struct StepHead {
  const Strip* strips;
  const Item *items, *chunks;
  unsigned char* scratch;
  int32_t* counters;
  int32_t tickets, stages, panels;
  LossScale loss_scale;

  // Whether nothing is to change at all; the same for all blocks.
  __device__ bool overflowed() const {
    return loss_scale.found_inf != nullptr && *loss_scale.found_inf != 0.0f;
  }
};

// and of its tensors: a kernel's only argument. What stays from step to step lies in device memory.
template <typename A, int bytes>
struct StepTable : StepHead {
  static constexpr int kTensors = bytes == kFewArguments ? kFewTensors : kMaxTensors;
  static constexpr int kRows =
      int((bytes - sizeof(StepHead) - 8 - kTensors * (sizeof(TensorArgs) + 2)) / sizeof(Coefficients<A>));

  TensorArgs tensors[kTensors];
  uint16_t rows[kTensors];  // row of coefficients * 16 + plain * 8 + phase + 1
  Coefficients<A> coefficients[kRows];

  void set(int tensor, int row, bool plain, int64_t phase) {
    rows[tensor] = uint16_t(row * 16 + plain * 8 + phase + 1);
  }
  // Whether the tensor has a gradient.
  __device__ bool steps(int tensor) const { return rows[tensor] % 8 != 0; }
  __device__ Momentum momentum(int tensor) const { return Momentum(int(rows[tensor] % 8) - 1); }
  // Whether the step of the tensor is one that SgdRule and the kernels call plain.
  __device__ bool plain(int tensor) const { return rows[tensor] / 8 % 2 != 0; }
  __device__ const Coefficients<A>& of(int tensor) const { return coefficients[rows[tensor] / 16]; }
};

template <typename T, int bytes>
using StepTableOf = StepTable<Compute<T>, bytes>;

}  // namespace cges::cuda
