// Small kernels that are right, or each wrong in one way if `planted`. The emulator and the sanitizers have
// to accept the right ones and to notice the faults. This file is a library for test_cuda_emulator.py, and a
// program for the sanitizers.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "emulator.h"
#include "planted.h"
#include "planted_grid.h"

namespace cg = cooperative_groups;

__global__ void __launch_bounds__(kThreads) sum_blocks(const __grid_constant__ Task task) {
  float* partial = shared_floats();
  const float total = block_sum(task.in[threadIdx.x], partial, task.planted);
  if (threadIdx.x == 0) task.out[blockIdx.x] = total;
}

// The lanes of a warp exchange their numbers. Planted: without waiting for each other.
__global__ void swap_in_warp(const __grid_constant__ Task task) {
  float* numbers = shared_floats();
  numbers[threadIdx.x] = task.in[threadIdx.x];
  if (!task.planted) __syncwarp();
  task.out[threadIdx.x] = numbers[threadIdx.x ^ 1];
}

// The blocks of a cluster exchange their sums. Planted: without waiting for each other.
__global__ void sum_clusters(const __grid_constant__ Task task) {
  float* partial = shared_floats();
  const cg::cluster_group cluster = cg::this_cluster();
  const float own = block_sum(task.in[threadIdx.x], partial);
  if (threadIdx.x == 0) partial[0] = own * float(cluster.block_rank() + 1);
  if (!task.planted) cluster.sync();
  float total = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank)
    total += *cluster.map_shared_rank(partial, rank);
  cluster.sync();  // otherwise a block could end while others read its memory
  if (threadIdx.x == 0) task.out[blockIdx.x] = total;
}

// Blocks that come first fill the slots. Those that come later wait for them and add the slots up. Planted:
// they do not wait.
__global__ void hand_over(const __grid_constant__ Task task) {
  float* partial = shared_floats();
  unsigned* ticket = reinterpret_cast<unsigned*>(partial + 2);
  if (threadIdx.x == 0) *ticket = atomicAdd(&task.counters[0], 1u);
  __syncthreads();
  const unsigned first = gridDim.x / 2;
  if (*ticket < first) {
    const float total = block_sum(task.in[threadIdx.x], partial);
    if (threadIdx.x != 0) return;
    task.slots[*ticket] = total * float(*ticket + 1);
    __threadfence();
    atomicAdd(&task.counters[1], 1u);
    return;
  }
  while (!task.planted && threadIdx.x == 0 && atomicAdd(&task.counters[1], 0u) < first) __nanosleep(100);
  __syncthreads();
  float total = 0;
  for (unsigned slot = 0; slot < first; ++slot) total += task.slots[slot];
  if (threadIdx.x == 0) task.out[*ticket] = total;
}

// out[0] is the number of blocks that came before the first one.
__global__ void take_ticket(const __grid_constant__ Task task) {
  if (threadIdx.x == 0) task.out[blockIdx.x] = float(atomicAdd(&task.counters[0], 1u));
}

__global__ void past_shared(const __grid_constant__ Task task) {
  float* shared = shared_floats();
  shared[threadIdx.x + (task.planted ? 1 : 0)] = 1;
  task.out[threadIdx.x] = 1;
}

__global__ void past_global(const __grid_constant__ Task task) {
  task.out[threadIdx.x + (task.planted ? 1 : 0)] = 1;
}

__global__ void diverge_at_shuffle(const __grid_constant__ Task task) {
  if (task.planted && threadIdx.x == 7) return;
  __shfl_xor_sync(~0u, 1.0f, 1);
}

__global__ void diverge_at_barrier(const __grid_constant__ Task task) {
  if (task.planted && threadIdx.x == 40) {
    __shfl_sync(0x300, 1, 8);  // an exchange of lanes 8 and 9 only
  } else {
    __syncthreads();
  }
}

__global__ void diverge_at_cluster(const __grid_constant__ Task task) {
  if (task.planted && cg::this_cluster().block_rank() == 2) return;
  cg::this_cluster().sync();
}

__global__ void mix_exchanges(const __grid_constant__ Task task) {
  if (task.planted && threadIdx.x % 2) {
    __syncwarp();
  } else {
    __ballot_sync(~0u, 1);
  }
}

