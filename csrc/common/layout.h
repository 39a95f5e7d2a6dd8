// A dense tensor in memory order as (kept K1, reduced R1, kept K2, reduced R2); see core/groups.py.
#pragma once
#include <cstdint>

namespace cges {

struct Layout {
  int64_t K1, R1, K2, R2;

  bool operator==(const Layout&) const = default;
  int64_t numel() const { return K1 * R1 * K2 * R2; }
  int64_t num_groups() const { return K1 * K2; }
  int64_t group_size() const { return R1 * R2; }
  int64_t row_length() const { return K2 * R2; }  // elements between r1 and r1 + 1

  // Where group (k1, k2)'s part of row r1 begins; it is R2 elements long.
  int64_t offset(int64_t k1, int64_t r1, int64_t k2) const { return ((k1 * R1 + r1) * K2 + k2) * R2; }

  // The same groups with the reduction last: (K1, R1, 1, 1) is K1 contiguous groups of R1.
  Layout rows_last() const { return K2 == 1 && R2 == 1 ? Layout{1, 1, K1, R1} : *this; }
};

}  // namespace cges
