// Loads and stores with cache hints. The hints do nothing here, but kernels use these functions for all
// accesses to global memory. So a log of them tells how often each byte was read and written.
#pragma once
#include <cstddef>
#include <type_traits>

namespace emulator {

extern bool tracing;
void log_access(const void* address, size_t bytes, bool write);

__forceinline__ void trace(const void* address, size_t bytes, bool write) {
  if (tracing) [[unlikely]]
    log_access(address, bytes, write);
}

template <typename T>
__forceinline__ T load(const T* p) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  trace(p, sizeof(T), false);
  return *p;
}
template <typename T>
__forceinline__ void store(T* p, const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  trace(p, sizeof(T), true);
  *p = value;
}

}  // namespace emulator

template <typename T>
__forceinline__ T __ldg(const T* p) {
  return emulator::load(p);
}
template <typename T>
__forceinline__ T __ldcg(const T* p) {
  return emulator::load(p);
}
template <typename T>
__forceinline__ T __ldcs(const T* p) {
  return emulator::load(p);
}
template <typename T>
__forceinline__ void __stcg(T* p, std::type_identity_t<T> value) {
  emulator::store(p, value);
}
template <typename T>
__forceinline__ void __stcs(T* p, std::type_identity_t<T> value) {
  emulator::store(p, value);
}
