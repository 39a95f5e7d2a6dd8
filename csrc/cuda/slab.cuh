// A slab of one tensor as one thread sees it: 16-byte accesses, the update into shared memory, the way back.
#pragma once
#include "cuda/rule.cuh"

namespace cges::cuda {

// Rows x columns elements of one tensor as one thread of a block sees them: its part is one run of kVector
// columns, in every `stride`-th row. Whatever the alignment, a thread's part is the same, and so are the
// bits.
template <typename T>
struct Slab {
  using A = Compute<T>;
  static constexpr int kVector = Pack<T>::kSize;
  template <bool wide>
  static constexpr int kBatch = wide ? 2 : 1;  // rows whose loads are under way together

  T* w;  // all three at the slab's first element; null where the step has none
  const T* grad;
  T* buf;
  Phase phase;
  int64_t pitch;
  int rows, columns, last_columns;
  int column, row, stride;

  __device__ Slab(const TensorAddresses& tensor, Phase phase, const Item& item)
      : w(static_cast<T*>(tensor.w) + item.begin),
        grad(tensor.grad ? static_cast<const T*>(tensor.grad) + item.begin : nullptr),
        buf(tensor.buf ? static_cast<T*>(tensor.buf) + item.begin : nullptr),
        phase(phase),
        pitch(item.pitch),
        rows(item.rows),
        columns(item.columns),
        last_columns(item.last_columns),
        column(int(threadIdx.x) % item.lanes * kVector),
        row(int(threadIdx.x) / item.lanes),
        stride(kThreads / item.lanes) {
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
  __device__ bool aligned() const {
    const auto at =
        reinterpret_cast<uintptr_t>(w) | reinterpret_cast<uintptr_t>(grad) | reinterpret_cast<uintptr_t>(buf);
    return at % 16 == 0 && (rows <= 1 || pitch % kVector == 0);
  }

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

// z of a slab into shared memory, the new buffer into its place. Bit v of the result: column + v has a weight
// that is not 0. `running`: the phase is, as in all steps but the first.
template <typename T, bool running>
__device__ __forceinline__ unsigned update_rows(const Slab<T>& slab, const ParamGroup<Compute<T>>& h,
                                                bool keep_buf, Compute<T>* z) {
  using A = Compute<T>;
  constexpr int kVector = Slab<T>::kVector;
  const Phase phase = running ? Phase::running : slab.phase;
  const bool reads_grad = cges::reads_grad(phase);
  const bool writes_buf = keep_buf && writes_state(phase);
  const SgdScalars<A> sgd = h.sgd;
  const bool nesterov = h.nesterov, decay = sgd.weight_decay != A(0);
  const bool freezes_elements = h.freeze == Freeze::element;
  unsigned alive = 0;
  slab.for_each_batch([&]<bool wide>(int first, int end) {
    constexpr int kBatch = Slab<T>::template kBatch<wide>;
    Pack<T> w[kBatch], grad[kBatch], buf[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int r = first + k * slab.stride;
      if (r >= end) continue;
      w[k] = load_pack<false, kVector>(slab.w + slab.offset(r), wide, slab.length(r));
      if (reads_grad) grad[k] = load_pack<false, kVector>(slab.grad + slab.offset(r), wide, slab.length(r));
      if (running) buf[k] = load_pack<false, kVector>(slab.buf + slab.offset(r), wide, slab.length(r));
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int r = first + k * slab.stride;
      if (r >= end) continue;
      Pack<A> zs[kVector / Pack<A>::kSize];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const A x = A(w[k].x[v]), g = reads_grad ? A(grad[k].x[v]) : A(0);
        A b = running ? A(buf[k].x[v]) : A(0);
        A value = sgd_update(phase, nesterov, decay, x, g, b, sgd);
        const bool frozen = freezes_elements && x == A(0);
        value = frozen ? A(0) : value;
        b = frozen ? A(0) : b;
        if (x != A(0)) alive |= 1u << v;
        zs[v / Pack<A>::kSize].x[v % Pack<A>::kSize] = value;
        buf[k].x[v] = T(b);
      }
      A* const at = z + r * slab.z_pitch() + slab.column;
#pragma unroll
      for (int v = 0; v < kVector; v += Pack<A>::kSize) store_shared(at + v, zs[v / Pack<A>::kSize]);
      if (writes_buf) store_pack<false>(slab.buf + slab.offset(r), buf[k], wide, slab.length(r));
    }
  });
  return alive;
}

template <typename T>
__device__ __forceinline__ unsigned update_slab(const Slab<T>& slab, const ParamGroup<Compute<T>>& h,
                                                bool keep_buf, Compute<T>* z) {
  return slab.phase == Phase::running ? update_rows<T, true>(slab, h, keep_buf, z)
                                      : update_rows<T, false>(slab, h, keep_buf, z);
}

// w = value(z, v) for the element in this thread's column v.
template <typename T, typename F>
__device__ __forceinline__ void store_slab(const Slab<T>& slab, const Compute<T>* z, F value) {
  using A = Compute<T>;
  constexpr int kVector = Slab<T>::kVector;
  slab.for_each_batch([&]<bool wide>(int first, int end) {
    constexpr int kBatch = Slab<T>::template kBatch<wide>;
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

// The buffer's zeros in the columns of the bits of `dead`.
template <typename T>
__device__ __forceinline__ void clear_buffer(const Slab<T>& slab, unsigned dead) {
  if (dead == 0 || !writes_state(slab.phase)) return;
  for (int r = slab.row; r < slab.rows; r += slab.stride)
    for (int v = 0; v < slab.length(r); ++v)
      if (dead >> v & 1) store<false>(slab.buf + slab.offset(r) + v, T(0.0f));
}

// As it is stored: shrunk, or z itself, bit for bit, where no threshold is.
template <typename T>
__device__ __forceinline__ T shrunk(Compute<T> z, const Shrinkage<Compute<T>>& at, bool shrinks) {
  return shrinks ? apply_shrinkage<T>(z, at) : T(z);
}

}  // namespace cges::cuda
