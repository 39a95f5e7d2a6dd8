// Lion (Chen et al. 2023) as an update rule of the CUDA kernels, and a step with it on the emulator. They need
// no more of a rule than the struct; see rule.cuh.
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
[[maybe_unused]] auto* const tiles = step_tiles<float, Lion, true, false>;
[[maybe_unused]] auto* const chunks = step_chunks<float, Lion, true>;

}  // namespace

// A step of a matrix whose rows are groups, by step_rows, with Lion's numbers `h` and thresholds (a, b, c).
extern "C" void lion_step(const float* h, const float* thresholds, bool exact, bool first, int rows,
                          int columns, float* w, float* grad, float* exp_avg) {
  const TensorShape shape{Layout{rows, columns, 1, 1}, true, DType::f32, -1, 0};
  const Work work = cut({shape}, Rule::sgd, DType::f32, Device{});
  Table table{};
  table.strips = work.strips.data();
  table.tensors[0] = {w, grad, {exp_avg}};
  table.set(0, 0, false, false, first ? Phase::first : Phase::running);
  table.param_groups[0].rule = {h[0], h[1], h[2], h[3], h[4]};
  table.param_groups[0].thresholds = {thresholds[0], thresholds[1], thresholds[2]};
  table.param_groups[0].exact = exact;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(work.strips.size()));
  config.blockDim = dim3(unsigned(work.strip_threads));
  config.dynamicSmemBytes = size_t(kRowsShared<float>);
  cudaLaunchKernelEx(&config, step_rows<float, Lion, true, false>, table);
}

}  // namespace cges::cuda
