// The CPU executor: one parallel region over a flat list of tiles, and one per pass over large groups,
// which go in pieces, see below.
//
// The step is bound by memory (20 bytes per fp32 element with momentum), so a tile is cut such that its z
// stays in the cache between the reduction and the apply: whole groups, as many neighbours as fit.
//   rows ("filter"):      a run of whole contiguous groups
//   columns ("feature"):  all R1 rows of a panel of neighbouring columns, cache lines wide
//   no groups:            a run of elements
// z is in w itself: what was read is written at once, and shrunk in place. Scratch is for what w cannot hold
// (16 bits, or zeros still needed) and for what is swept often (exact mode). Groups of a few elements are solved
// side by side, a block at a time, whose z is in scratch too (short_groups.h).
//
// A group that does not fit is cut into pieces, long runs of memory: one pass updates and sums, the sums of
// pieces are added in index order, and a second pass applies (28 bytes per element, less what the caches
// still hold; exact mode reads z once more per sweep). Columns whose rows lie a multiple of 4 KB apart go
// this way too, where rows are not too long. Where w cannot hold z the first pass only reads and sums, and the
// second updates again.
//
// Which columns share a tile depends on where in a line pair the tensor begins too; what is summed in which
// order, and so every bit of the result, on its shape, type and hyperparameters and the cache size alone.
#include "cpu/executor.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <numeric>

#include "cpu/cut.h"
#include "cpu/short_groups.h"
#include "cpu/tile.h"

namespace cges::cpu {
namespace {

constexpr int64_t kGroupsPerThread = 1024;     // at least, whose parts one thread adds up
constexpr int64_t kGroupsAtOnce = 128;         // of those
constexpr int64_t kLeastScratch = 640 << 10;   // bytes: what the widest pieces need, whatever the L2
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

// At most the L2, some of which is for what passes through.
Scratch& thread_scratch() {
  static thread_local const auto scratch =
      std::make_unique<Scratch>(std::max(l2_bytes() - l2_bytes() / 8, kLeastScratch));
  return *scratch;
}

enum class Order { forward, backward };

// f(item) for all of them. Each thread has a share of neighbours, the same one in every call, which its
// caches may still hold and which meets another thread's lines at its two ends only. It goes through them in
// that order; done with it, it helps the others from their other ends, and so even does all the work if it is
// alone.
template <typename Item, typename F>
void parallel_for_each(const std::vector<Item>& items, Order order, F f) {
  struct alignas(kLine) Share {
    std::atomic<int64_t> taken{0}, by_owner{0}, by_helpers{0};
  };
  const int64_t n = items.size();
  const int64_t elements =
      std::accumulate(items.begin(), items.end(), int64_t{0},
                      [](int64_t sum, const Item& item) { return sum + item.elements(); });
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
        f(items[upward ? begin + i : end - 1 - i]);
      }
    }
  });
}

template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<c10::BFloat16>();
    case DType::f16:
      return f.template operator()<c10::Half>();
  }
}

void run_whole_tiles(const std::vector<StepTensor>& tensors, const std::vector<Tile>& tiles) {
  parallel_for_each(tiles, Order::forward, [&](const Tile& all) {
    const StepTensor& tensor = tensors[all.tensor];
    const Layout layout = working_layout(tensor);
    const bool grouped = needs_groups(tensor), small = has_short_groups(tensor);
    with_type(tensor.dtype, [&]<typename T>() {
      if (small) return ShortGroups<T>(tensor, layout, thread_scratch()).run(all);
      for (Tile tile = all; tile.k1 < tile.k1_end; ++tile.k1) {
        TileRunner<T> runner(tensor, layout, tile, grouped ? TileKind::whole : TileKind::elementwise,
                             thread_scratch());
        grouped ? runner.run_whole() : runner.run_elementwise();
      }
    });
  });
}

// Two passes over large groups, in exact mode one more per further sweep.
template <typename T>
void run_large(const StepTensor& tensor, const LargeGroups& large) {
  using Runner = TileRunner<T>;
  using A = typename Runner::A;
  const Layout L = working_layout(tensor);
  const int64_t groups = large.groups, n = large.parts * groups;
  const auto pass = [&](Order order, auto f) {
    parallel_for_each(large.pieces, order, [&](const Piece& piece) {
      Runner runner(tensor, L, piece, TileKind::piece, thread_scratch());
      f(runner, piece.group, piece.part * groups + piece.group);
    });
  };

  // By part and group; whole groups are alive in part 0.
  const bool searches = tensor.h->searches();
  const auto memory = std::make_unique_for_overwrite<A[]>((searches ? 3 : 2) * n);
  const Sums<A> sums{searches ? &memory[2 * n] : nullptr, &memory[0], &memory[n]};
  const auto alive = std::make_unique_for_overwrite<bool[]>(n);
  std::vector<typename Runner::Solver> solvers(groups);
  for (auto& solver : solvers) solver.start(tensor.thresholds().as<A>());

  // Adds up the parts of groups [g0, g1) and goes on with their searches; whether all these are done.
  const auto solve = [&](int64_t g0, int64_t g1, bool first) {
    double count[kGroupsAtOnce] = {}, l1[kGroupsAtOnce] = {}, l2_squared[kGroupsAtOnce] = {};
    for (int64_t part = 0; part < large.parts; ++part) {
      const Sums<A> of_part = sums + (part * groups + g0);
      for (int64_t g = 0; g < g1 - g0; ++g) {
        l1[g] += of_part.l1[g];
        l2_squared[g] += of_part.l2_squared[g];
        if (searches) count[g] += of_part.count[g];
        if (first) alive[g0 + g] |= alive[part * groups + g0 + g];
      }
    }
    return Runner::solve(tensor, g1 - g0, &solvers[g0], {count, l1, l2_squared});
  };

  for (bool first = true;; first = false) {
    pass(Order::forward, [&](Runner& runner, int64_t group, int64_t at) {
      runner.sum_piece(&solvers[group], sums + at, alive.get() + at, first);
    });
    std::atomic<bool> done{true};
    at::parallel_for(0, groups, kGroupsPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g += kGroupsAtOnce)
        if (!solve(g, std::min(g + kGroupsAtOnce, end), first)) done = false;
    });
    if (done) break;
  }
  // Backward: what the last sweep ended with is still in the cache.
  pass(Order::backward, [&](Runner& runner, int64_t group, int64_t) {
    runner.apply_piece(&solvers[group], alive.get() + group);
  });
}

}  // namespace

void step(const std::vector<StepTensor>& tensors) {
  const Work work = cut(tensors);
  if (!work.whole.empty()) run_whole_tiles(tensors, work.whole);
  for (const LargeGroups& large : work.large) {
    const StepTensor& tensor = tensors[large.pieces.front().tensor];
    with_type(tensor.dtype, [&]<typename T>() { run_large<T>(tensor, large); });
  }
}

}  // namespace cges::cpu
