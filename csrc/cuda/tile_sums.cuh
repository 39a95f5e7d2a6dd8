// Sums of the groups of a tile: over the threads of a block, and over the blocks that share a panel.
// tiles.cuh calls both in solve_tile.
#pragma once
#include "cuda/arguments.cuh"
#include "cuda/groups.cuh"

namespace cges::cuda {

// Adds up each group of a tile, in a fixed order. `stats` are the thread's own sums, for each of its columns.
// A group is added up by `sharers` neighbouring threads, which all return its total; in exact mode with
// counts.
//
// The sums meet in `slot`, a slot of the ring. The ring has no barrier, so other threads may still be reading
// from this slot. Therefore a thread first writes only to those 16 bytes of each array that its own copies
// fill, and reads those of others after a barrier. Another barrier must follow before the slot is used again.
template <bool counts, typename A, int kVector>
__device__ __forceinline__ GroupStats<A> sum_tile(const GroupStats<A> (&stats)[kVector], const Tile& tile,
                                                  int sharers, A* slot) {
  // A thread has room for kEach numbers in each array of the slot. One sum of all its columns takes kArrays
  // arrays, so kTogether sums fit at once, counting on the three arrays that a slot has with one state.
  constexpr int kEach = 16 / sizeof(A);
  constexpr int kArrays = kVector / kEach, kTogether = ring_arrays(1) / kArrays, kSums = counts ? 3 : 2;
  const auto entry = [&](int k, int thread, int v) -> A& {
    return slot[((k * kArrays + v / kEach) * kTileThreads + thread) * kEach + v % kEach];
  };
  const int group = threadIdx.x / sharers, run = tile.run;
  const int matrix = tile.groups_each == tile.groups ? 0 : group / tile.groups_each;
  // The group's first column, where each of the `across` threads counts as kVector columns.
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

// The exchange of sums between the parts of a shared panel, through device memory. Sweeps use two places in
// turn. That suffices: a part writes its sums of sweep k + 2 only after it has read those of all parts for
// sweep k + 1, and each part has written these only after it had read the sums of sweep k.
template <typename A>
struct SharedPanel {
  const Tile& tile;
  int *arrived, *left;  // how many times parts have written sums, over all sweeps; how many parts have left
  Sums<A>* sums;        // [2, parts, groups]

  __device__ SharedPanel(const StepHead& table, const Tile& tile)
      : tile(tile),
        arrived(table.counters + kCounters + kPanelCounters * int64_t{tile.panel}),
        left(arrived + 1),
        sums(reinterpret_cast<Sums<A>*>(table.scratch + tile.sums)) {}

  __device__ Sums<A>* place(int sweep, int part, int group) const {
    return sums + (int64_t(sweep % 2) * tile.parts + part) * tile.groups + group;
  }

  // Writes this part's sums. Each thread with `tells` has the sums of one group. After the barrier the fence
  // makes the sums of all threads visible before the part counts as arrived.
  __device__ void tell(int sweep, bool tells, int group, const Sums<A>& mine) const {
    if (tells) store_whole(place(sweep, tile.part, group), mine);
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    atomicAdd(arrived, 1);
  }

  // Waits for all parts and returns the total of their sums for a group, added in a fixed order, to each of
  // the `sharers` neighbouring threads that share the group.
  __device__ Sums<A> hear(int sweep, int sharers, int group) const {
    if (threadIdx.x == 0) wait_for(arrived, tile.parts * (sweep + 1));
    __syncthreads();
    Sums<A> all{};
    for (int part = threadIdx.x % sharers; part < tile.parts && group < tile.groups; part += sharers)
      all += load_whole(place(sweep, part, group));
    for (int apart = sharers / 2; apart > 0; apart /= 2) add_from_lane(all, apart);
    return all;
  }

  // Called when all threads of the block have read the last sums. The last part to leave sets the counters
  // back to zero for the next step.
  __device__ void leave() const {
    if (threadIdx.x != 0 || atomicAdd(left, 1) < tile.parts - 1) return;
    atomicExch(arrived, 0);
    atomicExch(left, 0);
  }
};

}  // namespace cges::cuda
