// The arguments of a kernel: one StepTable, by value, in each launch. launch.cu fills it in. The geometry,
// which stays the same from step to step, lies in device memory instead.
#pragma once
#include "cuda/rule.cuh"

namespace cges::cuda {

constexpr int kMostArguments = 32764;  // the most bytes of arguments, with CUDA >= 12.1 and from sm_70 on
// A launch with this many bytes takes some 3 us longer than one with the few for kFewTensors, which hold the
// 161 tensors of ResNet-50. So there are two sizes of StepTable.
constexpr int kFewTensors = 176;

// The part of the arguments that concerns the whole launch.
struct StepHead {
  const Strip* strips;
  const Tile* tiles;
  const Item* chunks;
  unsigned char* scratch;
  int32_t* counters;
  int32_t tile_count, tiles_in_parts, slots, z_passes;  // see Work
  int32_t tickets, stages, panels;
  void* corrected;  // the Own of each tensor that correct_steps writes; null if the host knows all numbers
  uint8_t* held;    // see Step
  LossScale loss_scale;

  // Whether the step must change nothing. All blocks find the same.
  __device__ bool overflowed() const {
    return loss_scale.found_inf != nullptr && *loss_scale.found_inf != 0.0f;
  }
};

// All of the arguments: the head, and the addresses and hyperparameters of the tensors. `few` is the small
// size.
template <typename A, typename UpdateRule, bool few>
struct StepTable : StepHead {
  using Rule = UpdateRule;
  static constexpr int kBytes = few ? Rule::kFewArguments : kMostArguments;
  static constexpr int kTensors = few ? kFewTensors : Rule::kMostTensors, kStates = Rule::kStates;
  using Own = typename Rule::template Own<A>;
  using Group = ParamGroup<A, Rule>;
  static constexpr int kOwn = Own::kNone ? 1 : kTensors;
  static constexpr int kParamGroups =
      int((kBytes - sizeof(StepHead) - 24 - kTensors * (sizeof(TensorAddresses<kStates>) + 2) -
           kOwn * sizeof(Own)) /
          sizeof(Group));

  TensorAddresses<kStates> tensors[kTensors];
  Own owns[kOwn];
  uint16_t packed[kTensors];  // index of the param group * 32 + counts_here * 16 + plain * 8 + phase + 1
  Group param_groups[kParamGroups];

  void set(int tensor, int param_group, bool counts_here, bool plain, Phase phase) {
    packed[tensor] = uint16_t(param_group * 32 + counts_here * 16 + plain * 8 + int(phase) + 1);
  }
  // Whether the tensor is not skipped.
  __device__ bool steps(int tensor) const { return packed[tensor] % 8 != 0; }
  __device__ Phase phase(int tensor) const { return Phase(int(packed[tensor] % 8) - 1); }
  // Whether the step of the tensor is plain, see Known in rule.cuh.
  __device__ bool plain(int tensor) const { return packed[tensor] / 8 % 2 != 0; }
  // Whether the tensor's count of steps lies on the device.
  __device__ bool counts_here(int tensor) const { return packed[tensor] / 16 % 2 != 0; }
  __device__ const Group& of(int tensor) const { return param_groups[packed[tensor] / 32]; }
  __device__ Own own(int tensor) const {
    if constexpr (Own::kNone) return {};
    return corrected != nullptr ? static_cast<const Own*>(corrected)[tensor] : owns[tensor];
  }
};

template <typename T, typename Rule, bool few>
using StepTableOf = StepTable<Compute<T>, Rule, few>;

}  // namespace cges::cuda
