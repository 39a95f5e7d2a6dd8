// How one block goes about its item: tiles, a slab alone or in a cluster, a chunk of a panel with a ticket.
#pragma once
#include <cooperative_groups.h>

#include "cuda_groups.cuh"

#if CGES_EMULATED  // by tests/cuda_emulator, on the host
#define CGES_SHARED(name) unsigned char* const name = emulator::shared_memory()
#define CGES_CLUSTERS 1
#else
#define CGES_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CGES_CLUSTERS 1
#else
#define CGES_CLUSTERS 0
#endif
#endif

namespace cges::cuda {

namespace cg = cooperative_groups;

constexpr int64_t kArgumentBytes = 32764;  // CUDA >= 12.1, sm_70 on
constexpr unsigned kSpinNanoseconds = 64;
constexpr int64_t kSpinBudget = int64_t{1} << 31;  // minutes: what waits longer waits for ever

// A kernel's only argument. What changes from step to step travels in it; what does not, lies in device
// memory.
template <typename A>
struct StepTable {
  static constexpr int kMaxRows =
      int((kArgumentBytes - 64 - kMaxTensors * (sizeof(TensorArgs) + 2)) / sizeof(Coefficients<A>));

  const Item *items, *chunks;
  unsigned char* scratch;
  int32_t* counters;
  int64_t window;
  int32_t tickets, stages, panels;
  TensorArgs tensors[kMaxTensors];
  uint16_t rows[kMaxTensors];  // row of coefficients * 8 + phase + 1
  Coefficients<A> coefficients[kMaxRows];

  // Whether the item has work at all: it is not padding, and its tensor has a gradient.
  __device__ bool steps(int tensor) const { return tensor >= 0 && rows[tensor] % 8 != 0; }
  __device__ Momentum momentum(int tensor) const { return Momentum(int(rows[tensor] % 8) - 1); }
  __device__ const Coefficients<A>& of(int tensor) const { return coefficients[rows[tensor] / 8]; }
};
static_assert(sizeof(StepTable<float>) <= kArgumentBytes && sizeof(StepTable<double>) <= kArgumentBytes);

// A tile for each warp.
template <typename T>
__device__ __forceinline__ void run_tiles(const StepTable<Compute<T>>& table, const Item& item,
                                          unsigned char* memory) {
  using A = Compute<T>;
  const Coefficients<A>& h = table.of(item.tensor);
  const int tile = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (tile >= item.rows) return;
  A* const z = reinterpret_cast<A*>(memory) + tile * round_up(item.columns, Pack<T>::kSize);
  const int elements = tile == item.rows - 1 ? item.last_columns : item.columns;
  Item part = item;
  part.begin += tile * item.pitch;
  part.pitch = part.columns = min(elements, kWarp * Pack<T>::kSize);
  part.rows = (elements + part.columns - 1) / part.columns;
  part.last_columns = elements - (part.rows - 1) * part.columns;
  const Slab<T> slab(table.tensors[item.tensor], table.momentum(item.tensor), part, kWarp, lane, kWarp);
  update_slab(slab, h, true, z);
  __syncwarp();
  if (h.need_sums()) shrink_tile(slab, elements, item.run, item.lanes, h, z);
  __syncwarp();
  const A c = h.thresholds.c;
  const bool shrinks = !h.need_sums() && c != A(0);
  store_slab(slab, z, [&](A x, int) { return shrunk<T>(x, {A(1), c}, shrinks); });
}

// Searches for each group's s and t with z in shared memory. In a cluster each block holds some of the rows,
// and all of them add up all blocks' sums, in the same order.
template <typename T, bool clustered>
__device__ __forceinline__ void solve_slab(const Slab<T>& slab, int run, int groups,
                                           const Coefficients<Compute<T>>& h,
                                           const SharedArrays<Compute<T>>& shared) {
  using A = Compute<T>;
  for (int sweep = 0;; ++sweep) {
    Sums<A>* const mine = shared.exchange + sweep % 2 * groups;  // neighbours may still read the other half
    sum_groups(slab, run, groups, shared, mine);
    bool done = true;
#if CGES_CLUSTERS
    if constexpr (clustered) cg::this_cluster().sync();
#endif
    for (int g = threadIdx.x; g < groups; g += kThreads) {
      Sums<A> sums = mine[g];
#if CGES_CLUSTERS
      if constexpr (clustered) {
        sums = {};
        for (unsigned rank = 0; rank < kClusterSize; ++rank)
          sums += cg::this_cluster().map_shared_rank(mine, rank)[g];
      }
#endif
      solve(shared.solvers[g], sums, h);
      shared.alive[g] = sums.alive != A(0);
      done &= shared.solvers[g].done;
    }
    if (__syncthreads_and(done)) return;
  }
}

// Until *counter >= at_least; what was written before it got there is then visible.
__device__ __forceinline__ int wait_for(int* counter, int at_least) {
  for (int64_t spins = 0; spins < kSpinBudget; ++spins) {
    const int seen = atomicAdd(counter, 0);
    if (seen >= at_least) {
      __threadfence();
      return seen;
    }
    __nanosleep(kSpinNanoseconds);
  }
  __trap();
  return 0;
}

// A panel of chunks: what its blocks tell each other through device memory.
template <typename A>
struct Panel {
  int *arrived, *swept;   // chunks of this sweep that have left their sums; sweeps that are done
  GroupState<A>* states;  // [groups]
  Sums<A>* slots;         // [chunks, groups]

