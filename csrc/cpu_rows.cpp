#include "cpu_rows.h"

// The bodies for plain x86-64 (or any other processor), AVX2 and AVX-512: what a wheel may ship.
namespace cges::baseline {
#include "cpu_rows.inc"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CGES_DISPATCH 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt")
namespace cges::avx2 {
#include "cpu_rows.inc"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,prefer-vector-width=512")
namespace cges::avx512 {
#include "cpu_rows.inc"
}
#pragma GCC pop_options
#endif

namespace cges {

template <typename T>
const RowOps<T>& row_ops() {
#if defined(CGES_DISPATCH)
  static const RowOps<T>& best = __builtin_cpu_supports("x86-64-v4")   ? avx512::ops<T>
                                 : __builtin_cpu_supports("x86-64-v3") ? avx2::ops<T>
                                                                       : baseline::ops<T>;
  return best;
#else
  return baseline::ops<T>;
#endif
}

template const RowOps<float>& row_ops<float>();
template const RowOps<double>& row_ops<double>();
template const RowOps<c10::BFloat16>& row_ops<c10::BFloat16>();
template const RowOps<c10::Half>& row_ops<c10::Half>();

}  // namespace cges
