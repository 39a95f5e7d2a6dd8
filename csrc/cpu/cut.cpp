// Cuts tensors into tiles whose z stays in a cache between the sums and the apply, and groups that are too
// large for that into pieces; see cpu/executor.cpp for how these are run.
#include "cpu/cut.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <numeric>

namespace cges::cpu {
namespace {

constexpr int64_t kTileElements = 131072;  // the most elements of a tile, enough to amortise its cost
constexpr int64_t kLeastElements = 32768;  // the fewest elements of a tile, if the tensor has so many
constexpr int64_t kTiles = 4;              // the fewest tiles of a tensor, unless they would be too small
constexpr int64_t kMaxRowBytes = 8192;     // the most bytes of z in a row of a tile of several groups
constexpr int64_t kRunBytes = 32768;       // the same for a tile of short contiguous groups or without groups
constexpr int64_t kLeastRowBytes = 256;    // the fewest bytes of z in a row, if the matrix has so many
constexpr int64_t kPassedBy = 256;         // the fewest elements of neighbouring held groups to skip

// Pieces of groups that are summed by columns are whole rows where possible, since these are the longest runs
// of memory. Each piece leaves sums of all groups that it crosses, so it has many rows.
constexpr int64_t kPieceElements = 32768;  // the fewest elements of a piece
constexpr int64_t kLeastPieceRows = 128;   // the fewest rows, so that the sums are small beside the piece
constexpr int64_t kSumsBytes = 512 << 10;  // the most bytes for the sums of one LargeGroups

// Large groups of several tensors go through each pass together, so that threads seldom wait for each other,
// but only so many that the caches still hold their z in the next pass.
constexpr int64_t kPassElements = 524288;  // the most elements in a pass, for each thread

int64_t z_limit = l2_bytes();  // the most bytes of z in a tile

int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

// The size of the fewest parts of at most `most` each, as even as can be.
int64_t even_part(int64_t n, int64_t most) { return parts_of(n, parts_of(n, most)); }

int64_t size_of_z(const StepTensor& tensor) {
  return std::max<int64_t>(element_size(tensor.dtype), sizeof(float));
}

// Cuts the matrices of R1 rows and K2*R2 columns at all k1 into tiles of all rows and at most `columns`
// columns. `span` matrices share a tile.
void cut_whole(int32_t index, const Layout& L, int64_t span, int64_t columns, std::vector<Tile>& tiles) {
  for (int64_t k1 = 0; k1 < L.K1; k1 += span)
    for (int64_t c = 0; c < L.row_length(); c += columns)
      tiles.push_back(
          {index, k1, std::min(k1 + span, L.K1), 0, L.R1, c, std::min(c + columns, L.row_length())});
}

// Cuts a tensor of layout (1, 1, groups, elements) as cut_whole does, but leaves out groups that are held.
void cut_others(int32_t index, const Layout& L, int64_t columns, const HeldGroups& held,
                std::vector<Tile>& tiles) {
  const auto begin = held.begin(), end = held.end();
  for (auto first = std::find(begin, end, 0), next = first; first != end; first = next) {
    auto last = first;
    do {  // A few held groups within a tile cost less than another tile, and stepping them changes nothing.
      last = std::find(next, end, 1);
      next = std::find(last, end, 0);
    } while (next != end && (next - last) * L.R2 < kPassedBy);
    const int64_t right = (last - begin) * L.R2;
    for (int64_t c = (first - begin) * L.R2; c < right; c += columns)
      tiles.push_back({index, 0, 1, 0, 1, c, std::min(c + columns, right)});
  }
}

// Cuts large groups into pieces. Neighbouring groups that are summed by columns share pieces; any other group
// has its own. A group's parts decide the order of its sums, so they depend on the layout, the type and
// whether t is searched for, and never on the number of threads.
void cut_into_pieces(int32_t index, const StepTensor& tensor, const Layout& L,
                     std::vector<LargeGroups>& large) {
  const bool by_columns = summed_by_columns(L);
  const int64_t z_size = size_of_z(tensor);
  const int64_t width = by_columns ? even_part(L.K2, kPieceRowBytes / z_size / L.R2) * L.R2 : L.R2;
  const int64_t sums_kept = kSumsBytes / ((tensor.h->searches() ? 3 : 2) * z_size);
  int64_t rows = std::max(kPieceElements / width, int64_t{1});
  if (by_columns) rows = std::max({rows, kLeastPieceRows, parts_of(L.R1, sums_kept / (width / L.R2))});
  rows = even_part(L.R1, rows);
  // If the groups of one LargeGroups have fewer parts than there are threads, the columns are shared out too.
  // This changes no sum, because each column is summed on its own.
  const int64_t row_parts = parts_of(L.R1, rows), chunks = L.K1 * parts_of(L.row_length(), width);
  const int64_t at_once = std::clamp(sums_kept / (row_parts * (width / L.R2)), int64_t{1}, chunks);
  const int64_t shares = parts_of(at::get_num_threads(), row_parts * at_once);
  // A share is some cache lines wide, because threads that write to the same line wait for each other.
  const int64_t share = std::max(parts_of(width / L.R2, shares), parts_of(kLeastRowBytes / z_size, L.R2));
  const int64_t columns = std::min(width, by_columns ? share * L.R2 : kPieceElements);
  const int64_t parts = by_columns ? row_parts : row_parts * parts_of(width, columns);
  const HeldGroups* const held = tensor.held;  // if there are any, `width` is one group
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

// Whether groups that are summed by columns are cut into pieces even though panels of their columns would fit
// a tile. Memory is much faster to read in long runs than in the short rows of a panel.
bool tall(const Layout& L) {
  return L.R1 >= 2 * kLeastPieceRows && L.R1 * L.row_length() >= 2 * kPieceElements;
}

// Cuts one tensor, either into tiles of whole groups or into pieces.
void cut(int32_t index, const StepTensor& tensor, std::vector<Tile>& whole, std::vector<LargeGroups>& large) {
  const Layout L = working_layout(tensor);
  if (L.numel() == 0) return;
  const int64_t size = element_size(tensor.dtype), z_size = size_of_z(tensor);
  const bool by_columns = summed_by_columns(L),
             divisible = !has_short_groups(tensor) && (by_columns || L.R2 >= kNarrow);
  // The most elements of z in a tile. If z lies in scratch, half of the limit is left for the other arrays in
  // scratch.
  const int64_t capacity = (holds_z(tensor) ? z_limit : z_limit / 2) / z_size;
  const int64_t least = std::max(L.R2, std::min(kLeastRowBytes / z_size, L.row_length()));
  if (divisible && (L.R1 * least > capacity || (by_columns && tall(L))))
    return cut_into_pieces(index, tensor, L, large);
  const int64_t elements = std::clamp(L.numel() / kTiles, kLeastElements, kTileElements);
  const bool runs = !needs_groups(tensor) || (has_short_groups(tensor) && L.R1 == 1);
  int64_t columns = std::clamp(elements / L.R1, 4 * kLine / size, (runs ? kRunBytes : kMaxRowBytes) / z_size);
  columns = std::max(std::min(columns, capacity / L.R1), least);
  // A tile has whole groups, and whole cache lines where possible.
  const int64_t aligned = std::lcm(L.R2, kLine / size);
  columns -= columns % (aligned <= columns ? aligned : L.R2);
  if (tensor.held != nullptr) return cut_others(index, L, columns, *tensor.held, whole);
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
  int64_t elements = 0;  // the number of elements in out.passes.back() so far
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
