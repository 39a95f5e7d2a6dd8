// The elements of a chunk as one thread of step_chunks sees them: reading and updating them into shared
// memory, and writing them back. groups.cuh and items.cuh use this.
#pragma once
#include "cuda/rule.cuh"

namespace cges::cuda {

// A slab is rows x columns elements of one tensor. A thread's part of it is a run of kVector columns in every
// `stride`-th row. The part does not depend on how the tensor is aligned, so the bits of the result do not
// either.
template <typename T, int kStates>
struct Slab {
  using A = Compute<T>;
  static constexpr int kVector = Pack<T>::kSize;
  template <bool wide>
  static constexpr int kBatch = wide ? 2 : 1;  // the number of rows whose loads are under way together

  T* w;  // the slab's first element; the same for the other arrays
  const T* grad;
  T* states[kStates];
  uintptr_t bits;  // the bitwise or of all these addresses
  Phase phase;
  int64_t pitch;
  int rows, columns, last_columns;
  int column, row, stride;  // the thread's first column and row, and rows from one of its rows to the next

  __device__ Slab(const TensorAddresses<kStates>& tensor, Phase phase, const Item& item)
      : w(static_cast<T*>(tensor.w) + item.begin),
        grad(static_cast<const T*>(tensor.grad) + item.begin),
        bits(tensor.bits() | uintptr_t(item.begin * int64_t(sizeof(T)))),
        phase(phase),
        pitch(item.pitch),
        rows(item.rows),
        columns(item.columns),
        last_columns(item.last_columns),
        column(int(threadIdx.x) % item.lanes * kVector),
        row(int(threadIdx.x) / item.lanes),
        stride(kThreads / item.lanes) {
    for (int s = 0; s < kStates; ++s) states[s] = static_cast<T*>(tensor.states[s]) + item.begin;
    if (row >= stride) column = columns;  // left over: idle
  }

  // The layout of z in shared memory. Its rows are padded with zeros to whole vectors.
  __device__ int z_pitch() const { return int(round_up(columns, kVector)); }
  __device__ int z_elements() const {
    return rows == 0 ? 0 : (rows - 1) * z_pitch() + int(round_up(last_columns, kVector));
  }
  __device__ int elements() const { return rows == 0 ? 0 : (rows - 1) * columns + last_columns; }
  __device__ int64_t offset(int r) const { return r * pitch + column; }
  __device__ int length(int r) const {
    return min(kVector, (r == rows - 1 ? last_columns : columns) - column);
  }
  __device__ bool aligned() const { return bits % 16 == 0 && (rows <= 1 || pitch % kVector == 0); }

