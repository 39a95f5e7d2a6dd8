// How a step's tensors are cut into tiles, which threads take one by one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/executor.h"
#include "cpu/rows.h"

namespace cges::cpu {

constexpr int64_t kNarrow = 64;  // groups with shorter runs in each of their rows are summed by columns
constexpr int64_t kPieceRowBytes = 64 << 10;  // of z, at most, in pieces that are summed by columns

// Rows [r0, r1) and columns [c0, c1) of the [R1, K2*R2] matrix at k1: whole groups, or a piece of large ones.
// Small matrices share a tile: it goes on with the same rows and columns at the k1 up to k1_end.
struct Tile {
  int32_t tensor;
  int64_t k1, k1_end, r0, r1, c0, c1;
  int64_t elements() const { return (k1_end - k1) * rows() * columns(); }
  int64_t rows() const { return r1 - r0; }
  int64_t columns() const { return c1 - c0; }
};

// The `part`-th piece of some neighbouring groups, the first of which is number `group` of its LargeGroups.
struct Piece : Tile {
  int64_t part, group;
};

// Large groups of one tensor, each in as many parts, whose sums are kept together.
struct LargeGroups {
  int64_t parts, groups = 0;
  std::vector<Piece> pieces{};
};

struct Work {
  std::vector<Tile> whole;                       // groups
  std::vector<std::vector<LargeGroups>> passes;  // those that go through each pass together
};

Work cut(const std::vector<StepTensor>& tensors);

// This processor's, within reason.
int64_t l2_bytes();

// Whether every element is a group: nothing is summed, and shrink_one says what it becomes.
inline bool has_ones(const StepTensor& tensor) {
  return tensor.has_groups && tensor.layout.group_size() == 1;
}

inline bool freezes_elements(const StepTensor& tensor) {
  return tensor.h->freeze == Freeze::element || (tensor.h->freeze == Freeze::group && has_ones(tensor));
}

inline bool needs_groups(const StepTensor& tensor) {
  return tensor.has_groups && !has_ones(tensor) &&
         (tensor.thresholds().need_norms() || tensor.h->freeze == Freeze::group);
}

// Whether they are so small that many are solved side by side.
inline bool has_short_groups(const StepTensor& tensor) {
  return needs_groups(tensor) && tensor.layout.group_size() <= kShortGroup;
}

// Groups are contiguous runs where nothing is kept behind them; without groups any run will do.
inline Layout working_layout(const StepTensor& tensor) {
  return needs_groups(tensor) ? tensor.layout.rows_last() : Layout{1, 1, tensor.layout.numel(), 1};
}

// Whether groups can be passed by one by one: runs of memory, and not many solved side by side.
inline bool can_pass_by(const StepTensor& tensor) {
  const Layout L = working_layout(tensor);
  return needs_groups(tensor) && !has_short_groups(tensor) && L.K1 == 1 && L.R1 == 1;
}

inline bool summed_by_columns(const Layout& L) { return L.R2 < kNarrow && L.R1 > 1; }

// Whether weights can hold z between two passes: they are wide enough, and nobody asks for their zeros again.
inline bool holds_z(const StepTensor& tensor) {
  return (tensor.dtype == DType::f32 || tensor.dtype == DType::f64) && !freezes_elements(tensor);
}

}  // namespace cges::cpu
