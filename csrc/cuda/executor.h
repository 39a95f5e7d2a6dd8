// The CUDA executor as its caller, plan/cuda_executor.cpp, sees it, and the work items that host and kernels
// share. This is plain C++ without torch or CUDA headers; docs/design/cuda-executor.md explains the kernels.
//
//   cut():    turns tensors into work items, once per plan; these are then kept in device memory
//   launch(): runs one step of all of them; addresses and coefficients travel as the kernels' arguments
#pragma once
#include <cstdint>
#include <vector>

#include "common/step.h"

#ifndef CGES_THREADS
#define CGES_THREADS 256
#endif
#ifndef CGES_ROW_ELEMENTS  // tests that count instructions set another number
#define CGES_ROW_ELEMENTS 16
#endif

namespace cges::cuda {

constexpr int kThreads = CGES_THREADS;  // the threads of a thread block
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
// The number of elements that a thread of step_rows holds in registers, for a type of `bytes` bytes.
template <int bytes>
constexpr int kElementsOfThread = bytes == 8 ? CGES_ROW_ELEMENTS / 2 : CGES_ROW_ELEMENTS;

// A block's work in step_rows: some groups that lie one after the other, each contiguous. It may also be a
// run of elements that need no common sums, because each is a group of its own (ones) or none has a group
// (elements); such a run is recorded as one group.
struct alignas(16) Strip {
  enum class Kind : int32_t { elements, ones, groups };

  int64_t begin;  // the index of its first element in the tensor
  int32_t tensor;
  Kind kind;
  int32_t size, groups;  // the number of elements of a group, the number of groups
  int32_t lanes;         // the number of neighbouring threads that share a group
  int32_t width;         // the number of neighbouring elements that a thread has: 16 bytes, or one element
  int64_t first_group;   // of kind `groups`: the index of its first group among those of all strips
};

constexpr int kTileThreads = 2 * kThreads;  // the threads of a block of step_tiles
// step_tiles reads through a ring of slots in shared memory. A slot takes what all threads read of one row
// each: 16 bytes of the weights, the gradients and each state. All slots but one are being filled at any
// time. There are three if shared memory suffices, else two.
constexpr int kMostSlots = 3, kLeastSlots = 2;
CGES_FN constexpr int ring_arrays(int states) { return 2 + states; }
CGES_FN constexpr int64_t slot_bytes(int states) { return ring_arrays(states) * kTileThreads * int64_t{16}; }

// The work that a block of step_tiles holds on the chip at a time: whole groups, or elements without
// groups. It is one or several matrices of rows x columns elements that lie one after the other in memory,
// or some columns of one matrix. The block's threads lie `across` the columns, with 16 bytes each, and
// `down` the rows. After these rows they pass on to the next ones. If no block can hold a group whole, a
// panel of such groups is cut into tiles of some rows each, its parts. These are on the chip at the same
// time, and wait for each other's sums.
struct alignas(16) Tile {
  enum class Kind : uint16_t { elements, groups };
  static constexpr uint32_t kOne = 1u << 20;

  int64_t begin;  // the index of its first element in the tensor
  int64_t pitch;  // the number of elements from one row to the next
  int32_t rows;
  uint16_t tensor;
  Kind kind;
  uint16_t columns, last_columns;  // the columns of a row, and of the last row, which may be shorter
  uint16_t run;                    // the number of adjacent columns of one group
  uint16_t groups_each, groups;    // the number of groups of one matrix, and of the whole tile
  uint16_t lanes, across, down;    // the threads across one matrix, the threads across all; the rows at once
  uint16_t passes;                 // the number of passes over its rows; 0 means that there is no tile
  uint16_t parts, part;            // the number of parts of its panel (1: it is whole), and its own index
  uint32_t across_inverse;         // kOne / across, rounded up
  int32_t panel;                   // the index of the panel, for the counters that its parts share
  int64_t sums;                    // the place of the sums of the panel's parts in the scratch

