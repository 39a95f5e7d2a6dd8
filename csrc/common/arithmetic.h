// What all formulas stand on, for host and device.
#pragma once
#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#define CGES_FN __host__ __device__ __forceinline__
#else
#define CGES_FN inline __attribute__((always_inline))
#endif

namespace cges {

// 16-bit types compute in float, the others in themselves.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// a * b + c. On a GPU it is rounded once, and here it is said where: left to the compiler, two kernels with the
// same formula could differ in their last bits.
template <typename T>
CGES_FN T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace cges