__global__ void spin(const __grid_constant__ Task task) {
  while (task.planted && atomicAdd(&task.counters[0], 0u) == 0) __nanosleep(100);
}

__global__ void stop(const __grid_constant__ Task task) {
  float large[256];  // ASan fences this array on the fiber's stack
  for (unsigned i = 0; i < 256; ++i) large[i] = task.in[i % kThreads];
  if (task.planted && threadIdx.x == 5) __trap();
  __syncthreads();
  task.out[threadIdx.x] = large[threadIdx.x * 4] - large[threadIdx.x * 4 % kThreads];
}

struct Large {
  float numbers[8000];
};
__global__ void take_large(const Large) {}

// Uses every vote, exchange and atomic that kernels use once; out[i] is the number of wrong results.
__global__ void use_all(const __grid_constant__ Task task) {
  const unsigned lane = threadIdx.x % 32, low = lane < 16 ? 0xffffu : 0xffff0000u;
  unsigned* shared = reinterpret_cast<unsigned*>(emulator::shared_memory());
  int wrong = __syncthreads_and(1) != 1;
  wrong += __syncthreads_and(threadIdx.x != 63) != 0;
  wrong += __syncthreads_or(threadIdx.x == 63) != 1;
  wrong += __syncthreads_or(0) != 0;
  wrong += __ballot_sync(~0u, lane % 2) != 0xaaaaaaaa;
  wrong += __ballot_sync(low, 1) != low;
  wrong += __any_sync(low, lane == 3) != (lane < 16);
  wrong += __all_sync(low, lane != 3) != (lane >= 16);
  wrong += __shfl_sync(~0u, double(lane), 9) != 9.0;
  wrong += __shfl_xor_sync(low, -int(lane), 5) != -int(lane ^ 5);
  if (threadIdx.x == 0) shared[0] = shared[1] = shared[2] = 0;
  __syncthreads();
  atomicOr(&shared[0], 1u << lane);
  atomicMax(&shared[1], threadIdx.x);
  atomicAdd(&shared[2], 2u);
  __syncthreads();
  wrong += shared[0] != ~0u || shared[1] != 63 || __ldcg(&shared[2]) != 128;
  __syncthreads();
  if (threadIdx.x == 0) wrong += atomicExch(&shared[2], 5u) != 128 || atomicCAS(&shared[2], 5u, 6u) != 5;
  wrong += __clz(1) != 31 || __clz(0) != 32 || __clz(-1) != 0;
  task.out[threadIdx.x] = float(wrong);
}

struct Check {
  const char* name;
  void (*kernel)(Task);
  float expected;  // the value of out[first] to out[last] after the last launch
  unsigned blocks = 1, cluster = 1, outs = kThreads, shared = kThreads * sizeof(float);
  unsigned first = 0, last = 0, launches = 1;
  int cooperative = 0;
};
const Check checks[] = {
    {"sum_blocks", sum_blocks, kBlockSum, kBlocks},
    {"swap_in_warp", swap_in_warp, 1},
    {"sum_clusters", sum_clusters, kBlockSum * 10, kBlocks, kCluster},
    {.name = "hand_over",
     .kernel = hand_over,
     .expected = kBlockSum * 10,
     .blocks = kBlocks,
     .first = kBlocks / 2,
     .last = kBlocks - 1},
    {"take_ticket", take_ticket, 0, kBlocks},
    {"past_shared", past_shared, 1},
    {"past_global", past_global, 1},
    {"diverge_at_shuffle", diverge_at_shuffle, 0},
    {"diverge_at_barrier", diverge_at_barrier, 0},
    {"diverge_at_cluster", diverge_at_cluster, 0, kBlocks, kCluster},
    {"mix_exchanges", mix_exchanges, 0},
    {"spin", spin, 0},
    {"stop", stop, 0, kBlocks},
    {"use_all", use_all, 0},
    {"too_much_shared", past_global, 1, 1, 1, kThreads, 48 * 1024 + 1},
    {"ring", ring, kStages * (kStages + 1) / 2, kBlocks, 1, kBlocks * kThreads,
     kSlots * kThreads * sizeof(float)},
    {"copy_fresh", copy_fresh, 1, 1, 1, 2 * kThreads},
    {"copy_into_use", copy_into_use, 0},
    {"copy_overwritten", copy_overwritten, 0, 1, 1, 2 * kThreads},
    {.name = "sum_grid",
     .kernel = sum_grid,
     .expected = kBlockSum * 36,
     .blocks = kBlocks,
     .last = kBlocks - 1,
     .cooperative = 1},
    {.name = "sum_grid_again",
     .kernel = sum_grid_again,
     .expected = kBlockSum * 36 * 2,
     .blocks = kBlocks,
     .last = kBlocks - 1,
     .launches = 2,
     .cooperative = 1},
    {"sum_grid_plainly", sum_grid, kBlockSum * 36, kBlocks},
    {"copy_odd_size", copy_odd_size, 6},
    {"copy_from_misaligned", copy_from_misaligned, 4 + 5 + 6 + 7},
    {"copy_to_misaligned", copy_to_misaligned, 6},
    {"copy_past_shared", copy_past_shared, 6},
    {"copy_past_global", copy_past_global, 60 + 61 + 62 + 63},
    {"copy_without_wait", copy_without_wait, 6},
    {"copy_with_zeros", copy_with_zeros, 60 + 61},  // the low half of 62 is copied too, but its bits are 0
    {"copy_only_zeros", copy_only_zeros, 0},
};