  // The row of thread t among the `down` rows: t / across, as a multiplication. It is exact for t < 1,024.
  CGES_FN int row_of(int t) const { return int(uint32_t(t) * across_inverse / kOne); }
};
static_assert(sizeof(Tile) == 64 && kTileThreads <= 1024);
// The fewest passes that a block makes over a tile. The ring is no more rows ahead than that, so it never
// reaches across a tile into a third one.
constexpr int kLeastPasses = kMostSlots - 1;
// Places for tiles in a block's queue. Five are in use: the tile before, the present one, the next, and two
// that are still being copied.
constexpr int kQueue = 8;

// The places of the arrays in the shared memory of a block of step_tiles, in bytes from its beginning: the
// queue of tiles, each group's (s, t), whether each group is alive, the ring, z.
template <typename A>
struct TileMemory {
  int64_t found = kQueue * int64_t(sizeof(Tile)),
          alive = found + kTileThreads * int64_t(sizeof(Shrinkage<A>)), ring = alive + kTileThreads * 4, z;

  CGES_FN TileMemory(int slots, int states) : z(ring + slots * slot_bytes(states)) {}
};

// A chunk, a block's work in step_chunks: rows x columns elements of one tensor, contiguous along the
// columns. It is a part of a panel: some neighbouring groups that not even several blocks together can hold.
struct Item {
  int64_t begin;  // the index of its first element in the tensor
  int64_t pitch;  // the number of elements from one row to the next
  int32_t tensor;
  int32_t rows, columns;
  int32_t last_columns;               // the number of columns of the last row, which may be shorter
  int32_t run;                        // the number of adjacent columns of one group
  int32_t lanes;                      // the number of threads side by side in a row
  int32_t panel, chunk, chunks;       // its panel, its place among the panel's chunks, and their number
  int64_t scratch;                    // the place in bytes at which the panel's part of the scratch begins
  int32_t window_begin, window_size;  // the chunks that go through the stages together with it

  CGES_FN int32_t groups() const { return columns / run; }
};

// The sums of one group.
template <typename A>
struct Sums {
  GroupStats<A> stats;
  A alive;  // not 0 if the group has a weight that is not 0; used where zeros are frozen by groups

  CGES_FN void operator+=(const Sums& x) {
    stats.count += x.stats.count;
    stats.l1 += x.stats.l1;
    stats.l2_squared += x.stats.l2_squared;
    alive += x.alive;
  }
};

// The state of a group that a panel of chunks keeps from one sweep to the next.
template <typename A>
struct GroupState {
  ShrinkageSolver<A> solver;
  int32_t alive;
};

// A panel's part of the scratch. For a panel of chunks it has GroupState [groups], then Sums [chunks,
// groups]. For one that tiles share it has Sums [2, parts, groups], of which sweeps use the two halves by
// turns.
CGES_FN int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <typename A>
CGES_FN int64_t state_bytes(int64_t groups) {
  return round_up(groups * sizeof(GroupState<A>), 16);
}
template <typename A>
CGES_FN int64_t sums_bytes(int64_t groups, int64_t parts) {
  return 2 * parts * groups * int64_t(sizeof(Sums<A>));
}

// The places of the arrays in the shared memory of a block of step_chunks, in bytes from its beginning.
template <typename A>
struct SharedLayout {
  int64_t entries, solvers, alive, z;

