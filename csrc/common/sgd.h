// The update rule of torch.optim.SGD, for host and device. cpu/rows.inc and cuda/rule.cuh call sgd_update for
// each element. Each rule has a file like this one (the other is adamw.h); the prox in shrinkage.h depends on
// none of them.
#pragma once
#include "common/arithmetic.h"
#include "common/phase.h"

namespace cges {

// The options of one param group. Gradients are multiplied by grad_sign: -1 to maximize. A loss scale is
// divided into it as well (Hyperparameters::unscale).
template <typename T>
struct SgdScalars {
  T lr, momentum, one_minus_dampening, weight_decay, grad_sign;

  template <typename U>
  CGES_FN SgdScalars<U> as() const {
    return {U(lr), U(momentum), U(one_minus_dampening), U(weight_decay), U(grad_sign)};
  }
};

// Returns z and replaces the momentum buffer `buf` by the new one. Callers pass phase, nesterov and decay as
// constants where they can, and the compiler then drops what is not needed. Where they are not constants,
// these selections cost less than branches would.
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
