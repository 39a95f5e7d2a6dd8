// The CPU executor: one parallel region over a flat list of tiles.
//
// The step is bound by memory (20 bytes per fp32 element with momentum), so a tile is cut such that its z
// stays in this core's L2 between the reduction and the apply: whole groups, as many neighbours as fit.
//   rows ("filter"):      a run of whole contiguous groups
//   columns ("feature"):  all R1 rows of a panel of neighbouring columns, cache lines wide
//   no groups:            a run of elements
// A group whose z does not fit is cut into pieces, long runs of memory: one pass updates, sums and leaves z
// in w, the pieces' sums are added in index order, and a second pass applies (28 bytes per element; exact mode
// reads z once more per sweep). Weights of 16 bits cannot hold z, nor can those whose zeros are frozen one by
// one: there the first pass only reads and sums, and the second updates again. How a tensor is cut depends on
// its shape and the cache size alone, so no bit depends on the threads.
#include "cpu_step.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <atomic>
#include <numeric>

#include "cpu_tile.h"

namespace cges {
namespace {

constexpr int64_t kTileElements = 65536;       // enough to amortise a tile, small enough to share out
constexpr int64_t kLeastRowBytes = 256;        // of z: panels of narrower rows lose more than pieces do
constexpr int64_t kPieceElements = 32768;      // of a group too large for a tile
constexpr int64_t kPieceRows = 512;            // at least: a piece leaves one set of sums per column
constexpr int64_t kPieceColumns = 8192;        // at most, where groups are narrower than kNarrow
constexpr int64_t kSmallArrays = 512 << 10;    // bytes of scratch beside z, mostly never touched
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  return std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 << 10, 2 << 20);
#else
  return 1 << 20;
#endif
}

// How much of z a tile may keep. Tests lower it, so that small tensors take the path of large ones.
int64_t z_bytes = l2_bytes();

bool needs_groups(const TensorStep& step) {
  return step.has_groups && (step.h->thresholds.need_norms() || step.h->freeze == Freeze::group);
}

// Groups are contiguous runs where nothing is kept behind them; without groups any run will do.
Layout working_layout(const TensorStep& step) {
  return needs_groups(step) ? step.layout.rows_last() : Layout{1, 1, step.layout.numel(), 1};
}

// Cuts the R1 rows and K2*R2 columns at each k1, `span` of the k1 together, into tiles of at most `rows` by
// `columns`.
void cut_grid(int32_t tensor, const Layout& L, int64_t span, int64_t rows, int64_t columns,
              std::vector<Tile>& tiles) {
  for (int64_t k1 = 0; k1 < L.K1; k1 += span)
    for (int64_t r = 0; r < L.R1; r += rows)
      for (int64_t c = 0; c < L.row_length(); c += columns)
        tiles.push_back({tensor, k1, std::min(k1 + span, L.K1), r, std::min(r + rows, L.R1), c,
                         std::min(c + columns, L.row_length())});
}

void cut(int32_t tensor, const TensorStep& step, std::vector<Tile>& whole, std::vector<Tile>& pieces) {
  const Layout L = working_layout(step);
  if (L.numel() == 0) return;
  const int64_t size = c10::elementSize(step.dtype), line = kLine / size;
  const int64_t z_size = std::max<int64_t>(size, sizeof(float)), capacity = z_bytes / z_size;
  const int64_t least = std::max(L.R2, std::min(kLeastRowBytes / z_size, L.row_length()));
  if (L.R1 * least > capacity) {
    const bool narrow = L.R2 < kNarrow;
    const int64_t columns = narrow ? kPieceColumns / L.R2 * L.R2 : std::min(L.R2, kPieceElements / 2);
    const int64_t rows = std::max(kPieceElements / columns, narrow ? kPieceRows : 1);
    return cut_grid(tensor, L, 1, rows, columns, pieces);
  }
  int64_t columns = std::clamp(kTileElements / L.R1, 4 * line, kMaxColumns);
  columns = std::max(std::min(columns, capacity / L.R1), least);
  const int64_t aligned = std::lcm(L.R2, line);  // whole groups, and whole cache lines where possible
  columns -= columns % (aligned <= columns ? aligned : L.R2);
  const int64_t width = std::min(columns, L.row_length());
  cut_grid(tensor, L, std::max(kTileElements / (L.R1 * width), int64_t{1}), L.R1, columns, whole);
}

Scratch& thread_scratch() {
  static thread_local const auto scratch = std::make_unique<Scratch>(l2_bytes() + kSmallArrays);
  return *scratch;
}

