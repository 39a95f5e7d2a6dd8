// The CPU executor: one parallel region over a flat list of tiles, and one per pass for each tensor that goes
// in pieces, see below.
//
// The step is bound by memory (20 bytes per fp32 element with momentum), so a tile is cut such that its z
// stays in this core's L2 between the reduction and the apply: whole groups, as many neighbours as fit.
//   rows ("filter"):      a run of whole contiguous groups
//   columns ("feature"):  all R1 rows of a panel of neighbouring columns, cache lines wide
//   no groups:            a run of elements
// A group whose z does not fit is cut into pieces, long runs of memory: one pass updates, sums and leaves z
// in w, the pieces' sums are added in index order, and a second pass applies (28 bytes per element, less what
// the caches still hold; exact mode reads z once more per sweep). Columns whose rows lie a multiple of 4 KB
// apart go this way too, where rows are not too long. Weights of 16 bits cannot hold z, nor can those whose
// zeros are frozen one by one: there the first pass only reads and sums, and the second updates again.
//
// Which columns share a tile depends on where in a line pair the tensor begins too; what is summed in which
// order, and so every bit of the result, on its shape, type and hyperparameters and the cache size alone.
#include "cpu_step.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <atomic>
#include <numeric>

#include "cpu_tile.h"

namespace cges {
namespace {

constexpr int64_t kTileElements = 131072;  // enough to amortise a tile
constexpr int64_t kTiles = 4;              // but a tensor has so many to share out, unless they get too small
constexpr int64_t kLeastRowBytes = 256;    // of z: panels of narrower rows lose more than pieces do
constexpr int64_t kLinePair = 2 * kLine;   // fetched together, so panels shall not share one
// Pieces of large groups. Where groups are narrower than kNarrow, each piece leaves one set of sums per
// column: it has rows enough for those to weigh little.
constexpr int64_t kPieceElements = 32768;      // at least
constexpr int64_t kPieces = 16;                // where their rows are between
constexpr int64_t kLeastPieceRows = 128;       // this
constexpr int64_t kMostPieceRows = 512;        // and this
constexpr int64_t kPieceColumns = 8192;        // at most
constexpr int64_t kWholeRowBytes = 16384;      // at most, for pieces to be preferred to panels
constexpr int64_t kGroupsPerThread = 1024;     // at least, whose pieces one thread adds up
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
// `columns`, the first of them `skip` columns narrower.
void cut_grid(int32_t tensor, const Layout& L, int64_t span, int64_t rows, int64_t columns, int64_t skip,
              std::vector<Tile>& tiles) {
  for (int64_t k1 = 0; k1 < L.K1; k1 += span)
    for (int64_t r = 0; r < L.R1; r += rows)
      for (int64_t c = -skip; c < L.row_length(); c += columns)
        tiles.push_back({tensor, k1, std::min(k1 + span, L.K1), r, std::min(r + rows, L.R1),
                         std::max(c, int64_t{0}), std::min(c + columns, L.row_length())});
}

// How far into a line pair each row begins, in columns; 0 where that differs from row to row.
int64_t columns_into_pair(const TensorStep& step, const Layout& L, int64_t size) {
  const bool rows_agree = L.R1 > 1 && L.R2 == 1 && L.row_length() * size % kLinePair == 0;
  return rows_agree ? int64_t(reinterpret_cast<uintptr_t>(step.w) % kLinePair) / size : 0;
}

// Rows that alias share few sets of each cache, and a panel's rows are too short for the processor to see
// them come. Whole rows of some KB are long runs of memory; but exact mode reads z again and again.
bool better_in_pieces(const TensorStep& step, const Layout& L, int64_t size) {
  return rows_alias(L, size) && L.row_length() * size <= kWholeRowBytes && L.R2 < kNarrow &&
         L.R1 >= 4 * kLeastPieceRows && holds_z(step) && !step.h->exact && step.h->thresholds.need_norms();
}

// n in the fewest parts of at most `most`, as even as can be: the size of one.
int64_t even_part(int64_t n, int64_t most) {
  const int64_t parts = (n + most - 1) / most;
  return (n + parts - 1) / parts;
}

void cut(int32_t tensor, const TensorStep& step, std::vector<Tile>& whole, std::vector<Tile>& pieces) {
  const Layout L = working_layout(step);
  if (L.numel() == 0) return;
  const int64_t size = c10::elementSize(step.dtype);
  const int64_t z_size = std::max<int64_t>(size, sizeof(float)), capacity = z_bytes / z_size;
  const bool narrow = L.R2 < kNarrow;
  const int64_t least = std::max(L.R2, std::min(kLeastRowBytes / z_size, L.row_length()));
  if (L.R1 * least > capacity || better_in_pieces(step, L, size)) {
    const int64_t columns =
        narrow ? std::min(kPieceColumns / L.R2 * L.R2, L.row_length()) : std::min(L.R2, kPieceElements / 2);
    const int64_t rows = narrow ? std::clamp(L.R1 / kPieces, kLeastPieceRows, kMostPieceRows) : 1;
    const int64_t most = std::max(rows, kPieceElements / columns);
    return cut_grid(tensor, L, 1, even_part(L.R1, most), columns, 0, pieces);
  }
  const int64_t elements = std::clamp(L.numel() / kTiles, kElementsPerThread, kTileElements);
  int64_t columns = std::clamp(elements / L.R1, 4 * kLine / size, kMaxColumns);
  columns = std::max(std::min(columns, capacity / L.R1), least);
  // Whole groups, and whole line pairs where possible.
  const int64_t aligned = std::lcm(L.R2, (L.R2 == 1 ? kLinePair : kLine) / size);
  columns -= columns % (aligned <= columns ? aligned : L.R2);
  const int64_t width = std::min(columns, L.row_length());
  const int64_t skip = width < L.row_length() ? columns_into_pair(step, L, size) : 0;
  cut_grid(tensor, L, std::max(elements / (L.R1 * width), int64_t{1}), L.R1, columns, skip, whole);
}

Scratch& thread_scratch() {
  static thread_local const auto scratch = std::make_unique<Scratch>(l2_bytes() + kSmallArrays);
  return *scratch;
}

enum class Order { forward, backward };

// f(i) for all i < n. Each thread has a share of neighbours, the same one in every call, which its caches may
// still hold and which meets another thread's lines at its two ends only. It goes through them in that order;
// done with it, it helps the others from their other ends, and so even does all the work if it is alone.
template <typename F>
void parallel_for_each(int64_t n, int64_t elements, Order order, F f) {
  struct alignas(kLine) Share {
    std::atomic<int64_t> taken{0}, by_owner{0}, by_helpers{0};
  };
  const int64_t threads = std::min({int64_t{at::get_num_threads()}, n, elements / kElementsPerThread + 1});
  std::vector<Share> shares(threads);
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t owner = (thread + k) % threads;
      const int64_t begin = n * owner / threads, end = n * (owner + 1) / threads;
      Share& share = shares[owner];
      const bool upward = (order == Order::forward) == (k == 0);
      std::atomic<int64_t>& done = k == 0 ? share.by_owner : share.by_helpers;
      while (share.taken.fetch_add(1, std::memory_order_relaxed) < end - begin) {
        const int64_t i = done.fetch_add(1, std::memory_order_relaxed);
        f(upward ? begin + i : end - 1 - i);
      }
    }
  });
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
  parallel_for_each(tiles.size(), elements_of(tiles), Order::forward, [&](int64_t i) {
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
  const auto pass = [&](Order order, auto f) { parallel_for_each(n, elements_of(pieces), order, f); };

  std::vector<int64_t> slot(n + 1, 0);  // where each piece's sums begin
  for (int64_t i = 0; i < n; ++i) slot[i + 1] = slot[i] + runner(i).groups();
  const auto sums = std::make_unique_for_overwrite<PieceSums[]>(slot[n]);
  std::vector<PieceSums> totals(L.num_groups());
  std::vector<typename Runner::Solver> solvers(L.num_groups());
  for (auto& solver : solvers) solver.start(Runner::thresholds_of(step));

  for (bool first = true;; first = false) {
    pass(Order::forward,
         [&](int64_t i) { runner(i).sum_piece(&solvers[first_group(i)], &sums[slot[i]], first); });
    std::atomic<bool> done{true};
    at::parallel_for(0, L.num_groups(), kGroupsPerThread, [&](int64_t g0, int64_t g1) {
      for (int64_t g = g0; g < g1; ++g)
        totals[g].stats = {0, 0, 0};  // what is alive was seen in the first pass
      for (int64_t i = 0; i < n; ++i) {
        const int64_t first_g = first_group(i), end_g = first_g + slot[i + 1] - slot[i];
        for (int64_t g = std::max(g0, first_g); g < std::min(g1, end_g); ++g)
          totals[g] += sums[slot[i] + g - first_g];
      }
      if (!Runner::solve(step, g1 - g0, &solvers[g0], [&](int64_t g) { return totals[g0 + g].stats; }))
        done = false;
    });
    if (done) break;
  }
  // Backward: what the last sweep ended with is still in the cache.
  pass(Order::backward,
       [&](int64_t i) { runner(i).apply_piece(&solvers[first_group(i)], &totals[first_group(i)]); });
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
