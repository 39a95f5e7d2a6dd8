// The CUDA executor over torch's tensors: their tables in device memory, built once, and the launches of a
// step.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "cuda/executor.h"
#include "plan/executor.h"

namespace cges {

class CudaExecutor : public Executor {
 public:
  // Cuts all tensors, and makes sure that every launch of a step can be made.
  CudaExecutor(Rule rule, std::vector<TensorShape> tensors);

  // One launch per device, dtype and path, on the current streams. No host sync and no allocation, so a step can
  // be captured in a graph.
  bool step(const std::vector<TensorInStep>& tensors, const std::vector<Hyperparameters>& hyperparameters,
            const ScalerTensors& scaler) override;

 private:
  // Tensors of one device and dtype that fit the arguments of one launch, and their tables on the device.
  struct DeviceTables {
    c10::Device device;
    DType dtype;
    cuda::Device description;
    cuda::Work work{};
    std::vector<size_t> tensors{};        // indices into all
    std::vector<int32_t> places{};        // of each tensor, the place of its param group in `param_groups`
    std::vector<int64_t> param_groups{};  // indices into all
    at::Tensor strips{}, tiles{}, chunks{}, scratch{}, counters{}, corrected{};
    c10::StreamId stream = 0;  // that their memory is known to be used on
  };

  void share_out(const std::vector<TensorShape>& tensors);
  void put_on_device(DeviceTables& tables) const;
  static void* stream_of(DeviceTables& tables);

  const Rule rule_;
  std::vector<DeviceTables> all_;
};

}  // namespace cges
