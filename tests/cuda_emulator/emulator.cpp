// Runs CUDA kernels on the calling thread, with one fiber for each CUDA thread and a few blocks interleaved.
// The order is drawn from a seed. A fiber runs until it has to wait (at barriers and exchanges in a warp) or
// may be interrupted (at atomics and fences). Then one of the fibers that can go on is drawn. A launch that
// cannot end, because not all threads reach a barrier or a spin never sees its value, fails with
// cudaErrorLaunchFailure and a message. Its fibers are dropped where they are, without running destructors.
//
// The emulator is stricter than a GPU. A barrier or an exchange does not complete without threads that have
// ended, a mask may only name lanes that exist, and a vote does not pair with a shuffle of the same mask. A
// spin has to call __nanosleep or an atomic, or else it hangs. Shared memory begins as NaN and is freed with
// its block.
#include "emulator.h"

#include <array>
#include <bit>

#include "device.h"
#include "grid.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

// ---- what kernels call

unsigned char* shared_memory() { return current->block->shared; }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return unsigned(current->block->cluster->blocks.size()); }
void trap() { fail("__trap"); }

unsigned char* shared_memory(unsigned rank) {
  if (rank >= cluster_size()) fail("map_shared_rank: rank %u in a cluster of %u", rank, cluster_size());
  unsigned char* shared = current->block->cluster->blocks[rank].shared;
  if (!shared) fail("map_shared_rank: block of rank %u has ended", rank);
  return shared;
}

int barrier(Stop stop, int predicate) {
  Block& block = *current->block;
  if (stop == Stop::cluster_sync) return meet(stop, block.cluster->barrier, block.cluster->blocks, 0);
  return meet(stop, block.barrier, {&block, 1}, predicate);
}

uint64_t exchange(Stop stop, unsigned mask, uint64_t value, unsigned source) {
  Fiber& me = *current;
  const char* name = kStopNames[int(stop)];
  Fiber* lanes = &me - lane(me);
  Warp& warp = me.block->warps[(lanes - me.block->fibers.data()) / warpSize];
  const bool shuffle = stop == Stop::shfl || stop == Stop::shfl_xor;
  const size_t size = std::min<size_t>(warpSize, me.block->fibers.data() + threads() - lanes);
  if (!(mask >> lane(me) & 1)) fail("%s: lane %u is not in its own mask %#x", name, lane(me), mask);
  if (uint64_t(mask) >> size) fail("%s: mask %#x in a warp of %zu lanes", name, mask, size);
  if (shuffle && !(mask >> source & 1)) fail("%s from lane %u, which is not in mask %#x", name, source, mask);

  Warp::Group* const end = warp.groups + warp.waiting;
  Warp::Group* group = std::find_if(warp.groups, end, [&](auto& other) { return other.mask == mask; });
  if (group == end) {
    *group = {stop, mask, 0};
    ++warp.waiting;
  }
  if (group->stop != stop) {
    fail("%s while others of mask %#x wait at %s", name, mask, kStopNames[int(group->stop)]);
  }
  me.value = value;
  me.source = source;
  group->arrived |= 1u << lane(me);
  if (group->arrived != mask) {
    me.stop = stop;
    go_on(me, draw());
    return me.value;
  }
  *group = warp.groups[--warp.waiting];
  const auto for_each = [&](auto f) {
    for (unsigned left = mask; left; left &= left - 1) f(lanes[std::countr_zero(left)]);
  };
  Fiber& first = lanes[std::countr_zero(mask)];
  synchronise(me, &first, for_each);  // it already knows everything that was released there before
  uint64_t values[warpSize], ballot = 0;
  for_each([&](Fiber& fiber) {
    values[lane(fiber)] = fiber.value;
    if (fiber.value) ballot |= 1u << lane(fiber);
  });
  for_each([&](Fiber& fiber) {
    fiber.value = shuffle ? values[fiber.source] : ballot;
    if (&fiber != &me) make_ready(fiber);
  });
  return me.value;
}

void sleep() {
  look();
  make_ready(*current, Stop::nanosleep);
  turn = nullptr;  // a spinning block does not keep its turn
  go_on(*current, draw());
}

void may_switch() {
  if (random_below(4) == 0) return sleep();
  look();
}

// ---- asynchronous copies and the log; both use the host's memory and are hidden from TSan

namespace {

struct AsHost {
  AsHost() { pose_as(host); }
  ~AsHost() { pose_as(*current); }
};

std::vector<std::array<long long, 5>> accesses;

bool is_multiple(const void* p, size_t n) { return reinterpret_cast<uintptr_t>(p) % n == 0; }

}  // namespace

void add_copy(Copy copy) {
  Fiber& me = *current;
  const auto* to = static_cast<const unsigned char*>(copy.to);
  const unsigned bytes = copy.bytes;
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy of %u bytes", bytes);
  if (copy.zeros > bytes) fail("an asynchronous copy of %u bytes, %u of them 0", bytes, copy.zeros);
  if (!is_multiple(to, bytes) || !is_multiple(copy.from, bytes)) {
    fail("a misaligned asynchronous copy of %u bytes", bytes);
  }
  if (to < me.block->shared || to + bytes > me.block->shared + shared_bytes) {
    fail("an asynchronous copy to what is not the block's shared memory");
  }
  const AsHost hidden;
  copy.batch = me.batches;
  me.copies.push_back(copy);
}

void commit_copies() { ++current->batches; }

bool take_copy(size_t prior, Copy* copy) {
  std::vector<Copy>& copies = current->copies;
  if (copies.empty() || copies.front().batch + prior >= current->batches) return false;
  const AsHost hidden;
  *copy = copies.front();
  copies.erase(copies.begin());
  return true;
}

