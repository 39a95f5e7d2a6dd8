// How tensors are cut into the CUDA executor's work items.
#include <algorithm>
#include <numeric>

#include "cuda_step.h"

namespace cges::cuda {
namespace {

constexpr int64_t kSlab = 16384;      // elements of a block: enough to amortise it, few enough to share out
constexpr int64_t kTileBytes = 4096;  // of z of one warp's tile
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kMinRowBytes = 64;  // of a panel: at less, half of what the memory delivers is wasted
constexpr int64_t kPanelColumns = 128, kMinPanelColumns = 32;  // of panels in chunks

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

int32_t power_of_two_from(int64_t n) {
  int32_t p = 1;
  while (p < n) p *= 2;
  return p;
}

template <typename A>
class Cutter {
 public:
  Cutter(const Device& device, int64_t size) : device_(device), size_(size), vector_(16 / size) {}

  void add(int32_t tensor, const TensorShape& shape) {
    tensor_ = tensor;
    const Layout L = shape.layout.rows_last();
    if (L.numel() == 0) return;
    if (!shape.has_groups)
      add_elements(L.numel());
    else if (L.R1 == 1)
      add_runs(L.num_groups(), L.R2);
    else
      add_matrices(L);
  }

  // Chunks wait in panels until all are known: a window holds whole ones.
  Work finish() {
    const int64_t keeps = device_.l2_bytes / 2 / (3 * size_ * kSlab);
    size_t longest = 0;
    for (const auto& panel : panels_) longest = std::max(longest, panel.size());
    const int64_t limit = std::max<int64_t>(keeps, longest);
    std::vector<std::vector<Item>> windows;
    for (const auto& panel : panels_) {
      if (windows.empty() || int64_t(windows.back().size() + panel.size()) > limit) windows.emplace_back();
      windows.back().insert(windows.back().end(), panel.begin(), panel.end());
    }
    for (const auto& window : windows) work_.window = std::max<int64_t>(work_.window, window.size());
    Item idle{};
    idle.tensor = -1;
    for (auto& window : windows) {
      window.resize(work_.window, idle);
      work_.chunks.insert(work_.chunks.end(), window.begin(), window.end());
    }
    work_.panels = int32_t(panels_.size());
    return std::move(work_);
  }

 private:
  // n contiguous elements as rows of all of a block's threads.
  Item span(Item::Cut cut, int64_t begin, int64_t n) const {
    const int64_t columns = std::max<int64_t>(std::min(n, kThreads * vector_), 1),
                  rows = ceil_div(n, columns);
    return {begin,
            columns,
            tensor_,
            cut,
            int32_t(rows),
            int32_t(columns),
            int32_t(n - (rows - 1) * columns),
            int32_t(columns),
            power_of_two_from(ceil_div(columns, vector_))};
  }

  Item panel(int64_t begin, int64_t pitch, int64_t rows, int64_t columns, int64_t run) const {
    return {begin,
            pitch,
            tensor_,
            Item::Cut::slab,
            int32_t(rows),
            int32_t(columns),
            int32_t(columns),
            int32_t(std::min(run, columns)),
            power_of_two_from(ceil_div(columns, vector_))};
  }

  int64_t shared_bytes(const Item& item) const {
    return SharedLayout<A>(item.groups()).z + item.rows * round_up(item.columns, vector_) * sizeof(A);
  }
  bool fits(const Item& item) const {
    return item.columns <= kThreads * vector_ && (item.groups() == 1 || item.columns <= kThreads) &&
           shared_bytes(item) <= device_.shared_bytes;
  }

  void push(const Item& item, int64_t bytes) {
    work_.blocks.push_back(item);
    work_.shared_blocks = std::max(work_.shared_blocks, bytes);
  }
  void push(const Item& item) { push(item, shared_bytes(item)); }
  void push_cluster_part(const Item& item) {
    work_.clusters.push_back(item);
    work_.shared_clusters = std::max(work_.shared_clusters, shared_bytes(item));
  }

