// The update rules as kernels see them, and what a kernel is told of a param group: all that it knows of the
// optimizer around it.
#pragma once
#include "cuda/executor.h"
#include "cuda/memory.cuh"

namespace cges::cuda {

// What is known of a step when a kernel is compiled. Plain is what nearly everybody uses: the phase is running,
// and nothing is asked for that only few ask for.
enum class Known { nothing, running, plain };

// A rule for kernels is a struct of these:
//   kStates         the states that it keeps
//   kMostTensors    that the largest arguments hold
//   kFewArguments   bytes of arguments that hold kFewTensors
//   Group<A>        a param group's numbers: lr(), take_lr(lr), unscale(grad_scale)
//   Own<A>          a tensor's own numbers
//   correct_here(group, own, ...)   Own, where some of what it takes lies on the device
//   Update<A, known>(group, own, phase)   the update of one element

struct Sgd {
  static constexpr int kStates = 1, kMostTensors = 1000, kFewArguments = 5120;

  template <typename A>
  struct Group {
    SgdScalars<A> scalars;
    bool nesterov;

    explicit Group(const Hyperparameters& h) : scalars(h.sgd.as<A>()), nesterov(h.nesterov) {}
    Group() = default;
    __device__ A lr() const { return scalars.lr; }
    __device__ void take_lr(A lr) { scalars.lr = lr; }
    __device__ void unscale(A scale) { scalars.grad_sign /= scale; }
  };

  template <typename A>
  struct Own {
    static constexpr bool kNone = true;
  };

  template <typename A, Known known>
  struct Update {
    SgdScalars<A> scalars;
    Phase phase_;
    bool nesterov_;

    __device__ Update(const Group<A>& h, const Own<A>&, Phase phase)
        : scalars(h.scalars), phase_(phase), nesterov_(h.nesterov) {}
    template <Known other>
    __device__ explicit Update(
        const Update<A, other>& x)  // where it turns out to be plain, or is not known to be
        : scalars(x.scalars), phase_(x.phase()), nesterov_(x.nesterov_) {}

    __device__ Phase phase() const { return known == Known::nothing ? phase_ : Phase::running; }

    // z; the states become the new ones.
    __device__ A operator()(A w, A grad, A (&states)[kStates]) const {
      const bool nesterov = known != Known::plain && nesterov_, decay = scalars.weight_decay != A(0);
      return sgd_update(phase(), nesterov, decay, w, grad, states[0], scalars);
    }
  };
};

struct Adamw {
  static constexpr int kStates = 2, kMostTensors = 640, kFewArguments = 9728;

  template <typename A>
  struct Group {
    AdamwScalars<A> scalars;
    A lr_, eps, decoupled_decay;

    explicit Group(const Hyperparameters& h)
        : scalars(h.adamw, h.adamw.lr, {}),
          lr_(A(h.adamw.lr)),
          eps(A(h.adamw.eps)),
          decoupled_decay(A(h.adamw.decoupled ? h.adamw.weight_decay : 0)) {}
    Group() = default;
    __device__ A lr() const { return lr_; }
    __device__ void take_lr(A lr) {
      lr_ = lr;
      scalars.kept = A(1) - lr * decoupled_decay;
    }
    __device__ void unscale(A scale) { scalars.grad_sign /= scale; }
  };

  // By how many steps it has made: its corrected step size and eps, the first of lr = 1 where lr lies on the
  // device; or, where the count does, its address.
  template <typename A>
  struct Own {
    static constexpr bool kNone = false;
    AdamwCorrected<A> corrected;

    Own() = default;
    Own(const Hyperparameters& h, const TensorInStep& tensor) {
      if (tensor.count_on_device != nullptr) {
        std::memcpy(this, &tensor.count_on_device, sizeof(float*));
        return;
      }
      const auto x = correct(h.adamw, h.device.lr != nullptr ? 1 : h.adamw.lr, tensor.count);
      corrected = {A(x.step_size), A(x.eps)};
    }
    __device__ float* count() const {
      float* address;
      std::memcpy(&address, this, sizeof(address));
      return address;
    }
  };

