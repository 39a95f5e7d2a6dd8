// Asynchronous copies into shared memory, as late as they may be: the bytes come with the wait that covers
// their batch, and the source is read no sooner. Until then the destination holds poison (NaN), so that who
// reads it early, or asks for a copy into what others still read, is wrong in every order; who writes there
// fails.
#pragma once
#include "cuda_runtime.h"

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, zeros;  // the last `zeros` of the bytes are not read, but 0
  unsigned batch;         // commits before it
};

// What the running thread has under way. Refuses what a GPU would not do.
void add_copy(Copy);
void commit_copies();
bool take_copy(size_t prior, Copy*);  // the oldest one that is older than the last `prior` batches
void overwritten();                   // somebody wrote where a copy was on its way to

// Here and not in emulator.cpp, because the sanitizers must see it. A GPU may read the source from now on.
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
