#include "cpu/cut.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <numeric>

namespace cges::cpu {
namespace {

constexpr int64_t kTileElements = 131072;  // enough to amortise a tile
constexpr int64_t kLeastElements = 32768;  // of a tile, where a tensor has so many
constexpr int64_t kTiles = 4;              // but it has so many to share out, unless they get too small
constexpr int64_t kMaxRowBytes = 8192;     // of z, in a tile of more than one group
constexpr int64_t kRunBytes = 32768;       // of z, in a tile of short groups that are runs, or without groups
constexpr int64_t kLeastRowBytes = 256;    // of z
constexpr int64_t kPassedBy = 256;         // elements of held groups, at least, that are worth a gap

// Pieces of groups that are summed by columns are whole rows, the longest runs of memory there are. Each
// leaves sums of all these groups.
constexpr int64_t kPieceElements = 32768;  // at least
constexpr int64_t kLeastPieceRows = 128;   // for the sums to weigh little
constexpr int64_t kSumsBytes = 512 << 10;  // of all pieces of one LargeGroups

// Groups of several tensors go through each pass together, so that threads seldom wait for each other; but not
// so many that the caches have lost z by the next pass.
constexpr int64_t kPassElements = 524288;  // for each thread

int64_t z_limit = l2_bytes();

int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

// The size of the fewest parts of at most `most` each, as even as can be.
int64_t even_part(int64_t n, int64_t most) { return parts_of(n, parts_of(n, most)); }

int64_t size_of_z(const StepTensor& tensor) {
  return std::max<int64_t>(element_size(tensor.dtype), sizeof(float));
}

// Cuts the R1 rows and K2*R2 columns at each k1, `span` of the k1 together, into tiles of at most `columns`.
void cut_whole(int32_t index, const Layout& L, int64_t span, int64_t columns, std::vector<Tile>& tiles) {
  for (int64_t k1 = 0; k1 < L.K1; k1 += span)
    for (int64_t c = 0; c < L.row_length(); c += columns)
      tiles.push_back(
          {index, k1, std::min(k1 + span, L.K1), 0, L.R1, c, std::min(c + columns, L.row_length())});
}

// The same of the groups that nobody holds, of layout (1, 1, groups, elements).
void cut_others(int32_t index, const Layout& L, int64_t columns, const HeldGroups& held,
                std::vector<Tile>& tiles) {
  const auto begin = held.begin(), end = held.end();
  for (auto first = std::find(begin, end, 0), next = first; first != end; first = next) {
    auto last = first;
    do {  // a few held ones more cost less than another tile, and nothing changes in them
      last = std::find(next, end, 1);
      next = std::find(last, end, 0);
    } while (next != end && (next - last) * L.R2 < kPassedBy);
    const int64_t right = (last - begin) * L.R2;
    for (int64_t c = (first - begin) * L.R2; c < right; c += columns)
      tiles.push_back({index, 0, 1, 0, 1, c, std::min(c + columns, right)});
  }
}

// Neighbouring groups that are summed by columns share pieces, every other group has its own.
void cut_into_pieces(int32_t index, const StepTensor& tensor, const Layout& L,
                     std::vector<LargeGroups>& large) {
  const bool by_columns = summed_by_columns(L);
  const int64_t z_size = size_of_z(tensor);
  const int64_t width = by_columns ? even_part(L.K2, kPieceRowBytes / z_size / L.R2) * L.R2 : L.R2;
  const int64_t sums_kept = kSumsBytes / ((tensor.h->searches() ? 3 : 2) * z_size);
  int64_t rows = std::max(kPieceElements / width, int64_t{1});
  if (by_columns) rows = std::max({rows, kLeastPieceRows, parts_of(L.R1, sums_kept / (width / L.R2))});
  rows = even_part(L.R1, rows);
  // Where groups gone through together have fewer of these parts than there are threads, the columns are
  // shared out too: that changes no sum.
  const int64_t row_parts = parts_of(L.R1, rows), chunks = L.K1 * parts_of(L.row_length(), width);
  const int64_t at_once = std::clamp(sums_kept / (row_parts * (width / L.R2)), int64_t{1}, chunks);
  const int64_t shares = parts_of(at::get_num_threads(), row_parts * at_once);
  // A share is some lines wide: threads that write to one line wait for each other.
  const int64_t share = std::max(parts_of(width / L.R2, shares), parts_of(kLeastRowBytes / z_size, L.R2));
  const int64_t columns = std::min(width, by_columns ? share * L.R2 : kPieceElements);
  const int64_t parts = by_columns ? row_parts : row_parts * parts_of(width, columns);
  const HeldGroups* const held = can_pass_by(tensor) ? tensor.held : nullptr;  // width is a group's then
  for (int64_t k1 = 0; k1 < L.K1; ++k1)
    for (int64_t left = 0; left < L.row_length(); left += width) {
      const int64_t right = std::min(left + width, L.row_length()), groups = (right - left) / L.R2;
      if (held != nullptr && (*held)[left / L.R2]) continue;
      if (large.empty() || parts * (large.back().groups + groups) > sums_kept) large.push_back({parts});
      LargeGroups& together = large.back();
      int64_t part = 0;
      for (int64_t r = 0; r < L.R1; r += rows, part += by_columns)
        for (int64_t c = left; c < right; c += columns, part += !by_columns) {
          const Tile tile{index, k1, k1 + 1, r, std::min(r + rows, L.R1), c, std::min(c + columns, right)};
          together.pieces.push_back({tile, part, together.groups + (c - left) / L.R2});
        }
      together.groups += groups;
    }
}

// Tall columns go in pieces even where panels of them fit: the memory is much faster at long runs than at the
// short rows of panels.
bool tall(const Layout& L) {
  return L.R1 >= 2 * kLeastPieceRows && L.R1 * L.row_length() >= 2 * kPieceElements;
}

void cut(int32_t index, const StepTensor& tensor, std::vector<Tile>& whole, std::vector<LargeGroups>& large) {
  const Layout L = working_layout(tensor);
  if (L.numel() == 0) return;
  const int64_t size = element_size(tensor.dtype), z_size = size_of_z(tensor);
  const bool by_columns = summed_by_columns(L),
             divisible = !has_short_groups(tensor) && (by_columns || L.R2 >= kNarrow);
  // Of z: a run that scratch has to hold leaves room for the rest.
  const int64_t capacity = (holds_z(tensor) ? z_limit : z_limit / 2) / z_size;
  const int64_t least = std::max(L.R2, std::min(kLeastRowBytes / z_size, L.row_length()));
  if (divisible && (L.R1 * least > capacity || (by_columns && tall(L))))
    return cut_into_pieces(index, tensor, L, large);
  const int64_t elements = std::clamp(L.numel() / kTiles, kLeastElements, kTileElements);
  const bool runs = !needs_groups(tensor) || (has_short_groups(tensor) && L.R1 == 1);
  int64_t columns = std::clamp(elements / L.R1, 4 * kLine / size, (runs ? kRunBytes : kMaxRowBytes) / z_size);
  columns = std::max(std::min(columns, capacity / L.R1), least);
  // Whole groups, and whole lines where possible.
  const int64_t aligned = std::lcm(L.R2, kLine / size);
  columns -= columns % (aligned <= columns ? aligned : L.R2);
  if (tensor.held != nullptr && can_pass_by(tensor))
    return cut_others(index, L, columns, *tensor.held, whole);
  const int64_t width = std::min(columns, L.row_length());
  cut_whole(index, L, std::max(elements / (L.R1 * width), int64_t{1}), columns, whole);
}

int64_t elements_of(const LargeGroups& large) {
  return std::accumulate(large.pieces.begin(), large.pieces.end(), int64_t{0},
                         [](int64_t sum, const Piece& piece) { return sum + piece.elements(); });
}

}  // namespace

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  return std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 << 10, 2 << 20);
#else
  return 1 << 20;
#endif
}

void limit_z_bytes(int64_t bytes) { z_limit = std::min(bytes, l2_bytes()); }

Work cut(const std::vector<StepTensor>& tensors) {
  Work out;
  int64_t elements = 0;  // of the last pass
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::vector<LargeGroups> large;
    cut(int32_t(i), tensors[i], out.whole, large);
    for (LargeGroups& groups : large) {
      const int64_t more = elements_of(groups);
      if (elements == 0 || elements + more > kPassElements * at::get_num_threads()) {
        out.passes.emplace_back();
        elements = 0;
      }
      elements += more;
      out.passes.back().push_back(std::move(groups));
    }
  }
  return out;
}

}  // namespace cges::cpu
