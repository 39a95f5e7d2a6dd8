// Texts of errors, without streams: where a toolchain links the C++ library statically, the first use of a
// stream in the extension crashes. TORCH_CHECK makes one of all that is not a single const char*; so do
// torch's functions that take plain sizes, and c10::impl::VirtualGuardImpl.
#pragma once
#include <string>
#include <type_traits>

namespace cges {

template <typename T>
std::string text_of(const T& part) {
  if constexpr (std::is_arithmetic_v<T>)
    return std::to_string(part);
  else
    return std::string(part);
}

// Words and numbers, one after the other.
template <typename... Parts>
std::string text(const Parts&... parts) {
  return (text_of(parts) + ...);
}

}  // namespace cges
