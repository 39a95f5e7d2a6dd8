// The grid that runs: its fibers, the order in which they go on, their barriers, and how a launch begins and
// ends. Part of emulator.cpp.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>

#include "cuda_pipeline_primitives.h"
#include "cuda_runtime.h"
#include "fiber.h"

namespace emulator {
namespace {

// In the order of the enum Stop.
constexpr const char* kStopNames[] = {
    "work",         "__syncthreads", "__syncthreads_and", "__syncthreads_or",
    "cluster.sync", "__syncwarp",    "__shfl_sync",       "__shfl_xor_sync",
    "__any_sync",   "__all_sync",    "__ballot_sync",     "an atomic, a fence or __nanosleep",
    "their end"};
constexpr unsigned kPatience = 1 << 24;  // the most looks of spins at memory while no block starts or ends

struct Block;
struct Cluster;

struct Fiber : Context {
  Block* block;
  uint3 index;
  Stop stop = Stop::running;
  uint64_t value;            // the value that it gives to an exchange, and then the one that it gets
  unsigned source;           // the lane from which it wants a value
  std::vector<Copy> copies;  // asynchronous copies under way, oldest first
  unsigned batches = 0;      // the number of commits until now
};

struct Warp {
  struct Group {  // lanes at an exchange that others have not reached
    Stop stop;
    unsigned mask, arrived;
  };
  Group groups[warpSize];
  unsigned waiting = 0;  // the number of groups
};

struct Barrier {
  Stop stop;
  unsigned arrived = 0;
  bool all, any;
};

struct Block {
  Cluster* cluster;
  unsigned rank;
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> ready;
  unsigned ended = 0;  // the number of fibers that have ended
  unsigned char* shared;
  Barrier barrier;
  bool slow;  // a slow block seldom has its turn, so that blocks drift apart
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned ended = 0;  // the number of blocks that have ended
  Barrier barrier;
};

// The launch that runs. There is one at a time in a process.
Fibers fibers;
Context host;
Kernel kernel;
size_t shared_bytes;
std::vector<std::unique_ptr<Cluster>> in_flight;
Fiber* current;
Block* turn;            // the block that runs alone until all of its fibers wait, or chance ends its turn
unsigned ready, looks;  // how many fibers can go on; how many looks spins made since a block started or ended
bool failed;
std::string message;
uint64_t random_state;

uint64_t random_below(uint64_t n) {  // splitmix64
  uint64_t x = random_state += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return ((x ^ x >> 31) >> 32) * n >> 32;
}

unsigned threads() { return blockDim.x * blockDim.y * blockDim.z; }
unsigned lane(const Fiber& fiber) { return unsigned(&fiber - fiber.block->fibers.data()) % warpSize; }

// ---- from fiber to fiber

void make_ready(Fiber& fiber, Stop stop = Stop::running) {
  fiber.stop = stop;
  fiber.block->ready.push_back(&fiber);
  ++ready;
}

// A fiber that can go on, drawn at random; null if none can.
Fiber* draw() {
  if (ready == 0) return nullptr;
  if (!turn || turn->ready.empty() || random_below(64) == 0) {
    do {
      Cluster& cluster = *in_flight[random_below(in_flight.size())];
      turn = &cluster.blocks[random_below(cluster.blocks.size())];
    } while (turn->ready.empty() || (turn->slow && random_below(16) != 0));
  }
  std::swap(turn->ready[random_below(turn->ready.size())], turn->ready.back());
  Fiber* fiber = turn->ready.back();
  turn->ready.pop_back();
  --ready;
  return fiber;
}

// Continues in `to`, or in the host's loop where it is null.
void go_on(Context& from, Fiber* to, bool for_ever = false) {
  current = to;
  if (to) {
    to->stop = Stop::running;
    threadIdx = to->index;
    blockIdx = to->block->index;
  }
  if (to != &from) switch_to(from, to ? *to : host, for_ever);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  Fiber& me = *current;
  pose_as(host);  // so that TSan does not take the text for the kernel's data
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = std::string(text) + " in thread " + std::to_string(threadIdx.x) + " of block " +
            std::to_string(blockIdx.x);
  failed = true;
  go_on(me, nullptr, true);
  __builtin_unreachable();
}

void look() {
  if (++looks > kPatience) fail("a spin that does not end");
}

void entry() {
  Fiber& me = *current;
  arrive(me);
  kernel.run(kernel.arguments);
  if (!me.copies.empty()) fail("an end with %zu asynchronous copies never waited for", me.copies.size());
  Block& block = *me.block;
  me.stop = Stop::ended;
  release(&in_flight);
  release(&block);
  const bool last = ++block.ended == block.fibers.size();
  if (last) {
    acquire(&block);  // a thread that still uses this memory races with this, or uses it after it was freed
    free(std::exchange(block.shared, nullptr));
    ++block.cluster->ended;
  }
  go_on(me, last ? nullptr : draw(), true);
}

// Waits until all threads of these blocks have come here.
int meet(Stop stop, Barrier& barrier, std::span<Block> blocks, int predicate) {
  Fiber& me = *current;
  if (barrier.arrived == 0) barrier = {stop, 0, true, false};
  if (barrier.stop != stop) {
    fail("%s while others wait at %s", kStopNames[int(stop)], kStopNames[int(barrier.stop)]);
  }
  barrier.all &= predicate != 0;
  barrier.any |= predicate != 0;
  if (++barrier.arrived < blocks.size() * threads()) {
    me.stop = stop;
    go_on(me, draw());
    return int(me.value);
  }
  const auto for_each = [&](auto f) {
    for (Block& block : blocks) {
      for (Fiber& fiber : block.fibers) f(fiber);
    }
  };
  synchronise(me, &barrier, for_each);
  barrier.arrived = 0;
  for_each([&](Fiber& fiber) {
    fiber.value = stop == Stop::syncthreads_and ? barrier.all : barrier.any;
    if (&fiber != &me) make_ready(fiber);
  });
  return int(me.value);
}

// ---- a launch

void start_cluster(unsigned first, unsigned size) {
  Cluster& cluster = *in_flight.emplace_back(std::make_unique<Cluster>());
  cluster.blocks.resize(size);
  for (Block& block : cluster.blocks) {
    block.cluster = &cluster;
    block.rank = unsigned(&block - cluster.blocks.data());
    const unsigned n = first + block.rank;
    block.index = {n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y};
    block.slow = random_below(4) == 0;
    void* shared;
    if (posix_memalign(&shared, 128, shared_bytes) != 0) throw std::bad_alloc();
    block.shared = static_cast<unsigned char*>(std::memset(shared, 0xff, shared_bytes));  // NaN
    block.fibers.resize(threads());
    block.ready.reserve(threads());
    block.warps.resize((threads() + warpSize - 1) / warpSize);
    for (unsigned t = 0; t < threads(); ++t) {
      Fiber& fiber = block.fibers[t];
      fibers.make(fiber, host, entry);
      fiber.block = &block;
      fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      make_ready(fiber);
    }
  }
  looks = 0;
}

void drop(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    for (Fiber& fiber : block.fibers) {
      if (failed) {  // the fiber has not reached its end, where it would have done this
        pose_as(fiber);
        release(&in_flight);
        pose_as(host);
      }
      fibers.give_back(fiber, failed);
    }
    free(block.shared);
  }
  turn = nullptr;
  looks = 0;
}

std::string where_all_are() {
  std::string text;
  for (const auto& cluster : in_flight) {
    for (const Block& block : cluster->blocks) {
      unsigned at[std::size(kStopNames)] = {};
      for (const Fiber& fiber : block.fibers) ++at[size_t(fiber.stop)];
      text += "; block " + std::to_string(block.index.x) + " of " + std::to_string(threads()) + " threads:";
      for (size_t i = 0; i < std::size(at); ++i) {
        if (at[i]) text += " " + std::to_string(at[i]) + " at " + kStopNames[i];
      }
    }
  }
  return text;
}

void run_grid(unsigned cluster_size, size_t blocks_in_flight) {
  std::vector<unsigned> order(gridDim.x * gridDim.y * gridDim.z / cluster_size);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  IF_TSAN(host.tsan_thread = __tsan_get_current_fiber();)
  turn = nullptr;
  ready = 0;
  failed = false;
  while (true) {
    std::erase_if(in_flight, [](auto& cluster) {
      const bool over = cluster->ended == cluster->blocks.size();
      if (over) drop(*cluster);
      return over;
    });
    while (!order.empty() &&
           (in_flight.empty() || (in_flight.size() + 1) * cluster_size <= blocks_in_flight)) {
      start_cluster(order.back() * cluster_size, cluster_size);
      order.pop_back();
    }
    if (in_flight.empty()) break;
    if (Fiber* next = draw()) {
      go_on(host, next);
    } else {
      failed = true;
      message = "deadlock";
    }
    if (failed) {
      message += where_all_are();
      for (auto& cluster : in_flight) drop(*cluster);
      in_flight.clear();
      break;
    }
  }
  acquire(&in_flight);
  fibers.end_launch();
}

}  // namespace
}  // namespace emulator
