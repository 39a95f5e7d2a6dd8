// What torch.amp.GradScaler hands to an optimizer that unscales by itself.
#pragma once
#include <ATen/ATen.h>

#include "common/step.h"
#include "common/text.h"

namespace cges {

// LossScale's numbers as tensors of one float, undefined where there are none.
struct ScalerTensors {
  at::Tensor grad_scale, found_inf;

  ScalerTensors on(c10::Device device) const {
    const auto moved = [&](const at::Tensor& x) {
      if (!x.defined()) return x;
      TORCH_CHECK_VALUE(x.numel() == 1,
                        text("grad_scale and found_inf: expected one element, got ", x.numel()).c_str());
      return x.detach().to(device, at::kFloat, /*non_blocking=*/true);
    };
    return {moved(grad_scale), moved(found_inf)};
  }

  // Valid as long as these tensors, once they are where they are needed.
  LossScale addresses() const {
    return {grad_scale.defined() ? grad_scale.const_data_ptr<float>() : nullptr,
            found_inf.defined() ? found_inf.const_data_ptr<float>() : nullptr};
  }

  // Whether nothing is to change; the host waits for the answer.
  bool overflowed() const { return found_inf.defined() && found_inf.item<double>() != 0; }
};

}  // namespace cges
