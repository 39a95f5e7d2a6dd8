// Memory that a thread keeps from tile to tile and from step to step.
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/rows.h"

namespace cges::cpu {

// Handed out anew for each tile. Pages that no tile needs are never touched.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(kLine, bytes))), bytes_(bytes) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  void reset() { used_ = 0; }
  template <typename T>
  T* take(int64_t n) {
    T* array = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += (n * sizeof(T) + kLine - 1) / kLine * kLine;
    TORCH_INTERNAL_ASSERT(used_ <= bytes_, "a tile needs more scratch than it may");
    return array;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t bytes_, used_ = 0;
};

}  // namespace cges::cpu
