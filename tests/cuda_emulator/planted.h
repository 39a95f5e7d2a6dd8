// The code that the planted kernels share: their arguments, and the sum over a block.
#pragma once
#include <cuda_runtime.h>

struct Task {
  const float* in;
  float *out, *slots;
  unsigned* counters;
  bool planted;
};

constexpr unsigned kThreads = 64, kBlocks = 8, kCluster = 4;
constexpr float kBlockSum = kThreads * (kThreads - 1) / 2;  // the sum of in[], where in[i] = i

__device__ inline float* shared_floats() { return reinterpret_cast<float*>(emulator::shared_memory()); }

__device__ inline float block_sum(float value, float* partial, bool planted = false) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  if (!planted) __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
  __syncthreads();
  return total;
}
