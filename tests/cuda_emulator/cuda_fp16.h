// __half: storage, conversions and sums of pairs, rounded to nearest even by the compiler's own type.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, sizeof bits);
  }
  operator float() const {
    _Float16 half;
    std::memcpy(&half, &bits, sizeof bits);
    return static_cast<float>(half);
  }
};
inline bool operator==(__half a, __half b) { return float(a) == float(b); }
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }

struct alignas(4) __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __hadd2(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
