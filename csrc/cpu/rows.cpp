// Compiles the loops of rows.inc for each instruction set, in a namespace of its own, and picks the best at
// run time. A wheel may therefore run on any processor. Each namespace gives rows.inc the size of a vector,
// and how float16 numbers are converted, kHalves of them at a time.
#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

// For plain x86-64, and for any other processor.
namespace cges::cpu::baseline {
constexpr int kVectorBytes = 16;
constexpr int kHalves = 1;
CGES_FN void widen_halves(const c10::Half* from, float* to) { *to = *from; }
CGES_FN void narrow_halves(const float* from, c10::Half* to) { *to = *from; }
#include "cpu/rows.inc"
}  // namespace cges::cpu::baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CGES_DISPATCH 1

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of the header's own undefined vectors
#include <immintrin.h>
#pragma GCC diagnostic pop

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
namespace cges::cpu::avx2 {
constexpr int kVectorBytes = 32;
constexpr int kHalves = 8;
CGES_FN void widen_halves(const c10::Half* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
CGES_FN void narrow_halves(const float* from, c10::Half* to) {
  const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
#include "cpu/rows.inc"
}  // namespace cges::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
namespace cges::cpu::avx512 {
constexpr int kVectorBytes = 64;
constexpr int kHalves = 16;
CGES_FN void widen_halves(const c10::Half* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
CGES_FN void narrow_halves(const float* from, c10::Half* to) {
  const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#include "cpu/rows.inc"
}  // namespace cges::cpu::avx512
#pragma GCC pop_options
#endif

namespace cges::cpu {

namespace {
int64_t vector_limit = 64;  // the most bytes of a vector
}

void limit_vector_bytes(int64_t bytes) { vector_limit = bytes; }

template <typename T>
const RowOps<T>& row_ops() {
#if defined(CGES_DISPATCH)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                               __builtin_cpu_supports("bmi2");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && vector_limit >= avx512::kVectorBytes) return avx512::ops<T>;
  return has_avx2 && vector_limit >= avx2::kVectorBytes ? avx2::ops<T> : baseline::ops<T>;
#else
  return baseline::ops<T>;
#endif
}

template const RowOps<float>& row_ops<float>();
template const RowOps<double>& row_ops<double>();
template const RowOps<c10::BFloat16>& row_ops<c10::BFloat16>();
template const RowOps<c10::Half>& row_ops<c10::Half>();

}  // namespace cges::cpu
