// What the groups of a tile add up to: over a block's threads, and over the blocks that share a panel.
#pragma once
#include "cuda/arguments.cuh"
#include "cuda/groups.cuh"

namespace cges::cuda {

// What each group of a tile adds up to, told to the first of the threads that share it: `sharers` threads
// side by side. `stats`: this thread's, of its columns. `slot`: memory of the block where each thread may
// write what it could copy there itself. Always in the same order; a barrier must follow before the slot is
// used again.
template <bool counts, typename A, int kVector>
__device__ __forceinline__ GroupStats<A> sum_tile(const GroupStats<A> (&stats)[kVector], const Tile& tile,
                                                  int sharers, A* slot) {
  constexpr int kEach = 16 / sizeof(A);  // numbers of a thread in one of the slot's arrays
  constexpr int kArrays = kVector / kEach, kTogether = ring_arrays(1) / kArrays, kSums = counts ? 3 : 2;
  const auto entry = [&](int k, int thread, int v) -> A& {
    return slot[((k * kArrays + v / kEach) * kTileThreads + thread) * kEach + v % kEach];
  };
  const int group = threadIdx.x / sharers, run = tile.run;
  const int matrix = tile.groups_each == tile.groups ? 0 : group / tile.groups_each;
  const int begin = matrix * tile.lanes * kVector + (group - matrix * tile.groups_each) * run;
  A total[kSums] = {};
#pragma unroll
  for (int first = 0; first < kSums; first += kTogether) {
    if (first > 0) __syncthreads();  // others still read what is there
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const A mine[3] = {stats[v].l1, stats[v].l2_squared, stats[v].count};
#pragma unroll
      for (int k = first; k < kSums && k < first + kTogether; ++k) entry(k - first, threadIdx.x, v) = mine[k];
    }
    __syncthreads();
    if (group >= tile.groups) continue;
    for (int i = threadIdx.x % sharers; i < tile.down * run; i += sharers) {
      const int row = run == 1 ? i : i / run, column = begin + (i - row * run);
      const int thread = row * tile.across + column / kVector;
#pragma unroll
      for (int k = first; k < kSums && k < first + kTogether; ++k)
        total[k] += entry(k - first, thread, column % kVector);
    }
  }
  for (int apart = sharers / 2; apart > 0; apart /= 2)
    for (A& sum : total) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  return {counts ? total[kSums - 1] : A(0), total[0], total[1]};
}

// What the parts of a panel tell each other through device memory: sums of each of its groups, by turns in
// two places, since a block may be one sweep ahead of others and no more.
template <typename A>
struct SharedPanel {
  const Tile& tile;
  int *arrived, *left;  // parts that have told their sums, over all sweeps; that will not come back
  Sums<A>* sums;        // [2, parts, groups]

  __device__ SharedPanel(const StepHead& table, const Tile& tile)
      : tile(tile),
        arrived(table.counters + kCounters + kPanelCounters * int64_t{tile.panel}),
        left(arrived + 1),
        sums(reinterpret_cast<Sums<A>*>(table.scratch + tile.sums)) {}

  __device__ Sums<A>* place(int sweep, int part, int group) const {
    return sums + (int64_t(sweep % 2) * tile.parts + part) * tile.groups + group;
  }

  // This part's, of a group each of the threads that `tells` has.
  __device__ void tell(int sweep, bool tells, int group, const Sums<A>& mine) const {
    if (tells) store_whole(place(sweep, tile.part, group), mine);
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    atomicAdd(arrived, 1);
  }

  // All parts', of a group that `sharers` threads side by side have in common, always in the same order.
  __device__ Sums<A> hear(int sweep, int sharers, int group) const {
    if (threadIdx.x == 0) wait_for(arrived, tile.parts * (sweep + 1));
    __syncthreads();
    Sums<A> all{};
    for (int part = threadIdx.x % sharers; part < tile.parts && group < tile.groups; part += sharers)
      all += load_whole(place(sweep, part, group));
    for (int apart = sharers / 2; apart > 0; apart /= 2) add_from_lane(all, apart);
    return all;
  }

  // The last to leave, when all threads of its block have heard enough, sets the counters back for the next
  // step.
  __device__ void leave() const {
    if (threadIdx.x != 0 || atomicAdd(left, 1) < tile.parts - 1) return;
    atomicExch(arrived, 0);
    atomicExch(left, 0);
  }
};

}  // namespace cges::cuda
