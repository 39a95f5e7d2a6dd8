// Device memory as the kernels see it: 16 bytes an access wherever they may, all of it through these
// functions.
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

}  // namespace cges::cuda
