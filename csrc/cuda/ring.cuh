// The reads of one thread of step_tiles: its elements of a tile (Part), and the ring of shared memory through
// which they come to the chip (Ring). tiles.cuh uses both.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "cuda/arguments.cuh"

namespace cges::cuda {

// A thread's part of a tile: 16 bytes of columns in every `down`-th row, taken one row after the other. Which
// elements these are depends on the tile alone and not on addresses, so the bits of the result do not either.
template <typename T, int kStates>
struct Part {
  static constexpr int kVector = Pack<T>::kSize;

  T* w;  // its first element in the row in turn; the same for the other arrays
  const T* grad;
  T* states[kStates];
  uint32_t step;  // the number of bytes from one of its rows to the next
  int rows;       // the number of its rows that are left
  // Several small numbers in one word, to spare registers. Byte 0: the number of its columns of a row. Byte
  // 1: the number of its columns of the tile's last row. Bit 16: whether that row is one of its own. Bits
  // 17 and 18: whether the step reads gradients, and states. Byte 3, unit(): the number of bytes that one
  // access may move, anywhere in the tile.
  uint32_t form;

  __device__ Part(const Tile& tile, const TensorAddresses<kStates>& tensor, Phase phase)
      : w(static_cast<T*>(tensor.w)), grad(static_cast<const T*>(tensor.grad)) {
    for (int s = 0; s < kStates; ++s) states[s] = static_cast<T*>(tensor.states[s]);
    const auto odd = tensor.bits() |
                     uintptr_t(tile.begin | tile.pitch | tile.columns | tile.last_columns) * sizeof(T) | 16;
    // `odd` has a bit wherever an address, an offset of rows, a length or 16 has one. Its lowest bit is the
    // largest power of two up to 16 that divides all of them.
    const bool any = tile.passes > 0 && phase != Phase::skipped;
    const uint32_t unit = any ? uint32_t(odd & -odd) : 16;
    const int row = tile.row_of(threadIdx.x), side = threadIdx.x - row * tile.across;
    const int matrix = tile.across == tile.lanes ? 0 : side / tile.lanes;
    const int column = (side - matrix * tile.lanes) * kVector;
    const int64_t at = tile.begin + (matrix * int64_t(tile.rows) + row) * tile.pitch + column;
    w += at;
    grad += at;
    for (T*& state : states) state += at;
    step = tile.passes > 1 ? uint32_t(tile.down * tile.pitch * int64_t(sizeof(T))) : 0;
    const int rest = tile.rows - (tile.passes - 1) * tile.down;  // rows of the last pass
    rows = any && row < tile.down ? tile.passes - (row >= rest) : 0;
    const int columns = clamp(tile.columns - column), last_columns = clamp(tile.last_columns - column);
    bool last = row == rest - 1;
    if (rows > 0 && last && last_columns == 0) {
      --rows;
      last = false;
    }
    form = columns | last_columns << 8 | last << 16 | cges::reads_grad(phase) << 17 |
           reads_state(phase) << 18 | unit << 24;
  }

  // The number of the kVector columns from its first one on that exist, if `columns` columns are left.
  static __device__ int clamp(int columns) { return max(0, min(columns, kVector)); }
  __device__ uint32_t unit() const { return form >> 24; }
  __device__ bool reads_grad() const { return form >> 17 & 1; }
  __device__ bool reads_states() const { return form >> 18 & 1; }
  // The number of its columns of the row in turn.
  __device__ int length() const { return (rows == 1 && form >> 16 & 1 ? form >> 8 : form) & 0xff; }
  __device__ void go_on() {
    w = advance(w);
    grad = advance(grad);
    for (T*& state : states) state = advance(state);
    --rows;
  }
  template <typename U>
  __device__ U* advance(U* p) const {
    return reinterpret_cast<U*>(reinterpret_cast<uintptr_t>(p) + step);
  }
};

// Slots of shared memory that asynchronous copies fill in turn. A thread asks for a row ahead() rows before
// it reads it. fetch() puts the row into the slot that was read last, and moves on to the next slot, which
// holds the row to read now. A thread reads only what it has asked for itself, so the ring needs no barrier.
template <typename T, int kStates>
struct Ring {
  static constexpr int kArrays = ring_arrays(kStates);
  static constexpr int kArray = kTileThreads * 16, kSlot = kArrays * kArray;
  static_assert(kSlot == slot_bytes(kStates));

  unsigned char* mine;  // the thread's 16 bytes of the first array in the first slot
  const int32_t& slots;
  int now = 0;  // the place in bytes at which the slot in turn begins

  __device__ Ring(unsigned char* memory, const int32_t& slots)
      : mine(memory + threadIdx.x * 16), slots(slots) {}

  __device__ int ahead() const { return slots - 1; }
  __device__ T* place(int array) const { return reinterpret_cast<T*>(mine + now + array * kArray); }

  // Asks for the part's next row. A part without rows left asks for nothing, but still takes a slot, so that
  // all threads stay in step with their slots. `all` promises that the step reads gradients and states,
  // `wide` that the unit is 16.
  template <bool all, bool wide>
  __device__ __forceinline__ void fetch(Part<T, kStates>& part) {
    if (part.rows > 0) {
      fetch_array<wide>(0, part, part.w);
      if (all || part.reads_grad()) fetch_array<wide>(1, part, part.grad);
      for (int s = 0; s < kStates && (all || part.reads_states()); ++s)
        fetch_array<wide>(2 + s, part, part.states[s]);
    }
    __pipeline_commit();
    part.go_on();
    now = now + kSlot == slots * kSlot ? 0 : now + kSlot;
  }

  template <bool wide>
  __device__ __forceinline__ void fetch_array(int array, const Part<T, kStates>& part, const T* from) {
    T* const to = place(array);
    if (wide || part.unit() == 16)
      __pipeline_memcpy_async(to, from, 16);
    else if (part.unit() == 8)
      fetch_units<8>(to, from, part.length());
    else if (part.unit() == 4)
      fetch_units<4>(to, from, part.length());
    else if constexpr (sizeof(T) == 2)  // there is no asynchronous copy of 2 bytes
      store_shared(to, load_pack<true, Pack<T>::kSize>(from, false, part.length()));
  }
  template <int unit>
  static __device__ __forceinline__ void fetch_units(T* to, const T* from, int n) {
    constexpr int kEach = unit / int(sizeof(T));
    if constexpr (kEach > 0) {
#pragma unroll
      for (int v = 0; v < Pack<T>::kSize; v += kEach)
        if (v < n) __pipeline_memcpy_async(to + v, from + v, unit);
    }
  }

  // Waits until the row in turn has come: only the copies of the rows after it may still be under way. The
  // number is a constant of the instruction, hence the branch.
  __device__ void wait() const {
    if (slots == kMostSlots)
      __pipeline_wait_prior(kMostSlots - 1);
    else
      __pipeline_wait_prior(kLeastSlots - 1);
  }
  __device__ Pack<T> read(int array) const { return load_shared(place(array)); }

  // The slot in turn as memory for the whole block, once this thread has read it and before it fetches again.
  __device__ unsigned char* free_slot() const { return mine - threadIdx.x * 16 + now; }
};

}  // namespace cges::cuda
