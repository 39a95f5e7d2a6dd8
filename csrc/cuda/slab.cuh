// A slab of one tensor as one thread sees it: 16-byte accesses, the update into shared memory, the way back.
#pragma once
#include "cuda/rule.cuh"

namespace cges::cuda {

// Rows x columns elements of one tensor as one thread of a block sees them: its part is one run of kVector
// columns, in every `stride`-th row. Whatever the alignment, a thread's part is the same, and so are the
// bits.
template <typename T, int kStates>
struct Slab {
  using A = Compute<T>;
  static constexpr int kVector = Pack<T>::kSize;
  template <bool wide>
  static constexpr int kBatch = wide ? 2 : 1;  // rows whose loads are under way together

  T* w;  // all of these at the slab's first element
  const T* grad;
  T* states[kStates];
  uintptr_t bits;  // of the addresses
  Phase phase;
  int64_t pitch;
  int rows, columns, last_columns;
  int column, row, stride;

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

  // z lies in shared memory, its rows padded with zeros to whole vectors.
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

  // f<wide>(first, end): this thread's rows of first, first + stride, ... < end, at most kBatch of them.
  // Wide: all of them by accesses of 16 bytes.
  template <typename F>
  __device__ __forceinline__ void for_each_batch(F f) const {
    if (column >= columns) return;
    const int mine = column < last_columns ? rows : rows - 1;
    int wide_rows = 0;
    if (aligned() && columns - column >= kVector)
      wide_rows = last_columns - column >= kVector ? rows : rows - 1;
    int r = row;
    for (; r < wide_rows; r += kBatch<true> * stride) f.template operator()<true>(r, wide_rows);
    if (wide_rows >= mine) return;
    if (wide_rows > 0) r = (mine - 1 - row) % stride == 0 ? mine - 1 : mine;
    for (; r < mine; r += kBatch<false> * stride) f.template operator()<false>(r, mine);
  }
};

// z of a slab into shared memory, the new states into their places if they are `kept`. Bit v of the result:
// column + v has a weight that is not 0.
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

// w = value(z, v) for the element in this thread's column v.
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

// The states' zeros in the columns of the bits of `dead`.
template <typename T, int kStates>
__device__ __forceinline__ void clear_states(const Slab<T, kStates>& slab, unsigned dead) {
  if (dead == 0 || !writes_state(slab.phase)) return;
  for (int r = slab.row; r < slab.rows; r += slab.stride)
    for (int v = 0; v < slab.length(r); ++v)
      for (T* const state : slab.states)
        if (dead >> v & 1) store<false>(state + slab.offset(r) + v, T(0.0f));
}

// As it is stored: shrunk, or z itself, bit for bit, where no threshold is.
template <typename T>
__device__ __forceinline__ T shrunk(Compute<T> z, const Shrinkage<Compute<T>>& at, bool shrinks) {
  return shrinks ? apply_shrinkage<T>(z, at) : T(z);
}

}  // namespace cges::cuda
