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
  const Tile* tiles;
  const Item* chunks;
  unsigned char* scratch;
  int32_t* counters;
  int32_t tile_count, tiles_in_parts, slots, z_passes;  // see Work
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
  static constexpr int kParamGroups =
      int((bytes - sizeof(StepHead) - 8 - kTensors * (sizeof(TensorAddresses) + 2)) / sizeof(ParamGroup<A>));

  TensorAddresses tensors[kTensors];
  uint16_t packed[kTensors];  // index of its param group * 16 + plain * 8 + phase + 1
  ParamGroup<A> param_groups[kParamGroups];

  void set(int tensor, int param_group, bool plain, Phase phase) {
    packed[tensor] = uint16_t(param_group * 16 + plain * 8 + int(phase) + 1);
  }
  // Whether the tensor has a gradient.
  __device__ bool steps(int tensor) const { return packed[tensor] % 8 != 0; }
  __device__ Phase phase(int tensor) const { return Phase(int(packed[tensor] % 8) - 1); }
  // Whether the step of the tensor is one that SgdRule and the kernels call plain.
  __device__ bool plain(int tensor) const { return packed[tensor] / 8 % 2 != 0; }
  __device__ const ParamGroup<A>& of(int tensor) const { return param_groups[packed[tensor] / 16]; }
};

template <typename T, int bytes>
using StepTableOf = StepTable<Compute<T>, bytes>;

}  // namespace cges::cuda
