// The emulated device: its settings, its limits, and how it refuses a call. Part of emulator.cpp.
#pragma once
#include <algorithm>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>

#include "grid.h"

namespace emulator {
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
    {"cooperative_launch", 1, cudaDevAttrCooperativeLaunch},
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
std::mutex one_launch;  // one launch at a time in a process
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

// Null where the launch does not have this attribute.
const cudaLaunchAttributeValue* find(const cudaLaunchConfig_t& config, cudaLaunchAttributeID id) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == id) return &config.attrs[i].val;
  }
  return nullptr;
}

// The number of blocks of a cluster; 0 where the attributes ask for a cluster that is impossible.
unsigned cluster_size_of(const cudaLaunchConfig_t& config) {
  const auto* value = find(config, cudaLaunchAttributeClusterDimension);
  if (!value) return 1;
  const uint3 dim = value->clusterDim;
  return dim.y == 1 && dim.z == 1 ? dim.x : 0;
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  const auto* value = find(config, cudaLaunchAttributeCooperative);
  return value && value->cooperative;
}

// The number of blocks that a multiprocessor holds at once.
size_t blocks_held(size_t threads, size_t shared) {
  const size_t each = shared + setting("reserved_shared_memory");
  const size_t by_memory = each ? setting("shared_memory_per_multiprocessor") / each : 32;
  return std::min({by_memory, 2048 / threads, size_t(32)});
}

// The number of clusters that the device holds at once. A launch without clusters has clusters of one block.
size_t clusters_held(const cudaLaunchConfig_t& config) {
  const size_t threads = size_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const size_t blocks = blocks_held(threads, config.dynamicSmemBytes) * setting("multiprocessors");
  return blocks / cluster_size_of(config);
}

}  // namespace
}  // namespace emulator
