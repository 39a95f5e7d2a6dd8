// The groups of a slab whose z is in shared memory: sums, solve, apply; contiguous ones, and those of a
// panel.
#pragma once
#include <limits>

#include "cuda/slab.cuh"

namespace cges::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename A>
constexpr A kEpsilon = std::numeric_limits<A>::epsilon();

// What the lane `apart` has is added; of the counts too, or of the norms alone.
template <bool counts = true, typename A>
__device__ __forceinline__ void add_from_lane(Sums<A>& sums, int apart) {
  Sums<A> other{};
  other.stats.l1 = __shfl_xor_sync(kAllLanes, sums.stats.l1, apart);
  other.stats.l2_squared = __shfl_xor_sync(kAllLanes, sums.stats.l2_squared, apart);
  if constexpr (counts) {
    other.stats.count = __shfl_xor_sync(kAllLanes, sums.stats.count, apart);
    other.alive = __shfl_xor_sync(kAllLanes, sums.alive, apart);
  }
  sums += other;
}

template <typename A, typename Rule>
__device__ __forceinline__ void solve(ShrinkageSolver<A>& solver, const Sums<A>& sums,
                                      const ParamGroup<A, Rule>& h) {
  if (sums.alive == A(0)) solver.done = true;  // frozen: nothing reads what it would find
  if (!solver.done) solver.solve_shrinkage(sums.stats, h.thresholds, h.exact, kEpsilon<A>);
}

// A block's arrays in shared memory.
template <typename A>
struct SharedArrays {
  int* word;
  Sums<A>*entries, *exchange;
  ShrinkageSolver<A>* solvers;
  int* alive;
  A* z;

  __device__ SharedArrays(unsigned char* memory, int groups) {
    const SharedLayout<A> at(groups);
    word = reinterpret_cast<int*>(memory);
    entries = reinterpret_cast<Sums<A>*>(memory + at.entries);
    exchange = reinterpret_cast<Sums<A>*>(memory + at.exchange);
    solvers = reinterpret_cast<ShrinkageSolver<A>*>(memory + at.solvers);
    alive = reinterpret_cast<int*>(memory + at.alive);
    z = reinterpret_cast<A*>(memory + at.z);
  }
};

// What one thread knows, told to its whole block.
template <typename F>
__device__ __forceinline__ int tell_all(int* word, F f) {
  __syncthreads();
  if (threadIdx.x == 0) *word = f();
  __syncthreads();
  return *word;
}

// entries[p * columns + c]: what rows p, p + parts, ... of column c add up to, always in the same order;
// returns parts. of_column(c) is what adds row r of column c: (r, sums).
template <typename A, typename OfColumn>
__device__ __forceinline__ int sum_columns(int rows, int columns, Sums<A>* entries, OfColumn of_column) {
  int lanes = 1;
  while (lanes < columns) lanes *= 2;
  const int column = threadIdx.x % lanes, width = max(lanes, kWarp);
  Sums<A> sums{};
  if (column < columns) {
    const auto add = of_column(column);
#pragma unroll 4
    for (int r = threadIdx.x / lanes; r < rows; r += kThreads / lanes) add(r, sums);
  }
  for (int apart = kWarp / 2; apart >= lanes; apart /= 2) add_from_lane(sums, apart);
  if (column < columns && threadIdx.x % width == column)
    entries[threadIdx.x / width * columns + column] = sums;
  return kThreads / width;
}

// The sums of each group of a slab whose z is in shared memory, in exchange[g].
template <typename T, int kStates>
__device__ __forceinline__ void sum_groups(const Slab<T, kStates>& slab, int run, int groups,
                                           const SharedArrays<Compute<T>>& shared, Sums<Compute<T>>* out) {
  using A = Compute<T>;
  const bool one = groups == 1;  // then z is one long column
  const int columns = one ? 1 : slab.columns, pitch = one ? 1 : slab.z_pitch();
  const int parts = sum_columns(one ? slab.z_elements() : slab.rows, columns, shared.entries, [&](int c) {
    const A t = shared.solvers[one ? 0 : c / run].at.t;
    return [=, z = shared.z + c](int r, Sums<A>& sums) { group_stats(z[r * pitch], t, sums.stats); };
  });
  __syncthreads();
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    Sums<A> sums{};
    const int width = one ? 1 : run;
    for (int p = 0; p < parts; ++p)
      for (int j = 0; j < width; ++j) sums += shared.entries[p * columns + g * width + j];
    sums.alive = A(shared.alive[g]);
    out[g] = sums;
  }
}

// Searches from t = c, and groups that count as alive unless zeros are frozen group by group.
template <typename A, typename Rule>
__device__ __forceinline__ void start_groups(const SharedArrays<A>& shared, int groups,
                                             const ParamGroup<A, Rule>& h) {
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    shared.solvers[g].start(h.thresholds);
    shared.alive[g] = h.freeze != Freeze::group;
  }
  __syncthreads();
}

template <typename T, int kStates>
__device__ __forceinline__ void mark_alive(const Slab<T, kStates>& slab, int run, unsigned alive,
                                           int* groups) {
  for (int v = 0; v < slab.kVector && slab.column + v < slab.columns; ++v)
    if (alive >> v & 1) atomicOr(&groups[(slab.column + v) / run], 1);
}

// w = s * soft(z, t) with each group's own s and t.
template <typename T, typename Rule>
__device__ __forceinline__ void apply_slab(const Slab<T, Rule::kStates>& slab, int run, int groups,
                                           const ParamGroup<Compute<T>, Rule>& h,
                                           const SharedArrays<Compute<T>>& shared) {
  using A = Compute<T>;
  constexpr int kVector = Slab<T, Rule::kStates>::kVector;
  Shrinkage<A> at[kVector];
  unsigned dead = 0;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const int g = min(slab.column + v, slab.columns - 1) / run;
    at[v] = shared.solvers[g].at;
    if (shared.alive[g] == 0) dead |= 1u << v;
  }
  const bool shrinks = h.thresholds.any();
  if (shrinks && dead == 0)  // the usual, without a question per element
    return store_slab(slab, shared.z, [&](A z, int v) { return apply_shrinkage<T>(z, at[v]); });
  store_slab(slab, shared.z,
             [&](A z, int v) { return dead >> v & 1 ? T(0.0f) : shrunk<T>(z, at[v], shrinks); });
  clear_states(slab, dead);
}

}  // namespace cges::cuda
