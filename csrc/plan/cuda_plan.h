// The CUDA executor over torch's tensors: their tables in device memory, built once, and the launches of a
// step.
#pragma once
#include <ATen/ATen.h>

#include <memory>
#include <utility>
#include <vector>

#include "cuda/executor.h"
#include "plan/loss_scale.h"

namespace cges {

// What an executor knows of a tensor for good; addresses come with each step.
struct StepTensor {
  c10::Device device;
  c10::ScalarType dtype;
  Layout layout;
  bool has_groups;
  int64_t group;  // whose hyperparameters it takes

  bool operator==(const StepTensor& x) const {
    return device == x.device && dtype == x.dtype && has_groups == x.has_groups && group == x.group &&
           layout == x.layout;
  }
};

class CudaPlan {
 public:
  // Cuts all tensors, and makes sure that every launch of a step can be made.
  explicit CudaPlan(const std::vector<StepTensor>& tensors);

  // One launch per device, dtype and path, on the current streams. table[i] belongs to tensors[i]. No host
  // sync and no allocation, so a step can be captured in a graph.
  void step(const std::vector<StepRow>& table, const std::vector<Hyperparameters>& hyperparameters,
            const ScalerTensors& scaler);

 private:
  // Tensors of one device and dtype that fit the arguments of one launch.
  struct Batch {
    c10::Device device;
    cuda::DType dtype;
    cuda::Device description;
    cuda::Work work;
    std::vector<size_t> tensors;  // indices into the table
    std::vector<int32_t> rows;    // of `groups`, one for each tensor
    std::vector<int64_t> groups;
    at::Tensor strips, items, scratch, counters;
    c10::StreamId stream;  // that their memory is known to be used on
  };

  static std::vector<Batch> batches_of(const std::vector<StepTensor>& tensors);
  static void put_on_device(Batch& batch);
  static void* stream_of(Batch& batch);

  std::vector<Batch> batches_;
};

// A plan for these tensors on the current streams, kept from one call to the next: for those who call with the
// same tensors again and again. `pin`: for good, as a graph that is being captured will come back to it.
CudaPlan& kept_cuda_plan(const std::vector<StepTensor>& tensors, bool pin);
void forget_kept_cuda_plans();

}  // namespace cges
