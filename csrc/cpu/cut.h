// How a step's tensors are cut into tiles, which threads take one by one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/executor.h"

namespace cges {

constexpr int64_t kNarrow = 64;     // groups with shorter runs in each of their rows are summed by columns
constexpr int64_t kL1Way = 4096;    // bytes; what lies a multiple of it apart shares a few sets of each cache
constexpr int64_t kLinePair = 128;  // bytes, fetched together, so panels shall not share one
constexpr int64_t kPieceRowBytes = 32 << 10;  // of z, at most, in pieces that are summed by columns

// Rows [r0, r1) and columns [c0, c1) of the [R1, K2*R2] matrix at k1: whole groups, or a piece of large ones.
// Small matrices share a tile: it goes on with the same rows and columns at the k1 up to k1_end.
struct Tile {
  int32_t tensor;
  int64_t k1, k1_end, r0, r1, c0, c1;
  int64_t elements() const { return (k1_end - k1) * rows() * columns(); }
  int64_t rows() const { return r1 - r0; }
  int64_t columns() const { return c1 - c0; }
};

// The `part`-th piece of some neighbouring groups, the first of which is number `group` of its batch.
struct Piece : Tile {
  int64_t part, group;
};

// Large groups of one tensor that are gone through together, each in as many parts.
struct Batch {
  int64_t parts, groups = 0;
  std::vector<Piece> pieces{};
};

struct Cut {
  std::vector<Tile> whole;
  std::vector<Batch> batches;
};

Cut cut(const std::vector<TensorStep>& steps);

// This processor's, within reason; and how much of it z may have.
int64_t l2_bytes();
int64_t z_bytes();

inline bool needs_groups(const TensorStep& step) {
  return step.has_groups && (step.h->thresholds.need_norms() || step.h->freeze == Freeze::group);
}

// Groups are contiguous runs where nothing is kept behind them; without groups any run will do.
inline Layout working_layout(const TensorStep& step) {
  return needs_groups(step) ? step.layout.rows_last() : Layout{1, 1, step.layout.numel(), 1};
}

// Whether groups are swept until their thresholds are found, not just once.
inline bool sweeps(const TensorStep& step) { return step.h->exact && step.h->thresholds.b != 0; }

inline bool summed_by_columns(const Layout& L) { return L.R2 < kNarrow && L.R1 > 1; }

inline bool rows_alias(const Layout& L, int64_t element_size) {
  return L.row_length() * element_size % kL1Way == 0;
}

// Whether weights can hold z between two passes: they are wide enough, and nobody asks for their zeros again.
inline bool holds_z(const TensorStep& step) {
  return (step.dtype == c10::kFloat || step.dtype == c10::kDouble) && step.h->freeze != Freeze::element;
}

}  // namespace cges