void overwritten() { fail("a write to where an asynchronous copy is on its way to"); }

bool tracing = false;

void log_access(const void* address, size_t bytes, bool write) {
  const AsHost hidden;
  const auto at = reinterpret_cast<long long>(address);
  accesses.push_back({at, (long long)bytes, write, blockIdx.x, threadIdx.x});
}

// ---- the device

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& called) {
  const std::lock_guard lock(one_launch);
  const auto [grid, block] = std::pair(config.gridDim, config.blockDim);
  const size_t blocks = size_t(grid.x) * grid.y * grid.z, threads = size_t(block.x) * block.y * block.z;
  const unsigned cluster = cluster_size_of(config);
  const FunctionAttributes& function = functions[called.function];
  if (!driver_serves()) return refuse(cudaErrorInsufficientDriver, "the driver is too old");
  if (blocks == 0 || threads == 0 || threads > 1024) {
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + std::to_string(blocks) + " blocks of " +
                                                     std::to_string(threads) + " threads");
  }
  const size_t allowed = std::min<size_t>(function.shared_memory, setting("shared_memory_per_block"));
  if (config.dynamicSmemBytes > allowed) {
    return refuse(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of shared memory, of " + std::to_string(allowed) +
                                             " allowed");
  }
  if (called.parameter_bytes > 4096 && setting("driver_version") < 12010) {
    return refuse(cudaErrorInvalidValue, "more than 4,096 bytes of parameters need a driver for CUDA 12.1");
  }
  if (cluster != 1 && !setting("cluster_launch")) return refuse(cudaErrorNotSupported, "no clusters here");
  if (cluster == 0 || cluster > unsigned(function.largest_cluster) || grid.x % cluster != 0) {
    return refuse(cudaErrorInvalidClusterSize, "clusters of " + std::to_string(cluster));
  }
  const bool cooperative = is_cooperative(config);
  if (cooperative && !setting("cooperative_launch")) {
    return refuse(cudaErrorNotSupported, "no cooperative launches here");
  }
  if (cooperative && blocks / cluster > clusters_held(config)) {
    return refuse(cudaErrorCooperativeLaunchTooLarge,
                  std::to_string(blocks) + " blocks that must run at once, of which the device holds " +
                      std::to_string(clusters_held(config) * cluster));
  }
  ++setting("launches");
  if (setting("fail_launch") > 0 && --setting("fail_launch") == 0) {
    return refuse(cudaErrorLaunchFailure, "a launch that was told to fail");
  }
  kernel = called;
  gridDim = grid;
  blockDim = block;
  shared_bytes = config.dynamicSmemBytes;
  random_state = uint64_t(setting("seed")) << 32 ^ uint64_t(setting("launches"));
  run_grid(cluster, cooperative ? blocks : size_t(setting("blocks_in_flight")));
  if (!failed) return cudaSuccess;
  std::fprintf(stderr, "cuda_emulator: %s\n", message.c_str());
  return result(message_of = cudaErrorLaunchFailure);
}

cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(one_launch);
  FunctionAttributes& attributes = functions[function];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes.largest_cluster = value ? 16 : 8;
    return cudaSuccess;
  }
  if (value < 0 || value > setting("shared_memory_per_block")) return result(cudaErrorInvalidValue);
  attributes.shared_memory = value;
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* function) {
  const std::lock_guard lock(one_launch);
  *attributes = {0, 1024, functions[function].shared_memory};
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int threads, size_t shared) {
  return give(blocks, blocks_held(threads, shared));
}

cudaError_t occupancy(int* clusters, const void*, const cudaLaunchConfig_t& config) {
  if (!setting("cluster_launch")) return result(cudaErrorNotSupported);
  if (cluster_size_of(config) == 0) return result(cudaErrorInvalidClusterSize);
  return give(clusters, clusters_held(config));
}

}  // namespace emulator

using namespace emulator;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define EMULATOR_ERROR(name, number) \
  case name:                         \
    return #name;
    EMULATOR_ERRORS
#undef EMULATOR_ERROR
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error != cudaSuccess && error == message_of ? message.c_str() : cudaGetErrorName(error);
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaDriverGetVersion(int* version) { return give(version, setting("driver_version")); }
cudaError_t cudaRuntimeGetVersion(int* version) { return give(version, setting("runtime_version")); }
cudaError_t cudaGetDevice(int* device) {
  return driver_serves() ? give(device, 0) : result(cudaErrorInsufficientDriver);
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  for (const Setting& setting : settings) {
    if (setting.attribute == attribute) return give(value, setting.value);
  }
  return result(cudaErrorInvalidValue);
}

int emulator_set(const char* name, long long value) {
  Setting* setting = find(name);
  if (setting) setting->value = value;
  return setting ? 0 : -1;
}
long long emulator_get(const char* name) {
  const Setting* setting = find(name);
  return setting ? setting->value : -1;
}
void emulator_reset() {
  for (Setting& setting : settings) setting.value = setting.initial;
}
const char* emulator_message() { return message.c_str(); }

void emulator_trace(int on) {
  const std::lock_guard lock(one_launch);
  if (on) accesses.clear();
  tracing = on;
}
long long emulator_accesses(long long* out, long long most) {
  const std::lock_guard lock(one_launch);
  const auto rows = std::min(most, (long long)accesses.size());
  for (long long i = 0; i < rows; ++i) out = std::copy_n(accesses[i].data(), 5, out);
  return (long long)accesses.size();
}
