// The update rule of torch.optim.AdamW, or of Adam, for host and device; as sgd.h is SGD's.
#pragma once
#include "common/arithmetic.h"
#include "common/phase.h"

namespace cges {

// A param group's.
struct AdamwOptions {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0,
         grad_sign = 1;  // the last is -1 to maximize
  bool decoupled = true;
};

// A tensor's, as its steps are counted: torch divides both moments by how far they have come,
//   lr * (exp_avg / c1) / (sqrt(exp_avg_sq / c2) + eps),  c1 = 1 - beta1^count,  c2 = 1 - beta2^count,
// which is step_size * exp_avg / (sqrt(exp_avg_sq) + eps') with these two numbers.
template <typename T>
struct AdamwCorrected {
  T step_size, eps;
};

CGES_FN AdamwCorrected<double> correct(const AdamwOptions& h, double lr, double count) {
  const double root = std::sqrt(1 - std::pow(h.beta2, count));
  return {lr * root / (1 - std::pow(h.beta1, count)), h.eps * root};
}

template <typename T>
struct AdamwScalars {
  // `kept` is what decoupled weight decay leaves of a weight, `decay` what coupled decay adds to its gradient
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

// start + weight * (end - start), from the end that is nearer, as torch.lerp has it.
template <typename T>
CGES_FN T lerp(T start, T end, T weight) {
  const T apart = end - start;
  return weight < T(0.5) ? multiply_add(weight, apart, start) : multiply_add(weight - T(1), apart, end);
}

// z, and the new states in their places. Nothing is read of states that have not begun.
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
