// What a kernel is told of a param group, and the update rule: all that it knows of the optimizer around it.
#pragma once
#include "cuda/executor.h"
#include "cuda/memory.cuh"

namespace cges::cuda {

// A param group's hyperparameters in the compute type. Where some lie in device memory, the thresholds are
// bare coefficients until `resolved`.
template <typename A>
struct ParamGroup {
  SgdScalars<A> sgd;
  Thresholds<A> thresholds;
  bool nesterov, exact;
  Freeze freeze;
  DeviceScalars device;

  // With all that lies in device memory read, and gradients divided by `grad_scale`, if there is one.
  __device__ ParamGroup resolved(const float* grad_scale) const {
    ParamGroup h = *this;
    if (grad_scale != nullptr) h.sgd.grad_sign /= A(*grad_scale);
    if (!device.any()) return h;
    h.sgd.lr = read(device.lr, sgd.lr);
    h.thresholds = form_thresholds(
        h.sgd.lr, Coefficients<A>{read(device.group_lasso, thresholds.a),
                                  read(device.exclusive_lasso, thresholds.b), read(device.l1, thresholds.c)});
    return h;
  }
  static __device__ A read(const float* address, A otherwise) {
    return address != nullptr ? A(*address) : otherwise;
  }
  __device__ bool need_sums() const { return thresholds.need_norms() || freeze == Freeze::group; }
};

// SGD as an update rule: how many states it keeps, what a step reads and writes, and z. The kernels for rows
// and tiles ask no more of a rule, so another (AdamW: two states) is another of these; those for larger
// groups call sgd_update themselves. `plain`: what nearly everybody uses, known when this is compiled.
template <typename A, bool plain>
struct SgdRule {
  static constexpr int kStates = kSgdStates;
  SgdScalars<A> scalars;
  Phase phase_;
  bool nesterov_;

  __device__ SgdRule(const ParamGroup<A>& h, Phase phase)
      : scalars(h.sgd), phase_(phase), nesterov_(h.nesterov) {}
  template <bool known>
  __device__ explicit SgdRule(
      const SgdRule<A, known>& x)  // where it turns out to be plain, or is not known to be
      : scalars(x.scalars), phase_(x.phase()), nesterov_(x.nesterov_) {}

  __device__ Phase phase() const { return plain ? Phase::running : phase_; }
  __device__ bool reads_grad() const { return cges::reads_grad(phase()); }
  __device__ bool reads_states() const { return reads_state(phase()); }
  __device__ bool writes_states() const { return writes_state(phase()); }

  // z; the states become the new ones.
  __device__ A update(A w, A grad, A (&states)[kStates]) const {
    const bool nesterov = !plain && nesterov_, decay = scalars.weight_decay != A(0);
    return sgd_update(phase(), nesterov, decay, w, grad, states[0], scalars);
  }
};

template <typename T>
__device__ __forceinline__ T* state_of(const TensorAddresses& tensor, int) {
  return static_cast<T*>(tensor.buf);
}

// The rule on neighbouring elements: w becomes z, and the states the new ones. Both are zeros where `dead`,
// or where the weight is zero and `freezes` says that it stays so.
template <typename T, int n, typename Rule>
__device__ __forceinline__ void update_pack(const Rule& rule, bool freezes, bool dead, Compute<T> (&w)[n],
                                            const Pack<T, n>& grad, Pack<T, n> (&states)[Rule::kStates]) {
  using A = Compute<T>;
  A now[Rule::kStates][n];
#pragma unroll
  for (int v = 0; v < n; ++v) {
    const A weight = w[v];
    A state[Rule::kStates];
    for (int s = 0; s < Rule::kStates; ++s) state[s] = A(states[s].x[v]);
    const A z = rule.update(weight, A(grad.x[v]), state);
    const bool frozen = dead || (freezes && weight == A(0));
    w[v] = frozen ? A(0) : z;
    for (int s = 0; s < Rule::kStates; ++s) now[s][v] = frozen ? A(0) : state[s];
  }
  for (int s = 0; s < Rule::kStates; ++s) states[s] = round_pack<false, T>(now[s]);
}

}  // namespace cges::cuda