  // Calls f<wide>(first, end) for batches of this thread's rows: first, first + stride, ... < end, at most
  // kBatch<wide> of them. In wide batches all accesses are of 16 bytes. Rows come in order; the last row,
  // which may be shorter, may be the only one that is not wide.
  template <typename F>
  __device__ __forceinline__ void for_each_batch(F f) const {
    if (column >= columns) return;
    const int mine = column < last_columns ? rows : rows - 1;  // the end of the rows in which it has columns
    int wide_rows = 0;
    if (aligned() && columns - column >= kVector)
      wide_rows = last_columns - column >= kVector ? rows : rows - 1;
    int r = row;
    for (; r < wide_rows; r += kBatch<true> * stride) f.template operator()<true>(r, wide_rows);
    if (wide_rows >= mine) return;
    // After wide rows only the last row is left. Batches may have gone beyond it, so r is found anew.
    if (wide_rows > 0) r = (mine - 1 - row) % stride == 0 ? mine - 1 : mine;
    for (; r < mine; r += kBatch<false> * stride) f.template operator()<false>(r, mine);
  }
};

// Leaves z of a slab in shared memory and, if they are `kept`, stores the new states. Bit v of the result
// says whether this thread's column v has a weight that is not 0.
template <typename T, int kStates, typename Update>
__device__ __forceinline__ unsigned update_rows(const Slab<T, kStates>& slab, const Update& update,
                                                bool freezes_elements, bool kept, Compute<T>* z) {
  using A = Compute<T>;
  using S = Slab<T, kStates>;
  constexpr int kVector = S::kVector;
  const Phase phase = update.phase();
  const bool writes_states = kept && writes_state(phase);
  unsigned alive = 0;
  slab.for_each_batch([&]<bool wide>(int first, int end) {
    constexpr int kBatch = S::template kBatch<wide>;
    Pack<T> w[kBatch], grad[kBatch] = {}, states[kBatch][kStates] = {};
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int r = first + k * slab.stride;
      if (r >= end) continue;
      const auto read = [&](const T* p) {
        return load_pack<false, kVector>(p + slab.offset(r), wide, slab.length(r));
      };
      w[k] = read(slab.w);
      if (reads_grad(phase)) grad[k] = read(slab.grad);
      for (int s = 0; s < kStates && reads_state(phase); ++s) states[k][s] = read(slab.states[s]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int r = first + k * slab.stride;
      if (r >= end) continue;
      A x[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        x[v] = A(w[k].x[v]);
        if (x[v] != A(0)) alive |= 1u << v;
      }
      update_pack<T>(update, freezes_elements, false, x, grad[k], states[k]);
      A* const at = z + r * slab.z_pitch() + slab.column;
#pragma unroll
      for (int v = 0; v < kVector; v += Pack<A>::kSize) {
        Pack<A> some;
#pragma unroll
        for (int i = 0; i < Pack<A>::kSize; ++i) some.x[i] = x[v + i];
        store_shared(at + v, some);
      }
      for (int s = 0; s < kStates && writes_states; ++s)
        store_pack<false>(slab.states[s] + slab.offset(r), states[k][s], wide, slab.length(r));
    }
  });
  return alive;
}

// The same, with the usual phase known to the compiler.
template <typename T, typename Rule, typename Own>
__device__ __forceinline__ unsigned update_slab(const Slab<T, Rule::kStates>& slab,
                                                const ParamGroup<Compute<T>, Rule>& h, const Own& own,
                                                bool kept, Compute<T>* z) {
  using A = Compute<T>;
  const bool freezes = h.freeze == Freeze::element;
  if (slab.phase == Phase::running) {
    const typename Rule::template Update<A, Known::running> update(h.rule, own, slab.phase);
    return update_rows(slab, update, freezes, kept, z);
  }
  const typename Rule::template Update<A, Known::nothing> update(h.rule, own, slab.phase);
  return update_rows(slab, update, freezes, kept, z);
}

// Stores w = value(z, v) for each of this thread's elements, v being its column among the thread's.
template <typename T, int kStates, typename F>
__device__ __forceinline__ void store_slab(const Slab<T, kStates>& slab, const Compute<T>* z, F value) {
  using A = Compute<T>;
  using S = Slab<T, kStates>;
  constexpr int kVector = S::kVector;
  slab.for_each_batch([&]<bool wide>(int first, int end) {
    constexpr int kBatch = S::template kBatch<wide>;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int r = first + k * slab.stride;
      if (r >= end) continue;
      Pack<T> w;
#pragma unroll
      for (int v = 0; v < kVector; v += Pack<A>::kSize) {
        const Pack<A> zs = load_shared(z + r * slab.z_pitch() + slab.column + v);
#pragma unroll
        for (int i = 0; i < Pack<A>::kSize; ++i) w.x[v + i] = value(zs.x[i], v + i);
      }
      store_pack<false>(slab.w + slab.offset(r), w, wide, slab.length(r));
    }
  });
}

// Stores zeros to the states in those of this thread's columns whose bit in `dead` is set.
template <typename T, int kStates>
__device__ __forceinline__ void clear_states(const Slab<T, kStates>& slab, unsigned dead) {
  if (dead == 0 || !writes_state(slab.phase)) return;
  for (int r = slab.row; r < slab.rows; r += slab.stride)
    for (int v = 0; v < slab.length(r); ++v)
      for (T* const state : slab.states)
        if (dead >> v & 1) store<false>(state + slab.offset(r) + v, T(0.0f));
}

// The value to store in w: shrunk or, if there is no threshold, z itself bit for bit.
template <typename T>
__device__ __forceinline__ T shrunk(Compute<T> z, const Shrinkage<Compute<T>>& at, bool shrinks) {
  return shrinks ? apply_shrinkage<T>(z, at) : T(z);
}

}  // namespace cges::cuda
