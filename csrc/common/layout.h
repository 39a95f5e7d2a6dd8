// The layout of a dense tensor's groups in memory. core/groups.py turns every group spec into this one form,
// and both executors cut their work by it.
#pragma once
#include <cstdint>

namespace cges {

// The tensor's elements in memory order, seen as an array [K1, R1, K2, R2]. A group keeps one k1 and one k2,
// and holds all elements over the reduced dims R1 and R2.
struct Layout {
  int64_t K1, R1, K2, R2;

  bool operator==(const Layout&) const = default;
  int64_t numel() const { return K1 * R1 * K2 * R2; }
  int64_t num_groups() const { return K1 * K2; }
  int64_t group_size() const { return R1 * R2; }
  int64_t row_length() const { return K2 * R2; }  // elements from one r1 to the next

  // The index of the first element of group (k1, k2) in row r1. The group has R2 contiguous elements there.
  int64_t offset(int64_t k1, int64_t r1, int64_t k2) const { return ((k1 * R1 + r1) * K2 + k2) * R2; }

  // The same groups, with contiguous ones always written in one way: (K1, R1, 1, 1) is K1 contiguous groups
  // of R1 elements, and so is (1, 1, K1, R1).
  Layout rows_last() const { return K2 == 1 && R2 == 1 ? Layout{1, 1, K1, R1} : *this; }
};

}  // namespace cges
