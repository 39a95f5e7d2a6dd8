// Planted kernels with asynchronous copies, and those of a cooperative grid, whose blocks wait for each
// other.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "planted.h"

constexpr unsigned kStages = 8, kSlots = 4;

// A ring of slots that asynchronous copies fill ahead of time. Each thread adds up what its neighbour copied.
// Planted: a slot is read one stage before its bytes are sure to be there.
__global__ void ring(const __grid_constant__ Task task) {
  const auto slot = [](unsigned stage) { return shared_floats() + stage % kSlots * kThreads; };
  const auto fetch = [&](unsigned stage) {
    if (stage < kStages) {
      const float* from = &task.in[(threadIdx.x + stage) % kThreads];
      __pipeline_memcpy_async(&slot(stage)[threadIdx.x], from, sizeof(float));
    }
    __pipeline_commit();  // a stage without copies commits too, so that each stage is one batch
  };
  for (unsigned stage = 0; stage < kSlots - 1; ++stage) fetch(stage);
  float total = 0;
  for (unsigned stage = 0; stage < kStages; ++stage) {
    __pipeline_wait_prior(kSlots - (task.planted ? 1 : 2));
    __syncthreads();
    fetch(stage + kSlots - 1);  // into a slot that all threads have read in the stage before
    total += slot(stage)[threadIdx.x ^ 1];
  }
  __pipeline_wait_prior(0);
  __stcs(&task.out[blockIdx.x * kThreads + threadIdx.x], total);
}

// Asynchronous copies of data that a neighbour writes. Planted: they are issued before the data is sure to be
// written. Here this gives a right result, because the source is read in the wait, but not on every GPU.
__global__ void copy_fresh(const __grid_constant__ Task task) {
  float* source = task.out + kThreads;
  __stcg(&source[threadIdx.x], task.in[threadIdx.x]);
  if (!task.planted) __syncthreads();
  __pipeline_memcpy_async(&shared_floats()[threadIdx.x], &source[threadIdx.x ^ 1], sizeof(float));
  __pipeline_commit();
  __syncthreads();
  __pipeline_wait_prior(0);
  task.out[threadIdx.x] = shared_floats()[threadIdx.x];
}

// Planted: the source is overwritten while the copy is under way.
__global__ void copy_overwritten(const __grid_constant__ Task task) {
  float* source = task.out + kThreads + threadIdx.x;
  *source = task.in[threadIdx.x];
  __pipeline_memcpy_async(&shared_floats()[threadIdx.x], source, sizeof(float));
  __pipeline_commit();
  if (task.planted) *source = -1;
  __pipeline_wait_prior(0);
  *source = -1;
  task.out[threadIdx.x] = shared_floats()[threadIdx.x];
}

// Planted: a copy is issued into memory that is still read.
__global__ void copy_into_use(const __grid_constant__ Task task) {
  float* mine = &shared_floats()[threadIdx.x];
  const auto fetch = [&] {
    __pipeline_memcpy_async(mine, &task.in[threadIdx.x], sizeof(float));
    __pipeline_commit();
  };
  fetch();
  __pipeline_wait_prior(0);
  if (task.planted) fetch();
  const float first = *mine;
  if (!task.planted) fetch();
  __pipeline_wait_prior(0);
  task.out[threadIdx.x] = first + *mine;
}

// The sums of all blocks, each weighted by its block's number, reach all blocks. Counters are 0 before and
// after. `early` means not to wait for the sums, and `left` to leave the counters as they are.
__device__ inline void share_sums(const Task& task, bool early, bool left) {
  const float own = block_sum(__ldcs(&task.in[threadIdx.x]), shared_floats());
  if (threadIdx.x == 0) {
    __stcg(&task.slots[blockIdx.x], own * float(blockIdx.x + 1));
    __threadfence();
    atomicAdd(&task.counters[0], 1u);
    while (!early && atomicAdd(&task.counters[0], 0u) < gridDim.x) __nanosleep(100);
  }
  __syncthreads();
  float total = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) total += __ldcg(&task.slots[block]);
  if (threadIdx.x != 0) return;
  task.out[blockIdx.x] = total;
  if (left || atomicAdd(&task.counters[1], 1u) + 1 < gridDim.x) return;
  task.counters[0] = task.counters[1] = 0;  // this is the last block, and all others have read the sums
}
// Planted: a block uses the sums before all of them are there.
__global__ void sum_grid(const __grid_constant__ Task task) { share_sums(task, task.planted, false); }
// Planted: the next launch finds the counters of this one, and takes its sums for its own.
__global__ void sum_grid_again(const __grid_constant__ Task task) { share_sums(task, false, task.planted); }

// One thread copies four numbers.
__device__ inline void copy_four(const Task& task, float* to, const float* from, size_t bytes,
                                 bool waits = true, size_t zfill = 0) {
  if (threadIdx.x != 0) return;
  __pipeline_memcpy_async(to, from, bytes, zfill);
  __pipeline_commit();
  if (waits) __pipeline_wait_prior(0);
  task.out[0] = to[0] + to[1] + to[2] + to[3];
}
__global__ void copy_odd_size(const __grid_constant__ Task task) {
  copy_four(task, shared_floats(), task.in, task.planted ? 12 : 16);
}
__global__ void copy_from_misaligned(const __grid_constant__ Task task) {
  copy_four(task, shared_floats(), task.in + (task.planted ? 2 : 4), 16);
}
__global__ void copy_to_misaligned(const __grid_constant__ Task task) {
  copy_four(task, shared_floats() + (task.planted ? 2 : 4), task.in, 16);
}
__global__ void copy_past_shared(const __grid_constant__ Task task) {
  copy_four(task, shared_floats() + kThreads - (task.planted ? 0 : 4), task.in, 16);
}
__global__ void copy_past_global(const __grid_constant__ Task task) {
  copy_four(task, shared_floats(), task.in + kThreads - (task.planted ? 0 : 4), 16);
}
__global__ void copy_without_wait(const __grid_constant__ Task task) {
  copy_four(task, shared_floats(), task.in, 16, !task.planted);
}
// The last six bytes become 0.
__global__ void copy_with_zeros(const __grid_constant__ Task task) {
  copy_four(task, shared_floats(), task.in + kThreads - 4, 16, true, 6);
}
// If all bytes become 0, the source may be the array's end, because nothing of it is read.
__global__ void copy_only_zeros(const __grid_constant__ Task task) {
  copy_four(task, shared_floats(), task.in + kThreads, 16, true, task.planted ? 6 : 16);
}
