// The work of step_rows (kernels.cuh): groups that are contiguous in memory, and elements without groups. A
// team of neighbouring threads (a part of a warp, a warp, or up to a whole block) holds a group in its
// registers from the first load to the last store. All its loads are under way at once, and only sums across
// warps go through shared memory.
//
// A group goes through update, sums and solve (in exact mode again and again), and apply. Each element
// crosses the memory once.
#pragma once
#include "cuda/arguments.cuh"
#include "cuda/groups.cuh"

namespace cges::cuda {

// One thread's share of its team's group: kPacks packs of 16 bytes or, unless `wide`, the same elements one
// by one. Which elements these are depends on the strip alone and not on `wide`, so a tensor that does not
// begin at a multiple of 16 bytes gets the same bits.
template <typename T, bool wide>
struct Share {
  static constexpr int kVector = Pack<T>::kSize, kWidth = wide ? kVector : 1;
  static constexpr int kPacks = kElementsOfThread<sizeof(T)> / kWidth;

  int64_t first;  // the index of the group's first element in the tensor
  int size;       // the number of elements of the group
  int begin;      // the index of this thread's first element within the group
  int step;       // the distance from one of its elements to the next
  int jump;       // the distance from one of its packs to the next

  __device__ explicit Share(const Strip& strip) : size(strip.size) {
    const int lane = threadIdx.x % strip.lanes, team = threadIdx.x / strip.lanes;
    first = strip.begin + int64_t(team) * size;
    begin = lane * strip.width;
    step = strip.width > 1 ? 1 : strip.lanes;
    jump = strip.lanes * kVector;
    if (team >= strip.groups) size = 0;  // this team has no group
  }

  // The index of its k-th pack, or of its k-th element, within the group.
  __device__ int offset(int k) const {
    return wide ? begin + k * jump : begin + k / kVector * jump + k % kVector * step;
  }
  __device__ bool has(int k) const { return offset(k) < size; }

  // Whether this is the first thread of a team that has a group to step.
  __device__ bool leads() const { return begin == 0 && size > 0; }

  // Hides these numbers from the compiler, so that it computes offsets anew after this. If it kept them, they
  // would take more registers than z.
  __device__ void forget() { asm volatile("" : "+r"(begin), "+r"(step), "+r"(jump)); }
};

// The bytes of shared memory of a block: one Sums for each warp, and another for whether its group is alive.
template <typename A>
constexpr int64_t kRowsShared = 2 * kWarps * sizeof(Sums<A>);

// Adds up the sums of a team's threads and returns the total in each of them: first over the lanes of a warp,
// then over warps, always in the same order. `exchange` has one Sums for each warp of the block; between two
// uses of it there must be a barrier.
template <bool plain, typename A>
__device__ __forceinline__ Sums<A> add_up(Sums<A> sums, int lanes, Sums<A>* exchange) {
  for (int apart = min(lanes, kWarp) / 2; apart > 0; apart /= 2) add_from_lane<!plain>(sums, apart);
  if (lanes <= kWarp) return sums;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = lanes / kWarp;
  if (lane == 0) exchange[warp] = sums;
  __syncthreads();
  sums = exchange[warp / warps * warps + lane % warps];
  for (int apart = warps / 2; apart > 0; apart /= 2) add_from_lane<!plain>(sums, apart);
  return sums;
}

// The (s, t) of a team's group. z is 0 where a thread has no element.
template <bool plain, typename A, typename Rule, int kPacks, int kWidth>
__device__ __forceinline__ Shrinkage<A> solve_team(const A (&z)[kPacks][kWidth], int lanes,
                                                   const ParamGroup<A, Rule>& h, Sums<A>* exchange) {
  ShrinkageSolver<A> solver;
  solver.start(h.thresholds);
  while (true) {
    Sums<A> sums{};
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int v = 0; v < kWidth; ++v) group_stats(z[k][v], solver.at.t, sums.stats);
    sums = add_up<plain>(sums, lanes, exchange);
    if (!solver.done) solver.solve_shrinkage(sums.stats, h.thresholds, !plain && h.exact, kEpsilon<A>);
    if (plain) return solver.at;
    const bool searching = !solver.done;
    if (!(lanes > kWarp ? __syncthreads_or(searching) : __any_sync(kAllLanes, searching))) return solver.at;
  }
}

// Loads, updates and stores a thread's packs of a strip, for one kind of step.
template <typename T, typename Rule, bool plain, bool wide>
struct Packs {
  using A = Compute<T>;
  using Update = typename Rule::template Update<A, plain ? Known::plain : Known::nothing>;
  using Mine = Share<T, wide>;
  static constexpr int kWidth = Mine::kWidth, kStates = Rule::kStates;
  using Elements = Pack<T, kWidth>;
  struct Read {
    Elements grad, states[kStates];
  };

