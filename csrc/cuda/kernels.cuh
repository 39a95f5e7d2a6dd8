// The CUDA executor's kernels, which launch.cu launches:
//   step_rows      contiguous groups, and elements without groups; z waits in registers
//   step_tiles     groups that one block or several together hold; z waits in shared memory. Elements without
//                  groups go there if there are no rows
//   step_chunks    parts of groups that no blocks can hold, which are taken by tickets; z is computed again
//   correct_steps  runs before the others if only the device knows a tensor's count of steps, or lr
// Their parts: arguments.cuh (the arguments of kernels); rows.cuh; tiles.cuh with ring.cuh (reading) and
// tile_sums.cuh; items.cuh (a chunk) with slab.cuh (its elements) and groups.cuh (its sums, solve, apply);
// rule.cuh (update rules); memory.cuh (accesses to device and shared memory).
#pragma once
#include "cuda/items.cuh"
#include "cuda/rows.cuh"
#include "cuda/tiles.cuh"

namespace cges::cuda {
namespace {

// The number of blocks of kThreads that a multiprocessor is to hold at once. This bounds a thread's
// registers: 128 with two blocks, 80 with three, 64 with four. In step_rows, plain steps of 16-bit types
// need the fewest, doubles and steps of several states the most.
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
  // Tickets go through the chunks window by window, and within a window stage by stage. So a chunk's earlier
  // stages, and those of its panel, have earlier tickets; blocks that hold them are running. A window of n
  // chunks has n * tickets_each tickets, so ticket / tickets_each is some chunk of the ticket's window.
  const int ticket = take_ticket(table.counters, word), tickets_each = table.stages + 1;
  const Item& any = table.chunks[ticket / tickets_each];
  const int rest = ticket - any.window_begin * tickets_each;
  const Item mine = table.chunks[any.window_begin + rest % any.window_size];
  if (table.steps(mine.tensor)) run_chunk<T>(table, mine, rest / any.window_size, memory);
  end_ticket(table, word);
}

// Runs before the other kernels, with one thread for each tensor. It computes the tensor's own numbers that
// the host does not know, and counts the step if the count lies on the device. A step that overflows is not
// counted. `by` is 1, or -1 to take the count back if none of the others could be launched.
template <typename T, typename Rule, bool few>
__global__ void correct_steps(const __grid_constant__ StepTableOf<T, Rule, few> table, int tensors,
                              float by) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= tensors || table.overflowed() || !table.steps(i)) return;
  const auto h = table.of(i).resolved(nullptr);
  using Own = typename StepTableOf<T, Rule, few>::Own;
  static_cast<Own*>(table.corrected)[i] =
      Rule::correct_here(h.rule, table.owns[i], table.counts_here(i), by, h.device.lr != nullptr);
}

}  // namespace
}  // namespace cges::cuda
