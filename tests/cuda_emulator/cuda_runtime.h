// Stands in for the part of the CUDA runtime that this project's kernels use. An unchanged .cu file compiles
// with the host compiler and runs on the CPU, with one fiber for each CUDA thread; see emulator.cpp. Only
// what the kernels use is here, and it is written to be simple rather than fast.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#include "accesses.h"

// ---- vectors and indices

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATOR_VECTORS(T, name)                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(float, float)
#undef EMULATOR_VECTORS

// The scheduler sets these whenever it switches to another fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- what kernels call

namespace emulator {
// The operation at which a thread has stopped.
enum class Stop : unsigned char {
  running,
  syncthreads,
  syncthreads_and,
  syncthreads_or,
  cluster_sync,  //
  syncwarp,
  shfl,
  shfl_xor,
  any,
  all,
  ballot,
  nanosleep,
  ended
};

unsigned char* shared_memory();               // the block's own dynamic shared memory
unsigned char* shared_memory(unsigned rank);  // the one of another block of the cluster
unsigned cluster_rank();
unsigned cluster_size();
int barrier(Stop, int predicate = 0);
// Each lane of the mask gets the value of its source lane, or the ballot in a vote.
uint64_t exchange(Stop, unsigned mask, uint64_t value = 0, unsigned source = 0);
void sleep();
void may_switch();  // lets other threads go first; called wherever threads can see each other's work
void trap();

template <typename T>
T shuffle(Stop where, unsigned mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(where, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
using Same = std::type_identity_t<T>;
template <typename T>
concept Word = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;
}  // namespace emulator

inline void __syncthreads() { emulator::barrier(emulator::Stop::syncthreads); }
inline int __syncthreads_and(int p) { return emulator::barrier(emulator::Stop::syncthreads_and, p); }
inline int __syncthreads_or(int p) { return emulator::barrier(emulator::Stop::syncthreads_or, p); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::exchange(emulator::Stop::syncwarp, mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(emulator::Stop::shfl, mask, value, unsigned(lane) % warpSize);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emulator::shuffle(emulator::Stop::shfl_xor, mask, value,
                           (threadIdx.x ^ unsigned(lane_mask)) % warpSize);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return unsigned(emulator::exchange(emulator::Stop::ballot, mask, p != 0));
}
inline int __any_sync(unsigned mask, int p) {
  return emulator::exchange(emulator::Stop::any, mask, p != 0) != 0;
}
inline int __all_sync(unsigned mask, int p) {
  return emulator::exchange(emulator::Stop::all, mask, p != 0) == mask;
}

// These are not in emulator.cpp, because TSan has to see them.
template <emulator::Word T>
T atomicAdd(T* p, emulator::Same<T> value) {
  emulator::may_switch();
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
template <emulator::Word T>
T atomicOr(T* p, emulator::Same<T> value) {
  emulator::may_switch();
  return __atomic_fetch_or(p, value, __ATOMIC_SEQ_CST);
}
template <emulator::Word T>
T atomicExch(T* p, emulator::Same<T> value) {
  emulator::may_switch();
  return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}
template <emulator::Word T>
T atomicCAS(T* p, emulator::Same<T> expected, emulator::Same<T> value) {
  emulator::may_switch();
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
template <emulator::Word T>
T atomicMax(T* p, emulator::Same<T> value) {
  emulator::may_switch();
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (old < value &&
         !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

inline void __threadfence() { emulator::may_switch(); }
inline void __nanosleep(unsigned) { emulator::sleep(); }
inline void __trap() { emulator::trap(); }

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
using std::max;
using std::min;

// ---- what the host calls; numbers as in the real headers

#define EMULATOR_ERRORS                                   \
  EMULATOR_ERROR(cudaSuccess, 0)                          \
  EMULATOR_ERROR(cudaErrorInvalidValue, 1)                \
  EMULATOR_ERROR(cudaErrorInvalidConfiguration, 9)        \
  EMULATOR_ERROR(cudaErrorInsufficientDriver, 35)         \
  EMULATOR_ERROR(cudaErrorNoDevice, 100)                  \
  EMULATOR_ERROR(cudaErrorInvalidDevice, 101)             \
  EMULATOR_ERROR(cudaErrorNoKernelImageForDevice, 209)    \
  EMULATOR_ERROR(cudaErrorLaunchFailure, 719)             \
  EMULATOR_ERROR(cudaErrorCooperativeLaunchTooLarge, 720) \
  EMULATOR_ERROR(cudaErrorNotSupported, 801)              \
  EMULATOR_ERROR(cudaErrorInvalidClusterSize, 912)
#define EMULATOR_ERROR(name, number) name = number,
enum cudaError_t { EMULATOR_ERRORS };
#undef EMULATOR_ERROR
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };

using cudaStream_t = struct CUstream_st*;
union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  uint3 clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock, maxDynamicSharedSizeBytes;
};

const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);  // for a failed launch: what went wrong in it
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);

namespace emulator {
struct Kernel {
  const void* function;
  size_t parameter_bytes;
  void (*run)(const void* arguments);
  const void* arguments;
};
cudaError_t launch(const cudaLaunchConfig_t&, const Kernel&);
cudaError_t set_attribute(const void* function, cudaFuncAttribute, int value);
cudaError_t get_attributes(cudaFuncAttributes*, const void* function);
cudaError_t occupancy(int* blocks, int threads, size_t shared_bytes);
cudaError_t occupancy(int* clusters, const void* function, const cudaLaunchConfig_t&);
}  // namespace emulator

template <typename T>
cudaError_t cudaFuncSetAttribute(T* function, cudaFuncAttribute attribute, int value) {
  return emulator::set_attribute(reinterpret_cast<const void*>(function), attribute, value);
}
template <typename T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* function) {
  return emulator::get_attributes(attributes, reinterpret_cast<const void*>(function));
}
template <typename T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int threads, size_t shared_bytes) {
  return emulator::occupancy(blocks, threads, shared_bytes);
}
template <typename T>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, T* function, const cudaLaunchConfig_t* config) {
  return emulator::occupancy(clusters, reinterpret_cast<const void*>(function), *config);
}

// Runs the whole grid before it returns.
template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
  static_assert((sizeof(Expected) + ... + 0) <= 32764, "kernel parameters end at 32,764 bytes");
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<Expected...> arguments;
  };
  const Call call{kernel, {std::forward<Actual>(actual)...}};
  const auto run = [](const void* p) {
    const Call* call = static_cast<const Call*>(p);
    std::apply(call->kernel, call->arguments);
  };
  return emulator::launch(
      *config, {reinterpret_cast<const void*>(kernel), (sizeof(Expected) + ... + size_t(0)), run, &call});
}
