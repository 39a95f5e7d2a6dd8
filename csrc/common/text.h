// Builds error messages without output streams. Where a toolchain links the C++ library statically, the first
// stream that the extension uses crashes it. TORCH_CHECK uses one unless its message is a single const char*.
// So do torch's functions that take plain sizes, and c10::impl::VirtualGuardImpl; the plan avoids them.
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

// Joins all parts into one string.
template <typename... Parts>
std::string text(const Parts&... parts) {
  return (text_of(parts) + ...);
}

}  // namespace cges