  // Own once more, of which the count or lr lies here; a step is counted.
  template <typename A>
  static __device__ Own<A> correct_here(const Group<A>& h, Own<A> own, bool counts_here, bool lr_here) {
    if (!counts_here) {
      if (lr_here) own.corrected.step_size *= h.lr();
      return own;
    }
    const double count = ++*own.count();
    AdamwOptions options;
    options.beta1 = 1 - double(h.scalars.weight);
    options.beta2 = 1 - double(h.scalars.one_minus_beta2);
    options.eps = h.eps;
    const AdamwCorrected<double> x = correct(options, h.lr(), count);
    own.corrected = {A(x.step_size), A(x.eps)};
    return own;
  }

  template <typename A, Known known>
  struct Update {
    AdamwScalars<A> scalars;
    Phase phase_;

    __device__ Update(const Group<A>& h, const Own<A>& own, Phase phase) : scalars(h.scalars), phase_(phase) {
      scalars.corrected = own.corrected;
    }
    template <Known other>
    __device__ explicit Update(const Update<A, other>& x) : scalars(x.scalars), phase_(x.phase()) {}

    __device__ Phase phase() const { return known == Known::nothing ? phase_ : Phase::running; }
    __device__ A operator()(A w, A grad, A (&states)[kStates]) const {
      const bool decays = scalars.decay != A(0);
      return adamw_update(phase(), decays, w, grad, states[0], states[1], scalars);
    }
  };
};
static_assert(sizeof(Adamw::Own<float>) == sizeof(float*));

// A param group's hyperparameters in the compute type. Where some lie in device memory, the thresholds are
// bare coefficients until `resolved`.
template <typename A, typename Rule>
struct ParamGroup {
  typename Rule::template Group<A> rule;
  Thresholds<A> thresholds;
  bool exact;
  Freeze freeze;
  DeviceScalars device;

  // With all that lies in device memory read, and gradients divided by `grad_scale`, if there is one.
  __device__ ParamGroup resolved(const float* grad_scale) const {
    ParamGroup h = *this;
    if (grad_scale != nullptr) h.rule.unscale(A(*grad_scale));
    if (!device.any()) return h;
    h.rule.take_lr(read(device.lr, rule.lr()));
    h.thresholds = form_thresholds(h.rule.lr(), Coefficients<A>{read(device.group_lasso, thresholds.a),
                                                                read(device.exclusive_lasso, thresholds.b),
                                                                read(device.l1, thresholds.c)});
    return h;
  }
  static __device__ A read(const float* address, A otherwise) {
    return address != nullptr ? A(*address) : otherwise;
  }
  __device__ bool need_sums() const { return thresholds.need_norms() || freeze == Freeze::group; }
};

// Where a tensor lies in one step; what it lacks lies where w does: an address to count from, never read.
template <int kStates>
struct TensorAddresses {
  void* w;
  const void* grad;
  void* states[kStates];

  // A bit of any of the addresses.
  __device__ uintptr_t bits() const {
    uintptr_t all = reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(grad);
    for (void* const state : states) all |= reinterpret_cast<uintptr_t>(state);
    return all;
  }
};

// The update of neighbouring elements: w becomes z, and the states the new ones. Both are zeros where `dead`,
// or where the weight is zero and `freezes` says that it stays so.
template <typename T, int n, int kStates, typename Update>
__device__ __forceinline__ void update_pack(const Update& update, bool freezes, bool dead, Compute<T> (&w)[n],
                                            const Pack<T, n>& grad, Pack<T, n> (&states)[kStates]) {
  using A = Compute<T>;
  // Rounded together; where there is much to hold, pair by pair, to spare registers.
  constexpr int kTogether = kStates > 1 && n % 2 == 0 ? 2 : n;
#pragma unroll
  for (int first = 0; first < n; first += kTogether) {
    A now[kStates][kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int v = first + k;
      const A weight = w[v];
      A state[kStates];
      for (int s = 0; s < kStates; ++s) state[s] = A(states[s].x[v]);
      const A z = update(weight, A(grad.x[v]), state);
      const bool frozen = dead || (freezes && weight == A(0));
      w[v] = frozen ? A(0) : z;
      for (int s = 0; s < kStates; ++s) now[s][k] = frozen ? A(0) : state[s];
    }
    for (int s = 0; s < kStates; ++s) {
      const Pack<T, kTogether> rounded = round_pack<false, T>(now[s]);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) states[s].x[first + k] = rounded.x[k];
    }
  }
}

}  // namespace cges::cuda
