// The update rules in the form that kernels take, and the arguments of kernels for a param group and for a
// tensor's addresses. arguments.cuh puts these into the kernels' arguments; rows.cuh, tiles.cuh and slab.cuh
// call update_pack.
#pragma once
#include "cuda/executor.h"
#include "cuda/memory.cuh"

namespace cges::cuda {

// The facts about a step that are known when a kernel is compiled: nothing; that its phase is running; or
// that it is plain. Nearly all users run plain steps: the phase is running, no rare option is used
// (nesterov, freezing, exact mode with exclusive lasso, a gradient scaler), and the host knows all numbers.
// launch.cu decides (is_plain).
enum class Known { nothing, running, plain };

// For kernels an update rule is a struct with these members:
//   kStates         the number of states that it keeps
//   kMostTensors    the number of tensors that the largest arguments hold
//   kFewArguments   the number of bytes of the arguments that hold kFewTensors
//   Group<A>        the numbers of a param group: lr(), take_lr(lr), unscale(grad_scale)
//   Own<A>          a tensor's own numbers; kNone: there are none
//   correct_here(group, own, ...)        forms Own if some number for it lies on the device
//   Update<A, known>(group, own, phase)  updates one element
// launch.cu also makes a Group from Hyperparameters, and an Own that is not kNone from (Hyperparameters,
// TensorInStep).

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
    __device__ explicit Update(const Update<A, other>& x)  // the same update, of which more or less is known
        : scalars(x.scalars), phase_(x.phase()), nesterov_(x.nesterov_) {}

    __device__ Phase phase() const { return known == Known::nothing ? phase_ : Phase::running; }

    // Returns z and replaces the states by the new ones.
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

  // A tensor's step size and eps as its count of steps corrects them. If lr lies on the device, the host
  // forms the step size for lr = 1. If the count lies there, this holds the address of the count instead.
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

  // Forms the final Own, if the count or lr lies on the device, and counts the step if the count does. The
  // options are taken back from the scalars, as the arguments hold no others.
  template <typename A>
  static __device__ Own<A> correct_here(const Group<A>& h, Own<A> own, bool counts_here, float by,
                                        bool lr_here) {
    if (!counts_here) {
      if (lr_here) own.corrected.step_size *= h.lr();
      return own;
    }
    const double count = *own.count() += by;
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

// The hyperparameters of a param group in the compute type. If some of them lie in device memory,
// `thresholds` holds coefficients that are not multiplied by lr yet, until resolved() has read the rest.
template <typename A, typename Rule>
struct ParamGroup {
  typename Rule::template Group<A> rule;
  Thresholds<A> thresholds;
  bool exact;
  bool skip_held;  // whether step_rows skips groups that the last step held at zero (Step::held)
  Freeze freeze;
  DeviceScalars device;

  // The same with all numbers read from device memory, and with gradients divided by *grad_scale if it is not
  // null.
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

// The addresses of a tensor in one step. For an array that it lacks the address is that of w, which lets
// kernels compute offsets without a branch; nothing is read through it.
template <int kStates>
struct TensorAddresses {
  void* w;
  const void* grad;
  void* states[kStates];

  // The bitwise or of the addresses: it is a multiple of 16 if all of them are.
  __device__ uintptr_t bits() const {
    uintptr_t all = reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(grad);
    for (void* const state : states) all |= reinterpret_cast<uintptr_t>(state);
    return all;
  }
};

// Updates neighbouring elements: replaces w by z and the states by the new ones. Both become 0 if `dead`, and
// for a weight that is 0 if `freezes`.
template <typename T, int n, int kStates, typename Update>
__device__ __forceinline__ void update_pack(const Update& update, bool freezes, bool dead, Compute<T> (&w)[n],
                                            const Pack<T, n>& grad, Pack<T, n> (&states)[kStates]) {
  using A = Compute<T>;
  // The number of elements that are updated before their states are rounded: all or, with several states, a
  // pair, to spare registers.
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
