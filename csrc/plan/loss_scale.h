// The numbers that torch.amp.GradScaler hands to an optimizer that divides by the loss scale itself.
// bindings.cpp makes them from the optimizer's grad_scale and found_inf, and the executors read them.
#pragma once
#include <ATen/ATen.h>

#include "common/step.h"
#include "common/text.h"

namespace cges {

// The numbers of a LossScale (common/step.h) as tensors of one element, undefined if there are none.
struct ScalerTensors {
  at::Tensor grad_scale, found_inf;

  // The same as floats on `device`.
  ScalerTensors on(c10::Device device) const {
    const auto moved = [&](const at::Tensor& x) {
      if (!x.defined()) return x;
      TORCH_CHECK_VALUE(x.numel() == 1,
                        text("grad_scale and found_inf: expected one element, got ", x.numel()).c_str());
      return x.detach().to(device, at::kFloat, /*non_blocking=*/true);
    };
    return {moved(grad_scale), moved(found_inf)};
  }

  // Addresses in the tensors that on() returns; valid as long as these live.
  LossScale addresses() const {
    return {grad_scale.defined() ? grad_scale.const_data_ptr<float>() : nullptr,
            found_inf.defined() ? found_inf.const_data_ptr<float>() : nullptr};
  }

  // Whether the step must change nothing. The host waits for the device to say so.
  bool overflowed() const { return found_inf.defined() && found_inf.item<double>() != 0; }
};

}  // namespace cges