  const Update update;
  Mine mine;
  const bool freezes;  // whether an element that is zero stays zero
  T* w;
  const T* grad;
  T* states[kStates];

  template <typename Own>
  __device__ Packs(const Strip& strip, const TensorAddresses<kStates>& tensor, Phase phase,
                   const ParamGroup<A, Rule>& h, const Own& own)
      : update(h.rule, own, phase),
        mine(strip),
        freezes(!plain && (h.freeze == Freeze::element ||
                           (h.freeze == Freeze::group && strip.kind == Strip::Kind::ones))),
        w(static_cast<T*>(tensor.w) + mine.first),
        grad(static_cast<const T*>(tensor.grad) + mine.first) {
    for (int s = 0; s < kStates; ++s) states[s] = static_cast<T*>(tensor.states[s]) + mine.first;
  }

  __device__ Elements read_weights(int k) const { return load_pack<true, kWidth>(w + mine.offset(k), wide); }
  __device__ Read read_rest(int k) const {
    Read x{};  // zeros where the step reads nothing
    if (reads_grad(update.phase())) x.grad = load_pack<true, kWidth>(grad + mine.offset(k), wide);
    for (int s = 0; s < kStates && reads_state(update.phase()); ++s)
      x.states[s] = load_pack<true, kWidth>(states[s] + mine.offset(k), wide);
    return x;
  }

  // Replaces w by z and the states by the new ones. Both become 0 if the group is `dead`.
  __device__ void make_z(Read& x, bool dead, A (&z)[kWidth]) const {
    update_pack<T>(update, freezes, dead, z, x.grad, x.states);
  }

  __device__ void store_states(int k, const Read& x) const {
    for (int s = 0; s < kStates && writes_state(update.phase()); ++s)
      store_pack<true>(states[s] + mine.offset(k), x.states[s], wide);
  }

  // w = value(z). With `zeros` every zero is stored as +0.0.
  template <bool zeros, typename F>
  __device__ void store_weights(int k, const A (&z)[kWidth], F value) const {
    A out[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) out[v] = value(z[v]);
    store_pack<true>(w + mine.offset(k), round_pack<zeros, T>(out), wide);
  }
};

// Leaves a team whose group is held at zero without elements, so that it reads and writes none. Returns
// whether this thread need not go on, since no team has any that it meets at barriers or in votes.
template <typename Mine>
__device__ __forceinline__ bool skip_held(Mine& mine, const uint8_t* held, int lanes) {
  if (mine.size > 0 && load<false>(held) != 0) mine.size = 0;
  const bool idle = mine.size == 0;
  return lanes > kWarp ? __syncthreads_and(idle) : __all_sync(kAllLanes, idle);
}

// Steps a strip of groups, or of elements without groups, for which there is nothing to solve. `plain`: see
// Known. `wide`: all accesses are of 16 bytes. `held`: see Step, for this thread's group; null without
// skip_dead.
template <typename T, typename Rule, bool plain, bool wide>
__device__ __forceinline__ void step_groups(const Strip& strip, Packs<T, Rule, plain, wide>& packs,
                                            const ParamGroup<Compute<T>, Rule>& h, Sums<Compute<T>>* exchange,
                                            uint8_t* held = nullptr) {
  using A = Compute<T>;
  using P = Packs<T, Rule, plain, wide>;
  constexpr int kPacks = P::Mine::kPacks;
  // The number of packs of gradients and states to load at once: all, or as many as the registers allow.
  constexpr int kAtOnce = plain && wide ? kPacks / P::kStates : plain && sizeof(T) > 2 ? 4 : 2;
  static_assert(kPacks % kAtOnce == 0);
  const auto& mine = packs.mine;
  const bool grouped = strip.kind == Strip::Kind::groups;

  if constexpr (!plain)
    if (held != nullptr && skip_held(packs.mine, held, strip.lanes)) return;
  typename P::Elements weights[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (!wide && k % 4 == 0) packs.mine.forget();
    if (mine.has(k)) weights[k] = packs.read_weights(k);
  }
  // Holds w until make_z replaces it. The plain path converts a pack to the compute type only when its turn
  // comes, which saves registers.
  A z[kPacks][P::kWidth];
  const auto spread = [&](int k) {
#pragma unroll
    for (int v = 0; v < P::kWidth; ++v) z[k][v] = mine.has(k) ? A(weights[k].x[v]) : A(0);
  };
  bool dead = false;
  if constexpr (!plain) {
    Sums<A> alive{};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      spread(k);
#pragma unroll
      for (int v = 0; v < P::kWidth; ++v)
        if (z[k][v] != A(0)) alive.alive = A(1);
    }
    if (grouped && h.freeze == Freeze::group)
      // It has a part of shared memory of its own, as there is no barrier before the sums of the first sweep.
      dead = add_up<false>(alive, strip.lanes, exchange + kWarps).alive == A(0);
    if (held != nullptr && mine.leads()) store<false>(held, uint8_t(dead));
  }
