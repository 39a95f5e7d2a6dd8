// The CUDA executor's kernels:
//   step_rows      contiguous groups and elements without groups, in registers
//   step_tiles     groups in shared memory, of a block or of several; elements without groups if there are no rows
//   step_chunks    parts of groups that nothing holds, by tickets
//   correct_steps  before them, where the device counts a tensor's steps, or knows lr
// From here: arguments.cuh; rows.cuh; tiles.cuh, ring.cuh (what they read), tile_sums.cuh; items.cuh (a chunk),
// groups.cuh (its sums, solve, apply), slab.cuh; rule.cuh (the update rules), memory.cuh (accesses).
#pragma once
#include "cuda/items.cuh"
#include "cuda/rows.cuh"
#include "cuda/tiles.cuh"

namespace cges::cuda {
namespace {

// Blocks of kThreads that a multiprocessor is to hold, which bounds a thread's registers: 128 at two, 80 at
// three, 64 at four.
constexpr int kBlocks = 2;
template <typename T, typename Rule, bool plain>
constexpr int kRowBlocks = sizeof(T) == 8 || (!plain && Rule::kStates > 1) ? 2
                           : plain && sizeof(T) == 2 && Rule::kStates == 1 ? 4
                                                                           : 3;

template <typename T, typename Rule, bool few, bool plain>
__global__ void __launch_bounds__(kThreads, kRowBlocks<T, Rule, plain>)
    step_rows(const __grid_constant__ StepTableOf<T, Rule, few> table) {
  CGES_SHARED(memory);
  const Strip strip = table.strips[blockIdx.x];
  if (table.overflowed() || !table.steps(strip.tensor)) return;
  run_strip<plain, T>(table, strip, reinterpret_cast<Sums<Compute<T>>*>(memory));
}

template <typename T, typename Rule, bool few, bool plain>
__global__ void __launch_bounds__(kTileThreads, 1)
    step_tiles(const __grid_constant__ StepTableOf<T, Rule, few> table) {
  CGES_SHARED(memory);
  if (table.overflowed()) return;
  const TileMemory<Compute<T>> at(table.slots, Rule::kStates);
  TileWalk<T, Rule, plain, StepTableOf<T, Rule, few>>(table, memory, at).run();
}

template <typename T, typename Rule, bool few>
__global__ void __launch_bounds__(kThreads, kBlocks)
    step_chunks(const __grid_constant__ StepTableOf<T, Rule, few> table) {
  CGES_SHARED(memory);
  if (table.overflowed()) return;
  int* const word = reinterpret_cast<int*>(memory);
  // They go window by window; in a window, stage by stage.
  const int ticket = take_ticket(table.counters, word), tickets_each = table.stages + 1;
  const Item& any = table.chunks[ticket / tickets_each];  // of the window
  const int rest = ticket - any.window_begin * tickets_each;
  const Item mine = table.chunks[any.window_begin + rest % any.window_size];
  if (table.steps(mine.tensor)) run_chunk<T>(table, mine, rest / any.window_size, memory);
  end_ticket(table, word);
}

// What the host does not know of tensors' own numbers, before the other kernels: one thread a tensor. It counts
// the steps whose counts lie here; an overflow is none.
template <typename T, typename Rule, bool few>
__global__ void correct_steps(const __grid_constant__ StepTableOf<T, Rule, few> table, int tensors) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= tensors || table.overflowed() || !table.steps(i)) return;
  const auto h = table.of(i).resolved(nullptr);
  using Own = typename StepTableOf<T, Rule, few>::Own;
  static_cast<Own*>(table.corrected)[i] =
      Rule::correct_here(h.rule, table.owns[i], table.counts_here(i), h.device.lr != nullptr);
}

}  // namespace
}  // namespace cges::cuda
