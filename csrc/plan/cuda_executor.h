// The CUDA executor for torch's tensors. Once, it cuts them into work items and puts these in device memory.
// In each step it launches the kernels through cuda/executor.h, which knows no torch.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "cuda/executor.h"
#include "plan/executor.h"
#include "plan/held.h"

namespace cges {

class CudaExecutor : public Executor {
 public:
  // Cuts all tensors and loads the kernels. Throws where the device or driver cannot run them.
  CudaExecutor(Rule rule, std::vector<TensorShape> tensors);

  // One launch per device, dtype and path, on the current streams. It neither waits for the device nor
  // allocates memory, so that a step can be captured in a graph.
  bool step(const std::vector<TensorInStep>& tensors, const std::vector<Hyperparameters>& hyperparameters,
            const ScalerTensors& scaler) override;

 private:
  // The groups of a tensor that lie in strips, as a range of DeviceTables::held.
  struct Held {
    HeldList list{};
    int64_t begin = 0, groups = 0;
  };

  // Tensors of one device and dtype whose addresses and hyperparameters fit the arguments of one launch, and
  // their tables in device memory.
  struct DeviceTables {
    c10::Device device;
    DType dtype;
    cuda::Device description;
    cuda::Work work{};
    std::vector<size_t> tensors{};  // the indices of its tensors among those of the step
    std::vector<int32_t> places{};  // for each of `tensors`, the place of its param group in `param_groups`
    std::vector<int64_t> param_groups{};  // indices into the hyperparameters of the step
    std::vector<Held> lists{};            // for each of `tensors`
    at::Tensor strips{}, tiles{}, chunks{}, scratch{}, counters{}, corrected{}, held{};
    c10::StreamId stream = 0;  // the stream on which the allocator last heard that their memory is used
  };

  void share_out(const std::vector<TensorShape>& tensors);
  void put_on_device(DeviceTables& tables) const;
  static void drop_lists(DeviceTables& tables, const std::vector<TensorInStep>& tensors,
                         const std::vector<Hyperparameters>& hyperparameters);
  static void* stream_of(DeviceTables& tables);

  const Rule rule_;
  std::vector<DeviceTables> all_;
};

}  // namespace cges
