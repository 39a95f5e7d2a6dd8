// Sums, solve and apply for the groups of a slab whose z lies in shared memory: one contiguous group, or the
// groups of a panel. step_chunks uses all of it through items.cuh; the other kernels use add_from_lane and
// kEpsilon.
#pragma once
#include <limits>

#include "cuda/slab.cuh"

namespace cges::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename A>
constexpr A kEpsilon = std::numeric_limits<A>::epsilon();

// Adds to `sums` the sums of the lane whose number is this lane's xor `apart`. Counts and `alive` are added
// only if `counts`. All lanes of the warp must call it.
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

// Advances one group's search by its sums.
template <typename A, typename Rule>
__device__ __forceinline__ void solve(ShrinkageSolver<A>& solver, const Sums<A>& sums,
                                      const ParamGroup<A, Rule>& h) {
  if (sums.alive == A(0)) solver.done = true;  // the group is frozen, so its (s, t) are not used
  if (!solver.done) solver.solve_shrinkage(sums.stats, h.thresholds, h.exact, kEpsilon<A>);
}

// The arrays of a block of step_chunks in shared memory, as SharedLayout places them.
template <typename A>
struct SharedArrays {
  int* word;
  Sums<A>* entries;
  ShrinkageSolver<A>* solvers;
  int* alive;
  A* z;

  __device__ SharedArrays(unsigned char* memory, int groups) {
    const SharedLayout<A> at(groups);
    word = reinterpret_cast<int*>(memory);
    entries = reinterpret_cast<Sums<A>*>(memory + at.entries);
    solvers = reinterpret_cast<ShrinkageSolver<A>*>(memory + at.solvers);
    alive = reinterpret_cast<int*>(memory + at.alive);
    z = reinterpret_cast<A*>(memory + at.z);
  }
};

// Calls f in the first thread and returns its result in all threads of the block. Because of the first
// barrier all threads have read the earlier result before it is overwritten, and f sees all that they have
// written.
template <typename F>
__device__ __forceinline__ int tell_all(int* word, F f) {
  __syncthreads();
  if (threadIdx.x == 0) *word = f();
  __syncthreads();
  return *word;
}

// Adds up the rows of each column and leaves partial sums in entries[p * columns + c]; returns how many parts
// p there are. Which rows a part has depends only on rows and columns, and they are added in a fixed order.
// of_column(c) returns a function (r, sums) that adds row r of column c. The threads stand in rows of
// `lanes`, a power of two, so that those of a warp that have the same column add up their sums by shuffles.
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

// Leaves the sums of each group of the slab in out[g].
template <typename T, int kStates>
__device__ __forceinline__ void sum_groups(const Slab<T, kStates>& slab, int run, int groups,
                                           const SharedArrays<Compute<T>>& shared, Sums<Compute<T>>* out) {
  using A = Compute<T>;
  const bool one = groups == 1;  // then all of z is taken as one long column; the padding adds nothing
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

// Starts each group's search at t = c. All groups count as alive unless zeros are frozen by groups; then
// mark_alive marks the groups that are alive.
template <typename A, typename Rule>
__device__ __forceinline__ void start_groups(const SharedArrays<A>& shared, int groups,
                                             const ParamGroup<A, Rule>& h) {
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    shared.solvers[g].start(h.thresholds);
    shared.alive[g] = h.freeze != Freeze::group;
  }
  __syncthreads();
}

// Marks the groups of this thread's columns whose bit in `alive` is set.
template <typename T, int kStates>
__device__ __forceinline__ void mark_alive(const Slab<T, kStates>& slab, int run, unsigned alive,
                                           int* groups) {
  for (int v = 0; v < slab.kVector && slab.column + v < slab.columns; ++v)
    if (alive >> v & 1) atomicOr(&groups[(slab.column + v) / run], 1);
}

// w = s * soft(z, t) with each group's own s and t; zeros for w and the states of a group that is not alive.
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
  if (shrinks && dead == 0)  // the usual case, without branches for each element
    return store_slab(slab, shared.z, [&](A z, int v) { return apply_shrinkage<T>(z, at[v]); });
  store_slab(slab, shared.z,
             [&](A z, int v) { return dead >> v & 1 ? T(0.0f) : shrunk<T>(z, at[v], shrinks); });
  clear_states(slab, dead);
}

}  // namespace cges::cuda
