// Kernels whose accesses are known, to test the log of accesses; and the size that a cooperative grid may
// have.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <string>

#include "emulator.h"
#include "planted.h"

// Each thread copies one element. Planted: one thread also reads the first element.
template <typename T>
__global__ void copy_by_hint(const void* from, void* to, bool planted) {
  const T* in = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const T value = i % 3 == 0 ? __ldg(&in[i]) : i % 3 == 1 ? __ldcg(&in[i]) : __ldcs(&in[i]);
  i % 2 ? __stcs(&out[i], value) : __stcg(&out[i], value);
  if (planted && i == kThreads + 5) __ldcs(&in[0]);
}

template <typename T>
__global__ void copy_asynchronously(const void* from, void* to, bool planted) {
  const T* in = static_cast<const T*>(from);
  T* slot = reinterpret_cast<T*>(emulator::shared_memory()) + threadIdx.x;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  for (unsigned times = planted && i == 0 ? 2 : 1; times > 0; --times) {
    __pipeline_memcpy_async(slot, &in[i], sizeof(T));
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  __stcs(&static_cast<T*>(to)[i], *slot);
}

struct Copier {
  const char* name;
  void (*kernel)(const void*, void*, bool);
  unsigned bytes;  // the size of an element
};
const Copier copiers[] = {
    {"uint4", copy_by_hint<uint4>, 16},
    {"float4", copy_by_hint<float4>, 16},
    {"uint2", copy_by_hint<uint2>, 8},
    {"double", copy_by_hint<double>, 8},
    {"unsigned", copy_by_hint<unsigned>, 4},
    {"int", copy_by_hint<int>, 4},
    {"float", copy_by_hint<float>, 4},
    {"bfloat16", copy_by_hint<__nv_bfloat16>, 2},
    {"half", copy_by_hint<__half>, 2},
    {"asynchronous uint4", copy_asynchronously<uint4>, 16},
    {"asynchronous uint2", copy_asynchronously<uint2>, 8},
    {"asynchronous float", copy_asynchronously<float>, 4},
};

// Copies this number of bytes, a multiple of kThreads elements. Returns an error, or -2 if there is no such
// copier.
EMULATOR_API int copy(const char* name, const void* from, void* to, unsigned bytes, bool planted) {
  for (const Copier& copier : copiers) {
    if (std::string(copier.name) != name) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = bytes / copier.bytes / kThreads;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = kThreads * copier.bytes;
    return cudaLaunchKernelEx(&config, copier.kernel, from, to, planted);
  }
  return -2;
}

__global__ void do_nothing() {}

EMULATOR_API int blocks_that_fit(unsigned threads, unsigned shared) {
  int blocks, multiprocessors;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, do_nothing, int(threads), shared);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  return blocks * multiprocessors;
}

EMULATOR_API int launch_together(unsigned blocks, unsigned threads, unsigned shared, bool cooperative) {
  cudaFuncSetAttribute(do_nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, do_nothing);
}
