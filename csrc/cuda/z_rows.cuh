// A thread's part of z in shared memory: a circular buffer, in which a tile's rows begin where those of the
// tile before end. "row" is the offset of a row in bytes. A row has kVector numbers for each thread, in pieces
// of 16 bytes that lie side by side for all threads.
#pragma once
#include "cuda/memory.cuh"

namespace cges::cuda {

template <typename A, int kVector>
struct ZRows {
  static constexpr int kEach = Pack<A>::kSize, kRow = kVector * kTileThreads * int(sizeof(A));

  unsigned char* const begin;
  const int& count;  // the number of rows of the buffer, which lies with the kernel's arguments

  __device__ ZRows(unsigned char* memory, const int& count)
      : begin(memory + threadIdx.x * 16), count(count) {}

  __device__ int back(int row, int rows) const {  // the row that is `rows` rows before
    row -= rows * kRow;
    return row < 0 ? row + count * kRow : row;
  }
  __device__ int left(int row) const { return count - row / kRow; }  // rows up to the buffer's end
  __device__ void wrap(int& row) const { row = row == count * kRow ? 0 : row; }
  __device__ void turn(int& row) const { wrap(row += kRow); }

  __device__ void load(int row, A (&x)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; v += kEach) {
      const Pack<A> some = load_shared(at(row, v));
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[v + i] = some.x[i];
    }
  }
  __device__ void store(int row, const A (&x)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; v += kEach) {
      Pack<A> some;
#pragma unroll
      for (int i = 0; i < kEach; ++i) some.x[i] = x[v + i];
      store_shared(at(row, v), some);
    }
  }

 private:
  __device__ A* at(int row, int v) const {
    return reinterpret_cast<A*>(begin + row + v * (kTileThreads * int(sizeof(A))));
  }
};

}  // namespace cges::cuda
