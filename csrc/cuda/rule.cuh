// What a kernel is told of a param group, and the update rule: all that it knows of the optimizer around it.
#pragma once
#include "cuda/executor.h"
#include "cuda/memory.cuh"

namespace cges::cuda {

// A param group's hyperparameters in the compute type.
template <typename A>
struct Coefficients {
  SgdScalars<A> sgd;
  Thresholds<A> thresholds;
  bool nesterov, exact;
  Freeze freeze;
  DeviceScalars device;

  // With all that lies in device memory read, and gradients divided by `grad_scale`, if there is one.
  __device__ Coefficients resolved(const float* grad_scale) const {
    Coefficients h = *this;
    if (grad_scale != nullptr) h.sgd.grad_sign /= A(*grad_scale);
    if (!device.any()) return h;
    if (device.lr != nullptr) h.sgd.lr = A(*device.lr);
    h.thresholds.a = h.sgd.lr * (device.a != nullptr ? A(*device.a) : thresholds.a);
    h.thresholds.b = h.sgd.lr * (device.b != nullptr ? A(*device.b) : thresholds.b);
    h.thresholds.c = h.sgd.lr * (device.c != nullptr ? A(*device.c) : thresholds.c);
    return h;
  }
  __device__ bool need_sums() const { return thresholds.need_norms() || freeze == Freeze::group; }
};

// SGD as an update rule: how many tensors it keeps beside a weight (its states), which of them a step reads and
// writes, and z. Kernels ask no more of a rule, so another (AdamW: two states) is another of these.
// `plain`: what nearly everybody uses, known when this is compiled.
template <typename A, bool plain>
struct SgdRule {
  static constexpr int kStates = 1;
  SgdScalars<A> scalars;
  Momentum momentum_;
  bool nesterov_;

  __device__ SgdRule(const Coefficients<A>& h, Momentum momentum)
      : scalars(h.sgd), momentum_(momentum), nesterov_(h.nesterov) {}

  __device__ Momentum momentum() const { return plain ? Momentum::running : momentum_; }
  __device__ bool reads_grad() const { return momentum() != Momentum::no_grad; }
  __device__ bool reads_states() const { return momentum() == Momentum::running; }
  __device__ bool writes_states() const { return momentum() >= Momentum::first; }

  // z; the states become the new ones.
  __device__ A update(A w, A grad, A (&states)[kStates]) const {
    const bool nesterov = !plain && nesterov_, decay = scalars.weight_decay != A(0);
    return sgd_update(momentum(), nesterov, decay, w, grad, states[0], scalars);
  }
};

template <typename T>
__device__ __forceinline__ T* state_of(const TensorArgs& args, int) {
  return static_cast<T*>(args.buf);
}

}  // namespace cges::cuda