  void push_panel(std::vector<Item> chunks) {
    for (Item& item : chunks) {
      item.panel = int32_t(panels_.size());
      item.chunk = int32_t(&item - chunks.data());
      item.chunks = int32_t(chunks.size());
      item.slot = work_.scratch_bytes;
      work_.shared_blocks = std::max(work_.shared_blocks, shared_bytes(item));
    }
    const int64_t groups = chunks.front().groups();
    work_.scratch_bytes += state_bytes<A>(groups) + round_up(chunks.size() * groups * sizeof(Sums<A>), 16);
    panels_.push_back(std::move(chunks));
  }

  void add_elements(int64_t n) {
    const int64_t each = std::min(kSlab / 2, span_limit());
    for (int64_t i = 0; i < n; i += each) push(span(Item::Cut::elements, i, std::min(each, n - i)));
  }

  // Contiguous groups of n elements.
  void add_runs(int64_t groups, int64_t n) {
    const int64_t tile = std::min<int64_t>(kTileBytes / sizeof(A), device_.shared_bytes / kWarps / sizeof(A));
    if (n <= tile) return add_tiles(groups, n, tile);
    for (int64_t g = 0; g < groups; ++g) {
      const Item whole = span(Item::Cut::slab, g * n, n);
      const int64_t part = round_up(ceil_div(n, kClusterSize), vector_);
      if (fits(whole))
        push(whole);
      else if (device_.clusters && fits(span(Item::Cut::slab, 0, part)))
        for (int64_t i = 0; i < kClusterSize; ++i)
          push_cluster_part(
              span(Item::Cut::slab, g * n + i * part, std::clamp<int64_t>(n - i * part, 0, part)));
      else
        push_panel(chunks_of_run(g * n, n));
    }
  }

  // As many whole groups to a tile as fit; rows of 16 bytes where that is possible.
  void add_tiles(int64_t groups, int64_t n, int64_t tile) {
    int64_t together = tile / n;
    const int64_t aligned = vector_ / std::gcd(vector_, n);
    if (together >= aligned) together -= together % aligned;
    const int64_t columns = together * n, total = groups * n, each = columns * kWarps;
    // lanes of a group: so many that none idles, and that their addresses fall into different banks
    const int64_t lanes =
        std::max<int64_t>(std::gcd(n, int64_t{kWarp}), power_of_two_from(ceil_div(kWarp, together)));
    for (int64_t i = 0; i < total; i += each) {
      const int64_t left = std::min(each, total - i), rows = ceil_div(left, columns);
      push({i, columns, tensor_, Item::Cut::tiles, int32_t(rows), int32_t(columns),
            int32_t(left - (rows - 1) * columns), int32_t(n), int32_t(lanes)},
           kWarps * round_up(columns, vector_) * sizeof(A));
    }
  }

  // At each k1 a matrix of R1 rows and K2*R2 columns, cut into panels of whole groups.
  void add_matrices(const Layout& L) {
    const int64_t part = ceil_div(L.R1, kClusterSize), wish = std::clamp<int64_t>(kSlab / L.R1, 64, kThreads);
    int64_t columns = 0;
    bool cluster = false;
    for (const int64_t step : panel_steps(L)) {
      if ((columns = widest(L, L.R1, step, wish)) > 0) break;
      if ((cluster = device_.clusters && (columns = widest(L, part, step, kPanelColumns)) > 0)) break;
    }
    const bool whole = columns > 0 && !cluster;
    if (columns == 0) columns = panel_columns(L);
    for (int64_t k1 = 0; k1 < L.K1; ++k1)
      for (int64_t c = 0; c < L.row_length(); c += columns) {
        const int64_t width = std::min(columns, L.row_length() - c), pitch = L.row_length();
        const auto rows_from = [&](int64_t r, int64_t rows) {
          return panel(L.offset(k1, r, 0) + c, pitch, rows, width, L.R2);
        };
        if (whole) {
          push(rows_from(0, L.R1));
        } else if (cluster) {
          for (int64_t i = 0; i < kClusterSize; ++i)
            push_cluster_part(rows_from(i * part, std::clamp<int64_t>(L.R1 - i * part, 0, part)));
        } else {
          push_panel(chunks_of_panel(L, L.offset(k1, 0, 0) + c, width));
        }
      }
  }

