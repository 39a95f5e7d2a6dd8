// The CUDA executor as its callers see it, in plain C++: no torch and no CUDA header in here.
//
//   cut():   tensors -> work items, once per plan; they stay in device memory
//   launch(): one step of all of them; pointers and coefficients travel as the kernel's arguments
#pragma once
#include <cstdint>
#include <vector>

#include "common/step.h"

#ifndef CGES_THREADS
#define CGES_THREADS 256
#endif
#ifndef CGES_ROW_ELEMENTS  // another one for tests that count instructions
#define CGES_ROW_ELEMENTS 16
#endif

namespace cges::cuda {

constexpr int kThreads = CGES_THREADS;  // of a block
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kClusterSize = 8;  // blocks that share one slab: the most that every sm_90 takes
constexpr int kMaxTensors = 1000;
// That a thread of the kernels for rows holds in registers, of a type of so many bytes.
template <int bytes>
constexpr int kElementsOfThread = bytes == 8 ? CGES_ROW_ELEMENTS / 2 : CGES_ROW_ELEMENTS;

// A block's work in the kernels for rows: contiguous groups, one after the other; or elements on their own, each
// a group (ones) or in none (elements), as if they were one group.
struct alignas(16) Strip {
  enum class Kind : int32_t { elements, ones, groups };

  int64_t begin;  // the first element
  int32_t tensor;
  Kind kind;
  int32_t size, groups;  // elements of a group, and how many of them
  int32_t lanes;         // threads side by side that share a group
  int32_t width;         // elements side by side that a thread has: 16 bytes, or one
};

// A block's work in the other kernels: rows x columns elements of one tensor, the columns contiguous.
//   elements: no groups
//   slab:     whole groups, or a block's part of a cluster's or a panel's
struct Item {
  enum class Kind : int32_t { elements, slab };

  int64_t begin;  // the first element
  int64_t pitch;  // elements from one row to the next
  int32_t tensor;
  Kind kind;
  int32_t rows, columns;
  int32_t last_columns;  // columns of the last row, which may be shorter
  int32_t run;           // adjacent columns of one group
  int32_t lanes;         // threads side by side in a row
  // Of a chunk: its panel, its place among the panel's chunks, where in the scratch the panel's part begins,
  // and the window of chunks that it belongs to.
  int32_t panel, chunk, chunks;
  int64_t scratch;
  int32_t window_begin, window_size;

  CGES_FN int32_t groups() const { return kind == Kind::slab ? columns / run : 0; }
};

// What one group adds up to.
template <typename A>
struct Sums {
  GroupStats<A> stats;
  A alive;  // of weights that are not 0, counted where zeros are frozen group by group

  CGES_FN void operator+=(const Sums& x) {
    stats.count += x.stats.count;
    stats.l1 += x.stats.l1;
    stats.l2_squared += x.stats.l2_squared;
    alive += x.alive;
  }
};

// What a panel keeps of a group from one sweep to the next.
template <typename A>
struct GroupState {
  ShrinkageSolver<A> solver;
  int32_t alive;
};

// A panel's part of the scratch: GroupState [groups], then Sums [chunks, groups].
CGES_FN int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <typename A>
CGES_FN int64_t state_bytes(int64_t groups) {
  return round_up(groups * sizeof(GroupState<A>), 16);
}

// A block's shared memory, in bytes from its beginning. The arrays by group are there where groups are.
template <typename A>
struct SharedLayout {
  int64_t entries, exchange, solvers, alive, z;

  CGES_FN explicit SharedLayout(int64_t groups)
      : entries(16),  // the first word is what one thread tells all
        exchange(entries + (groups > 0 ? kThreads * int64_t(sizeof(Sums<A>)) : 0)),
        solvers(exchange + 2 * groups * int64_t(sizeof(Sums<A>))),
        alive(solvers + groups * int64_t(sizeof(ShrinkageSolver<A>))),
        z(round_up(alive + groups * 4, 16)) {}
};

struct Device {
  int index = 0;
  int64_t multiprocessors = 1;
  int64_t shared_bytes = 0;  // that a block may have so that two fit a multiprocessor
  int64_t l2_bytes = 0;
  bool clusters = false;
};

// Counters, in device memory: the next ticket, how many have ended, and two per panel.
constexpr int kCounters = 2, kPanelCounters = 2;

struct Work {
  std::vector<Strip> strips;                       // one block each,
  int32_t strip_threads = 0;                       // of so many threads
  bool ones = false;                               // whether there are strips of them
  std::vector<Item> blocks;                        // one block each
  std::vector<Item> clusters;                      // kClusterSize of them a cluster
  std::vector<Item> chunks;                        // of panels, in windows of whole ones
  int64_t shared_blocks = 0, shared_clusters = 0;  // bytes of shared memory
  int64_t scratch_bytes = 0;
  int32_t panels = 0;
};

// How many param groups one launch can carry.
int max_param_groups(DType dtype);

// How a tensor is cut depends on its layout, dtype and device alone, never on its neighbours; but elements
// without groups, whose bits no cut can change, ride in whichever kernel runs anyway.
Work cut(const std::vector<TensorShape>& tensors, DType dtype, const Device& device);

// One step of at most kMaxTensors tensors of one dtype and device.
struct Step {
  const Work& work;
  const Strip* strips;
  const Item *blocks, *clusters, *chunks;  // work's, in device memory
  void* scratch;
  int32_t* counters;  // zeros before the first step; every step leaves zeros
  const std::vector<TensorAddresses>& tensors;
  const std::vector<Phase>& phases;
  const std::vector<int32_t>& param_groups;  // of each tensor, one of `hyperparameters`
  const std::vector<Hyperparameters>& hyperparameters;
  LossScale loss_scale;
};

// What follows throws std::runtime_error where the driver or the device cannot.
Device describe_device(int index);
void check_device(int index);                                                // that this build runs on it
void check_launchable(const Work& work, DType dtype, const Device& device);  // before anything is written
// `launched` tells whether an earlier part of this step has been launched, for the error, and becomes true.
void launch(const Step& step, DType dtype, const Device& device, void* stream, bool& launched);

// For tests: at most so much shared memory, so that small groups count as large.
void limit_shared_bytes(int64_t bytes);

}  // namespace cges::cuda