cudaError_t launch(const Check& check, const Task& task) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = check.cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {check.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = check.blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = check.shared;
  config.attrs = attributes;
  config.numAttrs = check.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, check.kernel, task);
}

// Launches the kernel of this name. Returns 0 if its result is right, -1 if it is wrong, or the error.
EMULATOR_API int check(const char* name, bool planted, int seed) {
  for (const Check& check : checks) {
    if (std::string(check.name) != name) continue;
    std::vector<float> in(kThreads), out(check.outs), slots(kBlocks);
    std::vector<unsigned> counters(2);
    const Task task{in.data(), out.data(), slots.data(), counters.data(), planted};
    emulator_set("seed", seed);
    for (unsigned launches = 1; launches <= check.launches; ++launches) {
      for (unsigned i = 0; i < kThreads; ++i) in[i] = float(i * launches);
      if (const cudaError_t error = launch(check, task); error != cudaSuccess) return error;
    }
    const auto is_wrong = [&](float value) { return value != check.expected; };
    return std::any_of(&out[check.first], &out[check.last] + 1, is_wrong) ? -1 : 0;
  }
  return -2;
}

EMULATOR_API void to_half(const float* in, __half* out, int n) { std::copy(in, in + n, out); }
EMULATOR_API void from_half(const __half* in, float* out, int n) { std::copy(in, in + n, out); }
EMULATOR_API void to_bfloat16(const float* in, __nv_bfloat16* out, int n) { std::copy(in, in + n, out); }
EMULATOR_API void from_bfloat16(const __nv_bfloat16* in, float* out, int n) { std::copy(in, in + n, out); }
EMULATOR_API void add_half(const float2* a, const float2* b, __half2* out, int n) {
  for (int i = 0; i < n; ++i) {
    out[i] = __hadd2(__floats2half2_rn(a[i].x, a[i].y), __floats2half2_rn(b[i].x, b[i].y));
  }
}
EMULATOR_API void add_bfloat16(const float2* a, const float2* b, __nv_bfloat162* out, int n) {
  for (int i = 0; i < n; ++i) {
    out[i] = __hadd2(__floats2bfloat162_rn(a[i].x, a[i].y), __floats2bfloat162_rn(b[i].x, b[i].y));
  }
}

// Copies its parameters to a stack where an earlier launch may have left arrays behind.
bool launch_large() {
  cudaLaunchConfig_t config = {};
  config.gridDim = kBlocks;
  config.blockDim = kThreads;
  return cudaLaunchKernelEx(&config, take_large, Large{}) == cudaSuccess;
}

// Usage: planted NAME right|wrong SEEDS [BLOCKS_IN_FLIGHT]
int main(int argc, char** argv) {
  if (argc < 4) return 2;
  if (argc > 4) emulator_set("blocks_in_flight", std::atoi(argv[4]));
  bool right = true;
  for (int seed = 0; seed < std::atoi(argv[3]); ++seed) {
    emulator_trace(seed % 2);  // the sanitizers must not see the log
    right &= check(argv[1], std::string(argv[2]) == "wrong", seed) == 0;
    if (!launch_large()) return 3;
  }
  return right ? 0 : 1;
}
