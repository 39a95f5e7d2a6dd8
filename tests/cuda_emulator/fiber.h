// Fibers have a stack each. Switching between them costs a few nanoseconds, because it needs no system call.
//
// AddressSanitizer is notified of every switch. ThreadSanitizer treats each fiber as a thread, and does not
// treat a switch as a synchronisation. The synchronisation that CUDA guarantees is reported to it explicitly
// (`synchronise`). For that, emulator.cpp is compiled WITHOUT -fsanitize=thread, so that TSan does not see
// the emulator's own data, but with -DEMULATOR_TSAN.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN
#endif
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define IF_ASAN(...) __VA_ARGS__
#else
#define IF_ASAN(...)
#endif
#if defined(EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#define IF_TSAN(...) __VA_ARGS__
#else
#define IF_TSAN(...)
#endif

namespace emulator {

constexpr size_t kPage = 4096, kStack = 256 << 10;  // kernels may take 32 KB of parameters by value

// A stack and the place to continue on it: a fiber's, or the host's.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* asan_stack = nullptr;
  void* tsan_thread = nullptr;
};

// Pushes the registers that a callee must preserve, changes stacks, and pops them from the other.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
#ifndef __x86_64__
#error "the emulator switches stacks on x86-64 only"
#endif
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

inline Context* left = nullptr;  // the context that the last switch left

// Called first after a switch, in the context that was switched to.
inline void arrive([[maybe_unused]] Context& here) {
  IF_ASAN(__sanitizer_finish_switch_fiber(here.asan_stack, &left->stack, &left->stack_size);)
}

inline void switch_to(Context& from, Context& to, [[maybe_unused]] bool for_ever = false) {
  left = &from;
  IF_ASAN(__sanitizer_start_switch_fiber(for_ever ? nullptr : &from.asan_stack, to.stack, to.stack_size);)
  IF_TSAN(__tsan_switch_to_fiber(to.tsan_thread, __tsan_switch_to_fiber_no_sync);)
  emulator_switch(&from.stack_pointer, to.stack_pointer);
  arrive(from);
}

// release() publishes what this context did until now; a context that calls acquire() with the same token
// knows it from then on.
inline void release([[maybe_unused]] void* token) { IF_TSAN(__tsan_release(token);) }
inline void acquire([[maybe_unused]] void* token) { IF_TSAN(__tsan_acquire(token);) }

// Makes TSan attribute everything that follows on this stack to `context`.
inline void pose_as([[maybe_unused]] Context& context) {
  IF_TSAN(__tsan_switch_to_fiber(context.tsan_thread, __tsan_switch_to_fiber_no_sync);)
}

// Makes each context know what all of them did until now. It is done for all at once when the last one has
// come. If each released when it comes and acquired when it goes, a slow one would also learn what a fast one
// did after the barrier, and a race would be hidden.
template <typename ForEach>
void synchronise([[maybe_unused]] Context& me, [[maybe_unused]] void* token,
                 [[maybe_unused]] ForEach for_each) {
  IF_TSAN(for_each([&](Context& other) { pose_as(other), release(token); });
          for_each([&](Context& other) { pose_as(other), acquire(token); }); pose_as(me);)
}

// A pool of fibers. Stacks are used again, and the last one given back first, because it is in the cache.
class Fibers {
 public:
  // The first switch to `fiber` will call `entry`, which must not return.
  void make(Context& fiber, [[maybe_unused]] Context& host, void (*entry)()) {
    if (spare_.empty()) spare_.push_back(create());
    fiber = spare_.back();
    spare_.pop_back();
    // Fibers stop at similar depths of their stacks. Without an offset they would share the same few sets of
    // the cache.
    const uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack) + kStack;
    void** top = reinterpret_cast<void**>(end - end / kPage % 32 * 128);
    *--top = nullptr;  // the address to which entry would return
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
    release(this);
    pose_as(fiber);
    acquire(this);  // the fiber knows what the host did until now
    pose_as(host);
  }

  void give_back(const Context& fiber, [[maybe_unused]] bool in_the_middle) {
    IF_ASAN(if (in_the_middle) __asan_unpoison_memory_region(fiber.stack, kStack);)
    // TSan takes a fiber for one thread, whose actions are in order. So blocks of one launch must not use the
    // same fiber.
    IF_TSAN(if (used_.size() < kMostThreads) return used_.push_back(fiber);)
    spare_.push_back(fiber);
  }

  void end_launch() {
    spare_.insert(spare_.end(), used_.begin(), used_.end());
    used_.clear();
  }

 private:
  static Context create() {  // the page below the stack is not accessible
    void* p = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    Context fiber;
    fiber.stack = static_cast<unsigned char*>(p) + kPage;
    fiber.stack_size = kStack;
    IF_TSAN(fiber.tsan_thread = __tsan_create_fiber(0);)
    return fiber;
  }

  static constexpr size_t kMostThreads = 1024;  // TSan needs up to 1 MB for each
  std::vector<Context> spare_, used_;
};

}  // namespace emulator
