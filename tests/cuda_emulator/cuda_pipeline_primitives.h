// Asynchronous copies into shared memory, made as late as allowed: the source is read, and the bytes arrive,
// in the wait that covers their batch. Until then the destination holds poison (NaN). So a thread that reads
// the destination early, or starts a copy into memory that others still read, gives a wrong result in every
// order. A thread that writes to the destination makes the launch fail.
#pragma once
#include "cuda_runtime.h"

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, zeros;  // the last `zeros` bytes are not read but set to 0
  unsigned batch;         // the number of commits before it
};

// The copies of the running thread. Copies that a GPU could not make are refused.
void add_copy(Copy);
void commit_copies();
bool take_copy(size_t prior, Copy*);  // the oldest one that is older than the last `prior` batches
void overwritten();                   // a thread wrote to the destination of a copy under way

// This is not in emulator.cpp, because sanitizers have to see it. A GPU may read the source from here on.
template <typename Unit>
void poison(const Copy& copy) {
  for (size_t i = 0; i < copy.bytes / sizeof(Unit); ++i) {
    if (i < (copy.bytes - copy.zeros) / sizeof(Unit)) (void)static_cast<const volatile Unit*>(copy.from)[i];
    static_cast<Unit*>(copy.to)[i] = Unit(~0u);
  }
}

template <typename Unit>
void fulfil(const Copy& copy) {
  for (size_t i = 0; i < copy.bytes / sizeof(Unit); ++i) {
    if (static_cast<Unit*>(copy.to)[i] != Unit(~0u)) overwritten();
    const bool given = i < (copy.bytes - copy.zeros) / sizeof(Unit);
    static_cast<Unit*>(copy.to)[i] = given ? static_cast<const Unit*>(copy.from)[i] : Unit(0);
  }
}

}  // namespace emulator

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size_and_align, size_t zfill = 0) {
  const emulator::Copy copy{to, from, unsigned(size_and_align), unsigned(zfill), 0};
  emulator::add_copy(copy);
  zfill % 4 ? emulator::poison<unsigned char>(copy) : emulator::poison<unsigned>(copy);
}

inline void __pipeline_commit() { emulator::commit_copies(); }

inline void __pipeline_wait_prior(size_t prior) {
  emulator::Copy copy;
  while (emulator::take_copy(prior, &copy)) {
    if (copy.bytes > copy.zeros) emulator::trace(copy.from, copy.bytes - copy.zeros, false);
    copy.zeros % 4 ? emulator::fulfil<unsigned char>(copy) : emulator::fulfil<unsigned>(copy);
  }
}
