// The work of a block of step_chunks in one stage of a chunk, and the exchange of sums between the chunks
// of a panel. A block that waits for a panel waits only for blocks with earlier tickets, which are running
// (see kernels.cuh).
#pragma once
#include "cuda/arguments.cuh"
#include "cuda/groups.cuh"

namespace cges::cuda {

// The data that the blocks of a panel exchange through device memory.
template <typename A>
struct Panel {
  int *arrived, *swept;   // the number of chunks that have left their sums in this sweep; of sweeps done
  GroupState<A>* states;  // [groups]
  Sums<A>* partials;      // [chunks, groups]

  __device__ Panel(const StepHead& table, const Item& item)
      : arrived(table.counters + kCounters + kPanelCounters * item.panel),
        swept(arrived + 1),
        states(reinterpret_cast<GroupState<A>*>(table.scratch + item.scratch)),
        partials(reinterpret_cast<Sums<A>*>(table.scratch + item.scratch + state_bytes<A>(item.groups()))) {}
};

// Leaves a chunk's sums in the panel's partials. The last of the panel's chunks to arrive adds all of them
// up, in an order that does not depend on who it is, and advances each group's search by one step.
template <typename T, typename Rule>
__device__ __forceinline__ void sweep_chunk(const StepHead& table, const Item& item,
                                            const ParamGroup<Compute<T>, Rule>& h,
                                            const Slab<T, Rule::kStates>& slab, int stage,
                                            const SharedArrays<Compute<T>>& shared) {
  using A = Compute<T>;
  const Panel<A> panel(table, item);
  const int groups = item.groups();
  sum_groups(slab, item.run, groups, shared, panel.partials + int64_t(item.chunk) * groups);
  const bool last = tell_all(shared.word, [&] {
    // tell_all's barrier comes after all threads have written their sums. So the first fence makes the
    // block's sums visible before it counts as arrived, and the second keeps reads of the others' sums behind
    // their arrival.
    __threadfence();
    const bool found = atomicAdd(panel.arrived, 1) == item.chunks - 1;
    __threadfence();
    return found;
  });
  if (!last) return;
  const int parts = sum_columns(item.chunks, groups, shared.entries, [&](int g) {
    return
        [=, mine = panel.partials + g](int chunk, Sums<A>& sums) { sums += mine[int64_t(chunk) * groups]; };
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
  // After the barrier, the fence makes the states of all threads visible, and `arrived` zero again, before
  // `swept` lets the next stage begin. A search that is done counts as swept through all stages.
  if (threadIdx.x == 0) {
    atomicExch(panel.arrived, 0);
    __threadfence();
    atomicExch(panel.swept, done ? table.stages : stage + 1);
  }
}

// Returns whether this chunk has anything to do at this stage. If so, it first waits for the stage before,
// and reads its groups' searches and whether the groups are alive.
template <typename A, typename Rule>
__device__ __forceinline__ bool resume_chunk(const StepHead& table, const Item& item,
                                             const ParamGroup<A, Rule>& h, int stage,
                                             const SharedArrays<A>& shared) {
  if (!h.need_sums()) return stage == table.stages;
  if (stage == 0) return true;
  const Panel<A> panel(table, item);
  const int seen = tell_all(shared.word, [&] { return wait_for(panel.swept, stage); });
  if (stage < table.stages && seen > stage) return false;  // all searches have ended before this stage
  for (int g = threadIdx.x; g < item.groups(); g += kThreads) {
    shared.solvers[g] = panel.states[g].solver;
    shared.alive[g] = panel.states[g].alive;
  }
  return true;
}

// Runs one stage of a chunk. Stages 0 to table.stages - 1 are sweeps, each of which makes z again. Then (s,
// t) of the groups are known, and the last stage applies.
template <typename T, typename Table>
__device__ __forceinline__ void run_chunk(const Table& table, const Item& item, int stage,
                                          unsigned char* memory) {
  using A = Compute<T>;
  // A copy, since kernel arguments that are indexed at run time are slow to reach.
  const auto h = table.of(item.tensor).resolved(table.loss_scale.grad_scale);
  const int groups = item.groups(), run = item.run;
  const SharedArrays<A> shared(memory, groups);
  const Slab<T, Table::kStates> slab(table.tensors[item.tensor], table.phase(item.tensor), item);
  const bool applies = stage == table.stages;
  start_groups(shared, groups, h);
  if (!resume_chunk(table, item, h, stage, shared)) return;
  const unsigned alive = update_slab(slab, h, table.own(item.tensor), applies, shared.z);
  if (h.freeze == Freeze::group && stage == 0) mark_alive(slab, run, alive, shared.alive);
  __syncthreads();
  if (applies)
    apply_slab(slab, run, groups, h, shared);
  else
    sweep_chunk(table, item, h, slab, stage, shared);
}

__device__ __forceinline__ int take_ticket(int* counters, int* word) {
  return tell_all(word, [&] { return atomicAdd(counters, 1); });
}

// Counts a ticket as ended. The last one sets all counters back to zero.
__device__ __forceinline__ void end_ticket(const StepHead& table, int* word) {
  const bool last = tell_all(word, [&] { return atomicAdd(table.counters + 1, 1) == table.tickets - 1; });
  if (!last) return;
  for (int i = threadIdx.x; i < kCounters + kPanelCounters * table.panels; i += kThreads)
    atomicExch(table.counters + i, 0);
}

}  // namespace cges::cuda
