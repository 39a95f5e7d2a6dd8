// Lion (Chen et al. 2023) as an update rule of the CUDA kernels. They need no more of a rule; see rule.cuh.
#include "cuda/kernels.cuh"

namespace cges::cuda {
namespace {

struct Lion {
  static constexpr int kStates = 1, kMostTensors = 1000, kFewArguments = 5120;

  template <typename A>
  struct Group {
    A lr_, kept, weight1, weight2, grad_sign;
    __device__ A lr() const { return lr_; }
    __device__ void take_lr(A lr) { lr_ = lr; }
    __device__ void unscale(A scale) { grad_sign /= scale; }
  };
  template <typename A>
  struct Own {
    static constexpr bool kNone = true;
  };
  template <typename A, Known known>
  struct Update {
    Group<A> h;
    Phase phase_;

    __device__ Update(const Group<A>& h, const Own<A>&, Phase phase) : h(h), phase_(phase) {}
    template <Known other>
    __device__ explicit Update(const Update<A, other>& x) : h(x.h), phase_(x.phase()) {}
    __device__ Phase phase() const { return known == Known::nothing ? phase_ : Phase::running; }
    __device__ A operator()(A w, A grad, A (&states)[kStates]) const {
      const A g = h.grad_sign * grad, before = phase() == Phase::running ? states[0] : A(0);
      const A ahead = lerp(before, g, h.weight1);
      states[0] = lerp(before, g, h.weight2);
      return phase() == Phase::prox_alone ? w : h.kept * w - (ahead == A(0) ? A(0) : copysign(h.lr_, ahead));
    }
  };
};

using Table = StepTableOf<float, Lion, true>;
static_assert(sizeof(Table) <= Table::kBytes && Table::kParamGroups > 0);
[[maybe_unused]] auto* const rows = step_rows<float, Lion, true, true>;
[[maybe_unused]] auto* const tiles = step_tiles<float, Lion, true, false>;
[[maybe_unused]] auto* const chunks = step_chunks<float, Lion, true>;

}  // namespace
}  // namespace cges::cuda
