// The compute type and the multiply-add that all formulas are built from, for host and device. Included by
// sgd.h, adamw.h, shrinkage.h and phase.h.
#pragma once
#include <cmath>
#include <type_traits>

// Marks a function that host code and kernels both call, and that is always inlined.
#if defined(__CUDACC__)
#define CGES_FN __host__ __device__ __forceinline__
#else
#define CGES_FN inline __attribute__((always_inline))
#endif

namespace cges {

// The type that a tensor of T is computed in: float for the 16-bit types, T itself for the others.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// a * b + c. On a GPU it is always fused and so rounded once. Without the explicit fma the compiler would
// decide for each kernel, and two kernels with the same formula could differ in the last bit.
template <typename T>
CGES_FN T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace cges
