// Cuts groups that not even several blocks together can hold into chunks, for step_chunks. cut.cpp uses it
// for groups that fit no other path.
#pragma once
#include <algorithm>
#include <numeric>

#include "cuda/executor.h"

namespace cges::cuda {

constexpr int64_t kSlab = 16384;  // the elements of a block: enough to amortise it, few enough to share out

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

template <typename A>
class ChunkCutter {
 public:
  ChunkCutter(const Device& device, int64_t size, int states, Work& work)
      : device_(device), size_(size), vector_(16 / size), states_(states), work_(work) {}

  // Adds a group of n contiguous elements.
  void add_run(int32_t tensor, int64_t begin, int64_t n) {
    tensor_ = tensor;
    push_panel(chunks_of_run(begin, n));
  }

  // Adds the groups of a matrix at each k1, as panels of some columns.
  void add_panels(int32_t tensor, const Layout& L) {
    tensor_ = tensor;
    const int64_t columns = panel_columns(L), pitch = L.row_length();
    for (int64_t k1 = 0; k1 < L.K1; ++k1)
      for (int64_t c = 0; c < pitch; c += columns)
        push_panel(chunks_of_panel(L, L.offset(k1, 0, 0) + c, std::min(columns, pitch - c)));
  }

  // Puts chunks into windows, each of which goes through all stages before the next window does. A window
  // has as many whole panels as fit half of the L2, so that a stage finds in the L2 what the stage before
  // has read. The other half still holds the data of the window before.
  void add_windows() {
    auto& chunks = work_.chunks;
    const int64_t keeps = device_.l2_bytes / 2 / ((2 + states_) * size_);
    for (size_t begin = 0, end = 0; begin < chunks.size(); begin = end) {
      int64_t elements = 0;
      do {
        const size_t next = end + chunks[end].chunks;
        int64_t more = 0;
        for (size_t i = end; i < next; ++i) more += int64_t(chunks[i].rows) * chunks[i].columns;
        if (end > begin && elements + more > keeps) break;
        elements += more;
        end = next;
      } while (end < chunks.size());
      for (size_t i = begin; i < end; ++i) {
        chunks[i].window_begin = int32_t(begin);
        chunks[i].window_size = int32_t(end - begin);
      }
    }
  }

 private:
  static constexpr int64_t kSectorBytes = 32;
  static constexpr int64_t kPanelColumns = 128, kMinPanelColumns = 32;

  // A chunk of n contiguous elements, whose rows are as long as all threads of a block reach.
  Item span(int64_t begin, int64_t n) const {
    const int64_t columns = std::max(std::min(n, row_of_threads()), int64_t{1}), rows = ceil_div(n, columns);
    return item(begin, columns, rows, columns, n - (rows - 1) * columns, columns);
  }

  Item panel(int64_t begin, int64_t pitch, int64_t rows, int64_t columns, int64_t run) const {
    return item(begin, pitch, rows, columns, columns, run);
  }

  Item item(int64_t begin, int64_t pitch, int64_t rows, int64_t columns, int64_t last_columns,
            int64_t run) const {
    Item made{};
    made.begin = begin;
    made.pitch = pitch;
    made.tensor = tensor_;
    made.rows = int32_t(rows);
    made.columns = int32_t(columns);
    made.last_columns = int32_t(last_columns);
    made.run = int32_t(std::min(run, columns));
    made.lanes = int32_t(ceil_div(columns, vector_));
    return made;
  }

  int64_t row_of_threads() const { return kThreads * vector_; }
  int64_t shared_bytes(int64_t rows, int64_t columns, int64_t groups) const {
    return SharedLayout<A>(groups).z + rows * round_up(columns, vector_) * int64_t(sizeof(A));
  }
  int64_t shared_bytes(const Item& x) const { return shared_bytes(x.rows, x.columns, x.groups()); }

  bool panel_fits(int64_t rows, int64_t columns, int64_t groups) const {
    return columns <= (groups == 1 ? row_of_threads() : kThreads) &&
           shared_bytes(rows, columns, groups) <= device_.shared_bytes;
  }

  // The most elements of a span that fits a block, up to `wish`, in whole rows of all threads.
  int64_t span_size(int64_t wish) const {
    const int64_t most = (device_.shared_bytes - SharedLayout<A>(1).z) / int64_t(sizeof(A));
    return std::max(std::min(wish, most) / row_of_threads(), int64_t{1}) * row_of_threads();
  }

  // Adds a panel of these chunks, with its part of the scratch.
  void push_panel(std::vector<Item> chunks) {
    for (Item& x : chunks) {
      x.panel = work_.panels;
      x.chunk = int32_t(&x - chunks.data());
      x.chunks = int32_t(chunks.size());
      x.scratch = work_.scratch_bytes;
      work_.shared_chunks = std::max(work_.shared_chunks, shared_bytes(x));
    }
    const int64_t groups = chunks.front().groups();
    work_.scratch_bytes += state_bytes<A>(groups) + round_up(chunks.size() * groups * sizeof(Sums<A>), 16);
    work_.chunks.insert(work_.chunks.end(), chunks.begin(), chunks.end());
    ++work_.panels;
  }

  // The number of columns of a panel: enough for the memory to be fast, and few enough that the L2 keeps the
  // panel between two sweeps. A group that is wider than a block is a panel of its own.
  int64_t panel_columns(const Layout& L) const {
    if (L.R2 > kThreads) return L.R2;
    int64_t columns = std::min<int64_t>(kPanelColumns, kThreads);
    while (columns > kMinPanelColumns && (3 * size_ * L.R1 * columns > device_.l2_bytes / 2 ||
                                          !panel_fits(1, columns, ceil_div(columns, L.R2))))
      columns /= 2;
    // The columns are whole groups, and if possible whole sectors of the memory, or else whole accesses.
    for (const int64_t step : {std::lcm(L.R2, kSectorBytes / size_), std::lcm(L.R2, vector_)})
      if (step <= columns) return columns / step * step;
    return std::max(columns / L.R2, int64_t{1}) * L.R2;
  }

  std::vector<Item> chunks_of_run(int64_t begin, int64_t n) const {
    std::vector<Item> chunks;
    const int64_t each = span_size(kSlab);
    for (int64_t i = 0; i < n; i += each) chunks.push_back(span(begin + i, std::min(each, n - i)));
    return chunks;
  }

  // The chunks of a panel of `width` columns. If it is one group that is wider than a block, each row is cut
  // into spans.
  std::vector<Item> chunks_of_panel(const Layout& L, int64_t begin, int64_t width) const {
    std::vector<Item> chunks;
    const int64_t pitch = L.row_length(), most = std::min(width, width == L.R2 ? row_of_threads() : width);
    const int64_t room = device_.shared_bytes - SharedLayout<A>(ceil_div(width, L.R2)).z;
    const int64_t fits = std::min(kSlab, room / int64_t(sizeof(A))) / round_up(most, vector_);
    const int64_t rows = std::max(fits, int64_t{1});
    for (int64_t r = 0; r < L.R1; r += rows)
      for (int64_t c = 0; c < width; c += most)
        chunks.push_back(
            panel(begin + r * pitch + c, pitch, std::min(rows, L.R1 - r), std::min(most, width - c), L.R2));
    return chunks;
  }

  const Device& device_;
  const int64_t size_, vector_;
  const int states_;  // the number of states that the rule keeps
  Work& work_;
  int32_t tensor_ = 0;
};

}  // namespace cges::cuda
