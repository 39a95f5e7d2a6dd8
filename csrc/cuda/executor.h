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
// That a thread of the kernels for rows holds in registers, of a type of so many bytes.
template <int bytes>
constexpr int kElementsOfThread = bytes == 8 ? CGES_ROW_ELEMENTS / 2 : CGES_ROW_ELEMENTS;

// A block's work in the kernels for rows: contiguous groups, one after the other; or elements on their own,
// each a group (ones) or in none (elements), as if they were one group.
struct alignas(16) Strip {
  enum class Kind : int32_t { elements, ones, groups };

  int64_t begin;  // the first element
  int32_t tensor;
  Kind kind;
  int32_t size, groups;  // elements of a group, and how many of them
  int32_t lanes;         // threads side by side that share a group
  int32_t width;         // elements side by side that a thread has: 16 bytes, or one
};

constexpr int kTileThreads = 2 * kThreads;  // of a block of the kernel for tiles
// A ring of slots, each for what all threads read of one row: 16 bytes of a weight, its gradient and each
// state. All but one of them are under way: two where there is shared memory enough.
constexpr int kMostSlots = 3, kLeastSlots = 2;
CGES_FN constexpr int ring_arrays(int states) { return 2 + states; }
CGES_FN constexpr int64_t slot_bytes(int states) { return ring_arrays(states) * kTileThreads * int64_t{16}; }

// What such a block has on its chip at a time: whole groups, or elements without groups. Matrices of rows x
// columns elements, one after the other in memory; or, of one matrix, some of its columns. The block's
// threads lie `across` its columns, each with 16 bytes of them, and `down` its rows; then they pass on to
// the next rows. Of groups that no block holds, a tile has some rows: it is one of the parts of a panel,
// which wait for each other's sums.
struct alignas(16) Tile {
  enum class Kind : uint16_t { elements, groups };
  static constexpr uint32_t kOne = 1u << 20;

  int64_t begin;  // the first element
  int64_t pitch;  // elements from one row to the next
  int32_t rows;
  uint16_t tensor;
  Kind kind;
  uint16_t columns, last_columns;  // of the last row, which may be shorter
  uint16_t run;                    // adjacent columns of one group
  uint16_t groups_each, groups;    // of one matrix, of all
  uint16_t lanes, across, down;    // threads side by side in one matrix, in all; rows at once
  uint16_t passes;                 // until all rows have had their turn; 0: there is no tile
  uint16_t parts, part;            // of its panel, 1 if it is all of it; which of them this is
  uint32_t across_inverse;         // kOne / across, upwards
  int32_t panel;                   // whose counters its parts share, and
  int64_t sums;                    // where in the scratch theirs lie

  // Which of the `down` rows has thread t. The quotient is exact for fewer than 1,024 threads.
  CGES_FN int row_of(int t) const { return int(uint32_t(t) * across_inverse / kOne); }
};
static_assert(sizeof(Tile) == 64 && kTileThreads <= 1024);
// Passes that a block makes at least, so that the ring never spans three tiles.
constexpr int kLeastPasses = kMostSlots - 1;
// Of a queue of tiles: the one before, the present one and the next, and two that are on their way.
constexpr int kQueue = 8;

// A block's shared memory in that kernel, in bytes from its beginning: the queue of tiles, each group's (s,
// t) and whether it is alive, the ring, z.
template <typename A>
struct TileMemory {
  int64_t found = kQueue * int64_t(sizeof(Tile)),
          alive = found + kTileThreads * int64_t(sizeof(Shrinkage<A>)), ring = alive + kTileThreads * 4, z;

  CGES_FN TileMemory(int slots, int states) : z(ring + slots * slot_bytes(states)) {}
};

// A block's work in the kernel for chunks: rows x columns elements of one tensor, the columns contiguous,
// which are a part of a panel's groups.
struct Item {
  int64_t begin;  // the first element
  int64_t pitch;  // elements from one row to the next
  int32_t tensor;
  int32_t rows, columns;
  int32_t last_columns;  // columns of the last row, which may be shorter
  int32_t run;           // adjacent columns of one group
  int32_t lanes;         // threads side by side in a row
  // Of a chunk: its panel, its place among the panel's chunks, where in the scratch the panel's part begins,
  // and the window of chunks that it belongs to.
  int32_t panel, chunk, chunks;
  int64_t scratch;
  int32_t window_begin, window_size;

