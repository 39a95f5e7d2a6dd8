// Memory for z and sums that a thread keeps from tile to tile and from step to step. executor.cpp makes one
// for each thread; tile.h and short_groups.h take arrays from it.
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/rows.h"

namespace cges::cpu {

// reset() takes all arrays back at once, before a tile takes its own. Pages that no tile needs are never
// touched.
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