  // What a panel's columns are a multiple of, best first: whole groups, in whole sectors of the memory, or in
  // accesses of 16 bytes, or as they are. Where rows lie at odd addresses nothing is gained by the first two.
  std::vector<int64_t> panel_steps(const Layout& L) const {
    if (L.row_length() % vector_ != 0) return {L.R2};
    return {std::lcm(L.R2, kSectorBytes / size_), std::lcm(L.R2, vector_), L.R2};
  }

  // The most columns, a multiple of `step` if not all, with which `rows` rows fit a block; 0 where not even
  // the narrowest panel worth it does.
  int64_t widest(const Layout& L, int64_t rows, int64_t step, int64_t wish) const {
    const int64_t narrowest = round_up(kMinRowBytes / size_, step);
    for (int64_t c = std::max(wish / step * step, narrowest); c >= narrowest; c -= step) {
      const int64_t width = std::min(c, L.row_length());
      if (fits(panel(0, L.row_length(), rows, width, L.R2))) return width;
    }
    return 0;
  }

  // Wide enough for the memory, narrow enough that the L2 keeps a panel between two sweeps.
  int64_t panel_columns(const Layout& L) const {
    if (L.R2 > kThreads) return L.R2;
    int64_t columns = std::min<int64_t>(kPanelColumns, kThreads);
    while (columns > kMinPanelColumns && 3 * size_ * L.R1 * columns > device_.l2_bytes / 2) columns /= 2;
    for (const int64_t step : panel_steps(L))
      if (step <= columns) return columns / step * step;
    return L.R2;
  }

  std::vector<Item> chunks_of_run(int64_t begin, int64_t n) const {
    std::vector<Item> chunks;
    const int64_t each = std::min(kSlab, span_limit());
    for (int64_t i = 0; i < n; i += each)
      chunks.push_back(span(Item::Cut::slab, begin + i, std::min(each, n - i)));
    return chunks;
  }

  // A panel of several groups, or of one that is wider than a block: then each row in spans of its own.
  std::vector<Item> chunks_of_panel(const Layout& L, int64_t begin, int64_t width) const {
    std::vector<Item> chunks;
    const int64_t pitch = L.row_length(), most = std::min(width, width == L.R2 ? kThreads * vector_ : width);
    const int64_t limit =
        std::min(kSlab, (device_.shared_bytes - SharedLayout<A>(width / std::min(L.R2, width)).z) /
                            int64_t(sizeof(A)));
    const int64_t rows = std::max<int64_t>(limit / round_up(most, vector_), 1);
    for (int64_t r = 0; r < L.R1; r += rows)
      for (int64_t c = 0; c < width; c += most)
        chunks.push_back(
            panel(begin + r * pitch + c, pitch, std::min(rows, L.R1 - r), std::min(most, width - c), L.R2));
    return chunks;
  }

  // Elements of a span that fit a block.
  int64_t span_limit() const {
    const int64_t row = kThreads * vector_;
    const int64_t limit = (device_.shared_bytes - SharedLayout<A>(1).z) / int64_t(sizeof(A));
    return std::max(limit / row * row, row);
  }

  const Device device_;
  const int64_t size_, vector_;
  int32_t tensor_ = 0;
  Work work_;
  std::vector<std::vector<Item>> panels_;
};

template <typename A>
Work cut_all(const std::vector<TensorShape>& tensors, int64_t size, const Device& device) {
  Cutter<A> cutter(device, size);
  for (size_t i = 0; i < tensors.size(); ++i) cutter.add(int32_t(i), tensors[i]);
  return cutter.finish();
}

}  // namespace

Work cut(const std::vector<TensorShape>& tensors, DType dtype, const Device& device) {
  if (dtype == DType::f64) return cut_all<double>(tensors, sizeof(double), device);
  return cut_all<float>(tensors, dtype == DType::f32 ? 4 : 2, device);
}

}  // namespace cges::cuda