// f(i) for all i < n, shared out in runs of neighbours as the threads ask for more.
template <typename F>
void parallel_for_each(int64_t n, int64_t elements, F f) {
  const int64_t threads = std::min({int64_t{at::get_num_threads()}, n, elements / kElementsPerThread + 1});
  const int64_t run = std::clamp<int64_t>(n / (threads * 16), 1, 16);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(run, std::memory_order_relaxed)) < n;)
      for (int64_t end = std::min(i + run, n); i < end; ++i) f(i);
  };
  if (threads <= 1 || at::in_parallel_region())
    work(0, 1);
  else
    at::parallel_for(0, threads, 1, work);
}

template <typename F>
void with_type(c10::ScalarType dtype, F f) {
  switch (dtype) {
    case c10::kFloat:
      return f.template operator()<float>();
    case c10::kDouble:
      return f.template operator()<double>();
    case c10::kBFloat16:
      return f.template operator()<c10::BFloat16>();
    case c10::kHalf:
      return f.template operator()<c10::Half>();
    default:
      TORCH_CHECK(false, "cpu executor: expected float32, float64, bfloat16 or float16, got ", dtype);
  }
}

int64_t elements_of(const std::vector<Tile>& tiles) {
  return std::accumulate(tiles.begin(), tiles.end(), int64_t{0},
                         [](int64_t n, const Tile& tile) { return n + tile.elements(); });
}

void run_whole_tiles(const std::vector<TensorStep>& steps, const std::vector<Tile>& tiles) {
  parallel_for_each(tiles.size(), elements_of(tiles), [&](int64_t i) {
    const TensorStep& step = steps[tiles[i].tensor];
    const bool grouped = needs_groups(step);
    with_type(step.dtype, [&]<typename T>() {
      for (Tile tile = tiles[i]; tile.k1 < tile.k1_end; ++tile.k1) {
        TileRunner<T> runner(step, working_layout(step), tile,
                             grouped ? TileKind::whole : TileKind::elementwise, thread_scratch());
        grouped ? runner.run_whole() : runner.run_elementwise();
      }
    });
  });
}

// Two passes over the pieces of one tensor's groups, in exact mode one more per further sweep.
template <typename T>
void run_pieces(const TensorStep& step, const std::vector<Tile>& pieces) {
  using Runner = TileRunner<T>;
  const Layout L = working_layout(step);
  const int64_t n = pieces.size();
  const auto runner = [&](int64_t i) {
    return Runner(step, L, pieces[i], TileKind::piece, thread_scratch());
  };
  const auto first_group = [&](int64_t i) { return pieces[i].k1 * L.K2 + pieces[i].c0 / L.R2; };
  const auto pass = [&](auto f) { parallel_for_each(n, elements_of(pieces), f); };

  std::vector<int64_t> slot(n + 1, 0);  // where each piece's sums begin
  for (int64_t i = 0; i < n; ++i) slot[i + 1] = slot[i] + runner(i).groups();
  std::vector<PieceSums> sums(slot[n]), totals(L.num_groups());
  std::vector<typename Runner::Solver> solvers(L.num_groups());
  for (auto& solver : solvers) solver.start(Runner::thresholds_of(step));

  for (bool first = true;; first = false) {
    pass([&](int64_t i) { runner(i).sum_piece(&solvers[first_group(i)], &sums[slot[i]], first); });
    for (PieceSums& total : totals) total.stats = {0, 0, 0};  // what is alive was seen in the first pass
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < slot[i + 1] - slot[i]; ++k) totals[first_group(i) + k] += sums[slot[i] + k];
    if (Runner::solve(step, L.num_groups(), solvers.data(), [&](int64_t g) { return totals[g].stats; }))
      break;
  }
  pass([&](int64_t i) { runner(i).apply_piece(&solvers[first_group(i)], &totals[first_group(i)]); });
}

}  // namespace

void limit_z_bytes(int64_t bytes) { z_bytes = std::min(bytes, l2_bytes()); }

void cpu_step(const std::vector<TensorStep>& steps) {
  std::vector<Tile> whole;
  std::vector<std::vector<Tile>> pieces;
  for (size_t i = 0; i < steps.size(); ++i) {
    std::vector<Tile> of_tensor;
    cut(int32_t(i), steps[i], whole, of_tensor);
    if (!of_tensor.empty()) pieces.push_back(std::move(of_tensor));
  }
  if (!whole.empty()) run_whole_tiles(steps, whole);
  for (const auto& of_tensor : pieces) {
    const TensorStep& step = steps[of_tensor.front().tensor];
    with_type(step.dtype, [&]<typename T>() { run_pieces<T>(step, of_tensor); });
  }
}

}  // namespace cges
