// Lion (Chen et al. 2023) as an update rule of the CPU executor's loops, and a step of some rows with it. The
// loops need no more of a rule; see rows.inc.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/rows.h"

namespace cges::cpu::baseline {
constexpr int kVectorBytes = 16;
constexpr int kHalves = 1;
CGES_FN void widen_halves(const c10::Half* from, float* to) { *to = *from; }
CGES_FN void narrow_halves(const float* from, c10::Half* to) { *to = *from; }
#include "cpu/rows.inc"

template <typename A, Phase phase_>
struct Lion {
  static constexpr int kStates = 1;
  static constexpr Phase phase = phase_;
  A lr, kept, weight1, weight2, grad_sign;

  CGES_FN A operator()(A w, A grad, A (&states)[kStates]) const {
    const A g = grad_sign * grad, ahead = lerp(states[0], g, weight1);
    states[0] = lerp(states[0], g, weight2);
    return kept * w - (ahead == A(0) ? A(0) : std::copysign(lr, ahead));
  }
};

template <Phase phase, typename T>
void step(const float* h, const Rows& m, const T* w, const T* grad, T* exp_avg, float* z) {
  const Places<T> at{w, grad, {exp_avg}, {exp_avg}, m.stride};
  update_rows<T>(Lion<float, phase>{h[0], h[1], h[2], h[3], h[4]}, m, at, z);
}

}  // namespace cges::cpu::baseline

using namespace cges;
using cpu::baseline::step;

// Replaces exp_avg, and writes z; `numbers` are those of Lion, in its order.
template <typename T>
static void lion_step(bool first, const float* numbers, const int64_t* shape, const T* w, const T* grad,
                      T* exp_avg, float* z) {
  const cpu::Rows m{shape[0], shape[1], shape[2], shape[3]};
  first ? step<Phase::first>(numbers, m, w, grad, exp_avg, z)
        : step<Phase::running>(numbers, m, w, grad, exp_avg, z);
}
extern "C" void lion_float32(bool first, const float* numbers, const int64_t* shape, const float* w,
                             const float* grad, float* exp_avg, float* z) {
  lion_step(first, numbers, shape, w, grad, exp_avg, z);
}
extern "C" void lion_float16(bool first, const float* numbers, const int64_t* shape, const c10::Half* w,
                             const c10::Half* grad, c10::Half* exp_avg, float* z) {
  lion_step(first, numbers, shape, w, grad, exp_avg, z);
}