  CGES_FN explicit SharedLayout(int64_t groups)
      : entries(16),  // the first word holds the number that one thread passes to the others (tell_all)
        solvers(entries + kThreads * int64_t(sizeof(Sums<A>))),
        alive(solvers + groups * int64_t(sizeof(ShrinkageSolver<A>))),
        z(round_up(alive + groups * 4, 16)) {}
};

// The properties of a GPU on which cuts and launches depend.
struct Device {
  int index = 0;
  int64_t multiprocessors = 1;
  int64_t shared_bytes = 0;  // the shared memory that a block may have if two share a multiprocessor
  int64_t tile_bytes = 0;    // the shared memory that a block may have if it is alone on a multiprocessor
  int64_t l2_bytes = 0;
  bool cooperative = false;  // whether a launch can demand that all its blocks run at once
};

// The counters in device memory: the next ticket, the number of tickets that have ended, and two for each
// panel (see SharedPanel in tile_sums.cuh and Panel in items.cuh).
constexpr int kCounters = 2, kPanelCounters = 2;

// The work items of some tensors of one dtype and device, and the sizes that their launches need.
struct Work {
  std::vector<Strip> strips;   // each has a block of its own
  int32_t strip_threads = 0;   // the threads of such a block
  bool ones = false;           // whether some strips are of kind `ones`
  int64_t strip_groups = 0;    // the number of groups of all strips of kind `groups`
  std::vector<Tile> tiles;     // dealt out to blocks that all run at once
  int32_t tiles_in_parts = 0;  // the number of tiles that are parts of shared panels; they come first
  int32_t tile_blocks = 0;     // the number of blocks of step_tiles; prepare() sets it
  int32_t slots = 0;           // the slots of step_tiles' ring
  int32_t z_passes = 0;        // the number of passes for which the shared memory of step_tiles holds z
  std::vector<Item> chunks;    // the chunks of whole panels, ordered by windows
  // The bytes of shared memory of step_tiles and of step_chunks.
  int64_t shared_tiles = 0, shared_chunks = 0;
  int64_t scratch_bytes = 0;
  int32_t panels = 0;
};

// The number of tensors and param groups that one launch can carry.
struct Capacity {
  int64_t tensors, param_groups;
};
Capacity capacity(Rule rule, DType dtype);

// The cut of a tensor depends on its layout, dtype and device alone, never on its neighbours. Only elements
// without groups, whose bits no cut can change, are given to a kernel that runs anyway.
Work cut(const std::vector<TensorShape>& tensors, Rule rule, DType dtype, const Device& device);

// One step of tensors of one dtype and device, no more than one launch can carry.
struct Step {
  const Work& work;
  const Strip* strips;  // copies of work's strips, tiles and chunks in device memory
  const Tile* tiles;
  const Item* chunks;
  void* scratch;
  int32_t* counters;  // zeros before the first step, and every step leaves zeros
  void* corrected;    // kCorrectedBytes for each tensor; the content before a step does not matter
  // For each group of the strips (Strip::first_group) 1 if step_rows may skip it. Where skip_dead is set, the
  // step writes for each other group whether it has held it at zero.
  uint8_t* held;
  const std::vector<TensorInStep>& tensors;
  const std::vector<int32_t>& param_groups;  // for each tensor, its index into `hyperparameters`
  const std::vector<Hyperparameters>& hyperparameters;
  LossScale loss_scale;
};

// The functions below throw std::runtime_error where the driver or the device does not suffice.
Device describe_device(int index, Rule rule);
void check_device(int index);  // throws unless this build runs on that device
// Loads all kernels for the rule and dtype, before any step writes anything, and sets work.tile_blocks.
void prepare(Work& work, Rule rule, DType dtype, const Device& device);
// `launched` says whether an earlier part of this step has been launched, for the error message. It becomes
// true. If nothing of this part could be launched, its counts of steps on the device are as they were.
void launch(const Step& step, Rule rule, DType dtype, const Device& device, void* stream, bool& launched);

// The bytes of device memory for the numbers of one tensor that the host does not know (Own in rule.cuh).
constexpr int64_t kCorrectedBytes = 16;

// For tests: allows at most so much shared memory and so many multiprocessors, so that small groups count as
// large.
void limit_device(int64_t shared_bytes, int64_t multiprocessors);

}  // namespace cges::cuda
