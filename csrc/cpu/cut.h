// Cuts a step's tensors into tiles, which threads take one by one. cpu/executor.cpp calls cut() in each step;
// tile.h and short_groups.h run the tiles.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/executor.h"
#include "cpu/rows.h"

namespace cges::cpu {

// Groups with fewer contiguous elements in a row (R2) than this are summed by columns: the sums are kept for
// each column, and the columns of a group are added up at the end.
constexpr int64_t kNarrow = 64;
// The most bytes of z in a row of a piece that is summed by columns.
constexpr int64_t kPieceRowBytes = 64 << 10;

// Rows [r0, r1) and columns [c0, c1) of the [R1, K2*R2] matrix at k1. A tile holds whole groups, or a piece
// of large ones. Small matrices share a tile, which has the same rows and columns of all k1 in [k1,
// k1_end).
struct Tile {
  int32_t tensor;
  int64_t k1, k1_end, r0, r1, c0, c1;
  int64_t elements() const { return (k1_end - k1) * rows() * columns(); }
  int64_t rows() const { return r1 - r0; }
  int64_t columns() const { return c1 - c0; }
};

// A piece of some neighbouring large groups: their `part`-th part. The first of these groups is number
// `group` of its LargeGroups.
struct Piece : Tile {
  int64_t part, group;
};

// Large groups of one tensor, each cut into the same number of parts. The sums of all their parts are kept in
// one place.
struct LargeGroups {
  int64_t parts, groups = 0;
  std::vector<Piece> pieces{};
};

struct Work {
  std::vector<Tile> whole;                       // tiles of whole groups
  std::vector<std::vector<LargeGroups>> passes;  // the large groups of an entry go through passes together
};

Work cut(const std::vector<StepTensor>& tensors);

// The size of this processor's L2 cache, taken to be between 256 KB and 2 MB.
int64_t l2_bytes();

// Whether every element is a group of its own. Then nothing is summed: shrink_one gives each one's (s, t).
inline bool has_ones(const StepTensor& tensor) {
  return tensor.has_groups && tensor.layout.group_size() == 1;
}

// Whether zeros stay zero element by element. Freezing by groups does that if groups have one element.
inline bool freezes_elements(const StepTensor& tensor) {
  return tensor.h->freeze == Freeze::element || (tensor.h->freeze == Freeze::group && has_ones(tensor));
}

// Whether the step needs the norms of whole groups, or has to know whether they are all zero.
inline bool needs_groups(const StepTensor& tensor) {
  return tensor.has_groups && !has_ones(tensor) &&
         (tensor.thresholds().need_norms() || tensor.h->freeze == Freeze::group);
}

// Whether the tensor's groups are so small that many of them are solved side by side (short_groups.h). Columns
// of a matrix lie side by side already, so panels serve them as well, unless there are many sweeps to make.
inline bool has_short_groups(const StepTensor& tensor) {
  const bool panels = tensor.layout.rows_last().R1 > 1 && !tensor.h->searches();
  return needs_groups(tensor) && tensor.layout.group_size() <= (panels ? kShortColumn : kShortGroup);
}

// The layout by which the tensor is cut. Contiguous groups are written as (1, 1, groups, elements). Where the
// step needs no groups, the tensor is one run of elements that may be cut anywhere.
inline Layout working_layout(const StepTensor& tensor) {
  return needs_groups(tensor) ? tensor.layout.rows_last() : Layout{1, 1, tensor.layout.numel(), 1};
}

// Whether single groups can be passed over: they are contiguous.
inline bool can_pass_by(const StepTensor& tensor) {
  const Layout L = working_layout(tensor);
  return needs_groups(tensor) && L.K1 == 1 && L.R1 == 1;
}

inline bool summed_by_columns(const Layout& L) { return L.R2 < kNarrow && L.R1 > 1; }

// Whether z can lie in the memory of w between two passes. w must have the compute type, and its zeros must
// not be needed any more, as they are gone once z is there.
inline bool holds_z(const StepTensor& tensor) {
  return (tensor.dtype == DType::f32 || tensor.dtype == DType::f64) && !freezes_elements(tensor);
}

}  // namespace cges::cpu
