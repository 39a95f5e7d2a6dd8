// The update rule of torch.optim.SGD, for host and device. Another rule is another file like this one (adamw.h);
// the prox (shrinkage.h) knows none.
#pragma once
#include "common/arithmetic.h"
#include "common/phase.h"

namespace cges {

template <typename T>
struct SgdScalars {
  T lr, momentum, one_minus_dampening, weight_decay, grad_sign;  // the last is -1 to maximize

  template <typename U>
  CGES_FN SgdScalars<U> as() const {
    return {U(lr), U(momentum), U(one_minus_dampening), U(weight_decay), U(grad_sign)};
  }
};

// z, and the new buffer in `buf`. Where the first three are constants, the compiler leaves no trace of them;
// where not, selections cost less than branches.
template <typename T>
CGES_FN T sgd_update(Phase phase, bool nesterov, bool decay, T w, T grad, T& buf, const SgdScalars<T>& h) {
  const T signed_grad = h.grad_sign * grad, decayed = multiply_add(h.weight_decay, w, signed_grad);
  const T g = decay ? decayed : signed_grad;
  const T running = multiply_add(h.momentum, buf, h.one_minus_dampening * g);
  buf = phase == Phase::running ? running : g;
  const T ahead = multiply_add(h.momentum, buf, g);
  const T step = phase == Phase::stateless ? g : nesterov ? ahead : buf;
  return phase == Phase::prox_alone ? w : multiply_add(-h.lr, step, w);
}

}  // namespace cges
