// The update rule of torch.optim.AdamW, and of Adam, whose weight decay is coupled, for host and device.
// cpu/rows.inc and cuda/rule.cuh call adamw_update for each element. sgd.h is the same for SGD.
#pragma once
#include "common/arithmetic.h"
#include "common/phase.h"

namespace cges {

// The options of one param group. Gradients are multiplied by grad_sign: -1 to maximize. A loss scale is
// divided into it as well (Hyperparameters::unscale).
struct AdamwOptions {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0, grad_sign = 1;
  bool decoupled = true;
};

// Both moments start at zero, so torch divides each by the total weight of the gradients in it (c1 and c2).
// The step of a tensor that has made `count` steps, this one included, is
//   lr * (exp_avg / c1) / (sqrt(exp_avg_sq / c2) + eps),  c1 = 1 - beta1^count,  c2 = 1 - beta2^count
// With sqrt(c2) taken out of the denominator that is
//   step_size * exp_avg / (sqrt(exp_avg_sq) + eps')
//   step_size = lr * sqrt(c2) / c1,  eps' = eps * sqrt(c2)
// This struct holds step_size and eps'. Each tensor has its own two, because each counts its own steps.
template <typename T>
struct AdamwCorrected {
  T step_size, eps;
};

CGES_FN AdamwCorrected<double> correct(const AdamwOptions& h, double lr, double count) {
  const double root = std::sqrt(1 - std::pow(h.beta2, count));
  return {lr * root / (1 - std::pow(h.beta1, count)), h.eps * root};
}

// The numbers that the update of one element needs. All but `corrected` are the same for a whole param group.
template <typename T>
struct AdamwScalars {
  // A weight is multiplied by `kept`, which is 1 unless weight decay is decoupled. `decay` times the weight
  // is added to the gradient; it is 0 unless weight decay is coupled. `weight` is 1 - beta1.
  T kept, decay, weight, beta2, one_minus_beta2, grad_sign;
  AdamwCorrected<T> corrected;

  AdamwScalars() = default;
  CGES_FN AdamwScalars(const AdamwOptions& h, double lr, const AdamwCorrected<double>& x)
      : kept(T(h.decoupled ? 1 - lr * h.weight_decay : 1)),
        decay(T(h.decoupled ? 0 : h.weight_decay)),
        weight(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        one_minus_beta2(T(1 - h.beta2)),
        grad_sign(T(h.grad_sign)),
        corrected{T(x.step_size), T(x.eps)} {}
};

// start + weight * (end - start). As in torch.lerp, the sum starts from whichever end is nearer.
template <typename T>
CGES_FN T lerp(T start, T end, T weight) {
  const T apart = end - start;
  return weight < T(0.5) ? multiply_add(weight, apart, start) : multiply_add(weight - T(1), apart, end);
}

// Returns z and replaces both states by the new ones. Their old values count only in the phase `running`.
// In the phase `prox_alone` z is w, and the caller does not store the states.
template <typename T>
CGES_FN T adamw_update(Phase phase, bool decays, T w, T grad, T& exp_avg, T& exp_avg_sq,
                       const AdamwScalars<T>& h) {
  const T signed_grad = h.grad_sign * grad, decayed = multiply_add(h.decay, w, signed_grad);
  const T g = decays ? decayed : signed_grad;
  exp_avg = lerp(phase == Phase::running ? exp_avg : T(0), g, h.weight);
  exp_avg_sq = multiply_add(h.one_minus_beta2 * g, g, phase == Phase::running ? h.beta2 * exp_avg_sq : T(0));
  const T step = h.corrected.step_size * exp_avg / (std::sqrt(exp_avg_sq) + h.corrected.eps);
  return phase == Phase::prox_alone ? w : multiply_add(h.kept, w, -step);
}

}  // namespace cges