  CGES_FN int32_t groups() const { return columns / run; }
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

// A panel's part of the scratch, if it is in chunks: GroupState [groups], then Sums [chunks, groups]; if
// tiles share it: Sums [2, parts, groups], by turns from sweep to sweep.
CGES_FN int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <typename A>
CGES_FN int64_t state_bytes(int64_t groups) {
  return round_up(groups * sizeof(GroupState<A>), 16);
}
template <typename A>
CGES_FN int64_t sums_bytes(int64_t groups, int64_t parts) {
  return 2 * parts * groups * int64_t(sizeof(Sums<A>));
}

// A block's shared memory in that kernel, in bytes from its beginning.
template <typename A>
struct SharedLayout {
  int64_t entries, exchange, solvers, alive, z;

  CGES_FN explicit SharedLayout(int64_t groups)
      : entries(16),  // the first word is what one thread tells all
        exchange(entries + kThreads * int64_t(sizeof(Sums<A>))),
        solvers(exchange + 2 * groups * int64_t(sizeof(Sums<A>))),
        alive(solvers + groups * int64_t(sizeof(ShrinkageSolver<A>))),
        z(round_up(alive + groups * 4, 16)) {}
};

struct Device {
  int index = 0;
  int64_t multiprocessors = 1;
  int64_t shared_bytes = 0;  // that a block may have so that two fit a multiprocessor
  int64_t tile_bytes = 0;    // that a block alone may have
  int64_t l2_bytes = 0;
  bool cooperative = false;  // whether all blocks of a launch can be had at once
};

// Counters, in device memory: the next ticket, how many have ended, and two per panel, of tiles or of chunks.
constexpr int kCounters = 2, kPanelCounters = 2;

struct Work {
  std::vector<Strip> strips;   // one block each,
  int32_t strip_threads = 0;   // of so many threads
  bool ones = false;           // whether there are strips of them
  std::vector<Tile> tiles;     // shared out to blocks that all run at once
  int32_t tiles_in_parts = 0;  // of these, which come first
  int32_t tile_blocks = 0;     // prepare() finds out how many
  int32_t slots = 0;           // of the ring
  int32_t z_passes = 0;        // for which there is room
  std::vector<Item> chunks;    // of panels, in windows of whole ones
  // bytes of shared memory
  int64_t shared_tiles = 0, shared_chunks = 0;
  int64_t scratch_bytes = 0;
  int32_t panels = 0;
};

// How many tensors and param groups one launch can carry.
struct Capacity {
  int64_t tensors, param_groups;
};
Capacity capacity(Rule rule, DType dtype);

// How a tensor is cut depends on its layout, dtype and device alone, never on its neighbours; but elements
// without groups, whose bits no cut can change, ride in whichever kernel runs anyway.
Work cut(const std::vector<TensorShape>& tensors, Rule rule, DType dtype, const Device& device);

// One step of as many tensors of one dtype and device as a launch can carry.
struct Step {
  const Work& work;
  const Strip* strips;  // work's, in device memory
  const Tile* tiles;
  const Item* chunks;
  void* scratch;
  int32_t* counters;  // zeros before the first step; every step leaves zeros
  void* corrected;    // kCorrectedBytes for each tensor; what a step finds there does not matter
  const std::vector<TensorInStep>& tensors;
  const std::vector<int32_t>& param_groups;  // of each tensor, one of `hyperparameters`
  const std::vector<Hyperparameters>& hyperparameters;
  LossScale loss_scale;
};

// What follows throws std::runtime_error where the driver or the device cannot.
Device describe_device(int index, Rule rule);
void check_device(int index);  // that this build runs on it
// Loads its kernels, before anything is written.
void prepare(Work& work, Rule rule, DType dtype, const Device& device);
// `launched` tells whether an earlier part of this step has been launched, for the error, and becomes true.
void launch(const Step& step, Rule rule, DType dtype, const Device& device, void* stream, bool& launched);

// Of memory on the device, for each tensor whose numbers the host does not know.
constexpr int64_t kCorrectedBytes = 16;

// For tests: at most so much shared memory and so many multiprocessors, so that small groups count as large.
void limit_device(int64_t shared_bytes, int64_t multiprocessors);

}  // namespace cges::cuda