  __device__ Panel(const StepTable<A>& table, const Item& item)
      : arrived(table.counters + kCounters + kPanelCounters * item.panel),
        swept(arrived + 1),
        states(reinterpret_cast<GroupState<A>*>(table.scratch + item.slot)),
        slots(reinterpret_cast<Sums<A>*>(table.scratch + item.slot + state_bytes<A>(item.groups()))) {}
};

// A chunk's sums go to its slot; the last of the panel's chunks to arrive adds them all up and moves each
// group's search on by one sweep.
template <typename T>
__device__ __forceinline__ void sweep_chunk(const StepTable<Compute<T>>& table, const Item& item,
                                            const Slab<T>& slab, int stage,
                                            const SharedArrays<Compute<T>>& shared) {
  using A = Compute<T>;
  const Coefficients<A>& h = table.of(item.tensor);
  const Panel<A> panel(table, item);
  const int groups = item.groups();
  sum_groups(slab, item.run, groups, shared, panel.slots + int64_t(item.chunk) * groups);
  const bool last = tell_all(shared.word, [&] {
    __threadfence();
    return atomicAdd(panel.arrived, 1) == item.chunks - 1;
  });
  if (!last) return;
  __threadfence();
  const int parts = sum_columns(item.chunks, groups, shared.entries, [&](int g) {
    return [=, slot = panel.slots + g](int chunk, Sums<A>& sums) { sums += slot[int64_t(chunk) * groups]; };
  });
  __syncthreads();
  bool done = true;
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    Sums<A> sums{};
    for (int p = 0; p < parts; ++p) sums += shared.entries[p * groups + g];
    ShrinkageSolver<A> solver = shared.solvers[g];
    solve(solver, sums, h);
    panel.states[g] = {solver, sums.alive != A(0)};
    done &= solver.done;
  }
  done = __syncthreads_and(done);
  if (threadIdx.x == 0) {
    atomicExch(panel.arrived, 0);
    __threadfence();
    atomicExch(panel.swept, done ? table.stages : stage + 1);
  }
}

// Whether this chunk has anything to do at this stage; if so, its groups' searches go on from where they are.
template <typename A>
__device__ __forceinline__ bool resume_chunk(const StepTable<A>& table, const Item& item, int stage,
                                             const SharedArrays<A>& shared) {
  if (!table.of(item.tensor).need_sums()) return stage == table.stages;
  if (stage == 0) return true;
  const Panel<A> panel(table, item);
  const int seen = tell_all(shared.word, [&] { return wait_for(panel.swept, stage); });
  if (stage < table.stages && seen > stage) return false;  // the search has ended
  for (int g = threadIdx.x; g < item.groups(); g += kThreads) {
    shared.solvers[g] = panel.states[g].solver;
    shared.alive[g] = panel.states[g].alive;
  }
  return true;
}

// A slab from update to apply; of a chunk, one stage: 0 to table.stages - 1 are sweeps, then its groups' s
// and t are known, and the last applies.
template <typename T, bool clustered>
__device__ __forceinline__ void run_slab(const StepTable<Compute<T>>& table, const Item& item, int stage,
                                         unsigned char* memory) {
  using A = Compute<T>;
  const Coefficients<A>& h = table.of(item.tensor);
  const int groups = item.groups(), run = item.run;
  const SharedArrays<A> shared(memory, groups);
  const Slab<T> slab(table.tensors[item.tensor], table.momentum(item.tensor), item, item.lanes,
                     int(threadIdx.x), kThreads);
  const bool is_chunk = item.chunks > 0, applies = !is_chunk || stage == table.stages;
  start_groups(shared, groups, h);
  if (is_chunk && !resume_chunk(table, item, stage, shared)) return;
  const unsigned alive = update_slab(slab, h, applies, shared.z);
  if (groups > 0 && h.freeze == Freeze::group && stage == 0) mark_alive(slab, run, alive, shared.alive);
  __syncthreads();
  if (!applies) return sweep_chunk(table, item, slab, stage, shared);
  if (!is_chunk && groups > 0 && h.need_sums()) solve_slab<T, clustered>(slab, run, groups, h, shared);
  apply_slab(slab, run, groups, h, shared);
}

// Tickets go window by window; in a window, stage by stage.
__device__ __forceinline__ int64_t take_ticket(int* counters, int* word) {
  return tell_all(word, [&] { return atomicAdd(counters, 1); });
}

// The last to end leaves all counters at zero.
template <typename A>
__device__ __forceinline__ void end_ticket(const StepTable<A>& table, int* word) {
  const bool last = tell_all(word, [&] { return atomicAdd(table.counters + 1, 1) == table.tickets - 1; });
  if (!last) return;
  for (int i = threadIdx.x; i < kCounters + kPanelCounters * table.panels; i += kThreads)
    atomicExch(table.counters + i, 0);
}

}  // namespace cges::cuda