#pragma unroll
  for (int first = 0; first < kPacks; first += kAtOnce) {
    typename P::Read rest[kAtOnce];
    if (!wide || !plain) packs.mine.forget();
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (mine.has(first + k)) rest[k] = packs.read_rest(first + k);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (plain) spread(first + k);
      if (!mine.has(first + k)) continue;
      packs.make_z(rest[k], dead, z[first + k]);
      packs.store_states(first + k, rest[k]);
    }
  }

  Shrinkage<A> at{A(1), h.thresholds.c};
  if (grouped && h.thresholds.need_norms()) at = solve_team<plain>(z, strip.lanes, h, exchange);
  if (!wide || !plain) packs.mine.forget();
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (mine.has(k)) f(k);
  };
  if (grouped ? h.thresholds.any() : h.thresholds.c != A(0))
    for_each([&](int k) { packs.template store_weights<true>(k, z[k], [&](A x) { return shrink(x, at); }); });
  else
    for_each([&](int k) { packs.template store_weights<false>(k, z[k], [](A x) { return x; }); });
}

// Steps a strip of groups of one element each, a few elements at a time. None waits for another.
template <typename T, typename Rule>
__device__ __forceinline__ void step_ones(const Packs<T, Rule, false, false>& packs,
                                          const ParamGroup<Compute<T>, Rule>& h) {
  using A = Compute<T>;
  using P = Packs<T, Rule, false, false>;
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int first = 0; packs.mine.has(first); first += kAtOnce) {
    typename P::Elements weights[kAtOnce];
    typename P::Read rest[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (!packs.mine.has(first + k)) continue;
      weights[k] = packs.read_weights(first + k);
      rest[k] = packs.read_rest(first + k);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (!packs.mine.has(first + k)) continue;
      A z[1] = {A(weights[k].x[0])};
      packs.make_z(rest[k], false, z);
      packs.store_states(first + k, rest[k]);
      if (h.thresholds.any())
        packs.template store_weights<true>(
            first + k, z, [&](A x) { return shrink(x, shrink_one(x, h.thresholds, h.exact)); });
      else
        packs.template store_weights<false>(first + k, z, [](A x) { return x; });
    }
  }
}

template <typename T, bool plain, bool wide, typename Table>
__device__ __forceinline__ void step_strip(const Table& table, const Strip& strip,
                                           const typename Table::Group& h, Sums<Compute<T>>* exchange) {
  const int tensor = strip.tensor;
  Packs<T, typename Table::Rule, plain, wide> packs(strip, table.tensors[tensor], table.phase(tensor), h,
                                                    table.own(tensor));
  if constexpr (!plain && !wide)
    if (strip.kind == Strip::Kind::ones) return step_ones(packs, h);
  uint8_t* held = nullptr;
  if constexpr (!plain)
    if (h.skip_held && strip.kind == Strip::Kind::groups)
      held = table.held + strip.first_group + threadIdx.x / strip.lanes;
  step_groups(strip, packs, h, exchange, held);
}

// Steps a strip by the path that serves it. The choice is made here, once for a block, and not in loops over
// elements. `plain`: the steps of all tensors in the launch are plain, and the kernel has no code for others.
template <bool plain, typename T, typename Table>
__device__ __forceinline__ void run_strip(const Table& table, const Strip& strip,
                                          Sums<Compute<T>>* exchange) {
  const auto& h = table.of(strip.tensor);
  const bool wide = strip.width > 1 && table.tensors[strip.tensor].bits() % 16 == 0;
  if constexpr (plain) {
    if (wide) return step_strip<T, true, true>(table, strip, h, exchange);
    return step_strip<T, true, false>(table, strip, h, exchange);
  }
  if (wide && table.plain(strip.tensor)) return step_strip<T, true, true>(table, strip, h, exchange);
  const auto resolved = h.resolved(table.loss_scale.grad_scale);
  if (wide) return step_strip<T, false, true>(table, strip, resolved, exchange);
  step_strip<T, false, false>(table, strip, resolved, exchange);
}

}  // namespace cges::cuda
