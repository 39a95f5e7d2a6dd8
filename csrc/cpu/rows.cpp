#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

// The bodies for plain x86-64 (or any other processor), AVX2 and AVX-512: what a wheel may ship.
namespace cges::cpu::baseline {
constexpr int kVectorBytes = 16;
#include "cpu/rows.inc"
}  // namespace cges::cpu::baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CGES_DISPATCH 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
namespace cges::cpu::avx2 {
constexpr int kVectorBytes = 32;
#include "cpu/rows.inc"
}  // namespace cges::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
namespace cges::cpu::avx512 {
constexpr int kVectorBytes = 64;
#include "cpu/rows.inc"
}  // namespace cges::cpu::avx512
#pragma GCC pop_options
#endif

namespace cges::cpu {

template <typename T>
const RowOps<T>& row_ops() {
#if defined(CGES_DISPATCH)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? avx512::ops<T> : has_avx2 ? avx2::ops<T> : baseline::ops<T>;
#else
  return baseline::ops<T>;
#endif
}

template const RowOps<float>& row_ops<float>();
template const RowOps<double>& row_ops<double>();
template const RowOps<c10::BFloat16>& row_ops<c10::BFloat16>();
template const RowOps<c10::Half>& row_ops<c10::Half>();

}  // namespace cges::cpu
