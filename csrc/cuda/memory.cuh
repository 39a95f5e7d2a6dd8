// The kernels' accesses to device and shared memory, of 16 bytes wherever addresses allow it, and waiting for
// other blocks. All other .cuh files use it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/shrinkage.h"

namespace cges::cuda {

// Neighbouring elements; by default as many as one access of 16 bytes moves.
template <typename T, int n = 16 / sizeof(T)>
struct Pack {
  static constexpr int kSize = n;
  T x[n];
};

// `once` is for data that a step does not access again: its cache lines are evicted first, and others stay.
// All other data bypasses the L1, which would never be hit, and stays in the L2.
template <bool once, typename U>
__device__ __forceinline__ U load(const U* p) {
  if constexpr (once)
    return __ldcs(p);
  else
    return __ldcg(p);
}
template <bool once, typename U>
__device__ __forceinline__ void store(U* p, U value) {
  if constexpr (once)
    __stcs(p, value);
  else
    __stcg(p, value);
}

// Loads a pack of which only the first n elements exist; the others become 0. `wide` promises that all exist
// and that p is a multiple of 16 bytes.
template <bool once, int kSize, typename T>
__device__ __forceinline__ Pack<T, kSize> load_pack(const T* p, bool wide, int n = kSize) {
  Pack<T, kSize> pack;
  if (kSize > 1 && wide) {
    const uint4 raw = load<once>(reinterpret_cast<const uint4*>(p));
    std::memcpy(&pack, &raw, sizeof(pack));
  } else {
#pragma unroll
    for (int v = 0; v < kSize; ++v) pack.x[v] = v < n ? load<once>(p + v) : T(0.0f);
  }
  return pack;
}

// Stores a pack as load_pack loads one; elements that do not exist are not written.
template <bool once, int kSize, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kSize>& pack, bool wide, int n = kSize) {
  if (kSize > 1 && wide) {
    uint4 raw;
    std::memcpy(&raw, &pack, sizeof(pack));
    store<once>(reinterpret_cast<uint4*>(p), raw);
  } else {
#pragma unroll
    for (int v = 0; v < kSize; ++v)
      if (v < n) store<once>(p + v, pack.x[v]);
  }
}

__device__ __forceinline__ __nv_bfloat162 round_pair(__nv_bfloat16, float a, float b) {
  return __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ __half2 round_pair(__half, float a, float b) { return __floats2half2_rn(a, b); }

// Rounds numbers to T, two at a time where there is an instruction for it. With `zeros` every zero becomes
// +0.0. That is done after the rounding, which can make zeros itself. In 16 bits it is an addition of 0,
// which changes no other number than -0.0.
template <bool zeros, typename T, int n>
__device__ __forceinline__ Pack<T, n> round_pack(const Compute<T> (&x)[n]) {
  Pack<T, n> pack;
  if constexpr (sizeof(T) == 2 && n > 1) {
#pragma unroll
    for (int v = 0; v < n; v += 2) {
      auto pair = round_pair(T(), x[v], x[v + 1]);
      if (zeros) pair = __hadd2(pair, round_pair(T(), 0.0f, 0.0f));
      std::memcpy(&pack.x[v], &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int v = 0; v < n; ++v) {
      const T rounded = T(x[v]);
      pack.x[v] = zeros && rounded == T(0.0f) ? T(0.0f) : rounded;
    }
  }
  return pack;
}

// Loads and stores of data that other blocks write and read. They bypass the L1, which other blocks' writes
// do not reach.
template <typename U>
__device__ __forceinline__ U load_whole(const U* p) {
  static_assert(sizeof(U) % 16 == 0);
  U value;
  uint4 raw[sizeof(U) / 16];
  for (size_t i = 0; i < sizeof(U) / 16; ++i) raw[i] = load<false>(reinterpret_cast<const uint4*>(p) + i);
  std::memcpy(&value, raw, sizeof(U));
  return value;
}
template <typename U>
__device__ __forceinline__ void store_whole(U* p, const U& value) {
  uint4 raw[sizeof(U) / 16];
  std::memcpy(raw, &value, sizeof(U));
  for (size_t i = 0; i < sizeof(U) / 16; ++i) store<false>(reinterpret_cast<uint4*>(p) + i, raw[i]);
}

// Declares `name` as the block's dynamic shared memory. tests/cuda_emulator runs the kernels on the host.
#if CGES_EMULATED
#define CGES_SHARED(name) unsigned char* const name = emulator::shared_memory()
#else
#define CGES_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// One access of 16 bytes to shared memory.
template <typename T>
__device__ __forceinline__ Pack<T> load_shared(const T* p) {
  Pack<T> pack;
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  std::memcpy(&pack, &raw, sizeof(raw));
  return pack;
}
template <typename T>
__device__ __forceinline__ void store_shared(T* p, const Pack<T>& pack) {
  uint4 raw;
  std::memcpy(&raw, &pack, sizeof(raw));
  *reinterpret_cast<uint4*>(p) = raw;
}

constexpr unsigned kSpinNanoseconds = 64;
constexpr int64_t kSpinBudget = int64_t{1} << 31;  // some minutes; a longer wait would never end

// Waits until *counter >= at_least and returns the counter. A thread that raises it executes a fence first,
// and here a fence follows once the value has been seen. So all writes before the counter was raised are
// visible to this thread, and after a barrier to its whole block.
__device__ __forceinline__ int wait_for(int* counter, int at_least) {
#pragma unroll 1
  for (int64_t spins = 0; spins < kSpinBudget; ++spins) {
    const int seen = atomicAdd(counter, 0);
    if (seen >= at_least) {
      __threadfence();
      return seen;
    }
    __nanosleep(kSpinNanoseconds);
  }
  __trap();
  return 0;
}

}  // namespace cges::cuda
