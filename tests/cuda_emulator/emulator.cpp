// Runs CUDA kernels on the calling thread: one fiber per CUDA thread, a few blocks interleaved, in an order
// drawn from a seed. A fiber runs until it must wait (barriers, exchanges in a warp) or may (atomics,
// fences); then one of those that can go on is drawn. What cannot end (a barrier that not all reach, a spin
// for what never comes) ends the launch with cudaErrorLaunchFailure and a message, and its fibers are dropped
// where they stand, without destructors.
//
// Stricter than a GPU: a barrier or an exchange does not complete without threads that have ended, every mask
// names lanes that exist, a vote and a shuffle of one mask do not pair. A spin must call __nanosleep or an
// atomic, or it hangs. Shared memory starts as NaN, and ends with its block.
#include "emulator.h"

#include <bit>
#include <mutex>
#include <string_view>
#include <unordered_map>

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
  synchronise(me, &first, for_each);  // what was released to it before, it knows already
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

// ---- the device

namespace {

struct Setting {
  const char* name;
  long long initial;
  int attribute = -1;  // the cudaDeviceAttr that reads it
  long long value = initial;
};
Setting settings[] = {
    {"seed", 0},
    {"launches", 0},
    {"fail_launch", 0},
    {"blocks_in_flight", 4},
    {"driver_version", 12080},
    {"runtime_version", 12080},
    {"multiprocessors", 4, cudaDevAttrMultiProcessorCount},
    {"l2_bytes", 50 << 20, cudaDevAttrL2CacheSize},
    {"compute_capability", 9, cudaDevAttrComputeCapabilityMajor},
    {"cluster_launch", 1, cudaDevAttrClusterLaunch},
    {"shared_memory_per_block", 227 << 10, cudaDevAttrMaxSharedMemoryPerBlockOptin},
    {"shared_memory_per_multiprocessor", 228 << 10, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
    {"reserved_shared_memory", 1 << 10, cudaDevAttrReservedSharedMemoryPerBlock},
};
Setting* find(std::string_view name) {
  for (Setting& setting : settings) {
    if (setting.name == name) return &setting;
  }
  return nullptr;
}
long long& setting(std::string_view name) { return find(name)->value; }

struct FunctionAttributes {
  int shared_memory = 48 << 10, largest_cluster = 8;
};
std::unordered_map<const void*, FunctionAttributes> functions;
std::mutex one_launch;  // at a time in a process
cudaError_t last_error = cudaSuccess, message_of = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t refuse(cudaError_t error, std::string why) {
  message = std::move(why);
  return result(message_of = error);
}

cudaError_t give(int* place, long long value) {
  *place = int(value);
  return cudaSuccess;
}

// A driver serves the minor versions of its own major version too.
bool driver_serves() { return setting("driver_version") / 1000 >= setting("runtime_version") / 1000; }

// 0 where the attributes ask for what cannot be.
unsigned cluster_size_of(const cudaLaunchConfig_t& config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const uint3 dim = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      size = dim.y == 1 && dim.z == 1 ? dim.x : 0;
  }
  return size;
}

}  // namespace

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
  ++setting("launches");
  if (setting("fail_launch") > 0 && --setting("fail_launch") == 0) {
    return refuse(cudaErrorLaunchFailure, "a launch that was told to fail");
  }
  kernel = called;
  gridDim = grid;
  blockDim = block;
  shared_bytes = config.dynamicSmemBytes;
  random_state = uint64_t(setting("seed")) << 32 ^ uint64_t(setting("launches"));
  run_grid(cluster, size_t(setting("blocks_in_flight")));
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
  const size_t each = shared + setting("reserved_shared_memory");
  const size_t by_memory = each ? setting("shared_memory_per_multiprocessor") / each : 32;
  return give(blocks, std::min({by_memory, size_t(2048 / threads), size_t(32)}));
}

cudaError_t occupancy(int* clusters, const void*, const cudaLaunchConfig_t& config) {
  const unsigned size = cluster_size_of(config);
  if (!setting("cluster_launch")) return result(cudaErrorNotSupported);
  if (size == 0) return result(cudaErrorInvalidClusterSize);
  occupancy(clusters, int(config.blockDim.x * config.blockDim.y * config.blockDim.z),
            config.dynamicSmemBytes);
  return give(clusters, *clusters * setting("multiprocessors") / size);
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
