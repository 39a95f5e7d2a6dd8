// Device memory as the kernels see it: 16 bytes an access wherever they may, all of it through these
// functions. Shared memory, and waiting for other blocks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/shrinkage.h"

namespace cges::cuda {

// Neighbouring elements; by default 16 bytes, what one access moves.
template <typename T, int n = 16 / sizeof(T)>
struct Pack {
  static constexpr int kSize = n;
  T x[n];
};

// Whoever reads a tensor once and never again says so (`once`): its lines then leave the caches first, and
// what others hold there stays. The rest passes by the L1, where nothing is found twice, and stays in the L2.
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

// A pack, of which `n` elements exist; `wide`: all of them do, and lie where one access of 16 bytes may
// begin.
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

// Numbers rounded to T, two at a time where there is an instruction for it. `zeros`: every zero becomes +0.0,
// after the rounding, which makes zeros of its own: for 16 bits by adding 0, exact for all that is not -0.0.
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

// What other blocks read or have written, 16 bytes at a time and past the L1.
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

#if CGES_EMULATED  // by tests/cuda_emulator, on the host
#define CGES_SHARED(name) unsigned char* const name = emulator::shared_memory()
#else
#define CGES_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// 16 bytes of shared memory.
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
constexpr int64_t kSpinBudget = int64_t{1} << 31;  // minutes: what waits longer waits for ever

// Until *counter >= at_least; what was written before it got there is then visible.
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
