// The CPU executor: one parallel region over a flat list of tiles, and one per pass over large groups,
// which go in pieces, see below.
//
// The step is bound by memory (20 bytes per fp32 element with momentum), so a tile is cut such that its z
// stays in the cache between the reduction and the apply: whole groups, as many neighbours as fit.
//   rows ("filter"):      a run of whole contiguous groups
//   columns ("feature"):  where they are short, all R1 rows of a panel of neighbouring columns
//   no groups:            a run of elements
// z is in w itself: what was read is written at once, and shrunk in place. Scratch is for what w cannot hold
// (16 bits, or zeros still needed). Groups of a few elements are solved side by side, a block at a time, whose
// z is in scratch too (short_groups.h).
//
// A group that does not fit is cut into pieces, long runs of memory: one pass updates and sums, the sums of
// pieces are added in index order, and a second pass applies (28 bytes per element, less what the caches
// still hold; exact mode reads z once more per sweep). So are columns of some hundred rows, whole rows at a
// time: panels of them would be too narrow for the processor to see their rows come. Where w cannot hold z the
// first pass only reads and sums, and the second updates again.
//
// What is summed in which order depends on a tensor's shape, type and hyperparameters and the cache size alone; every
// bit of the result on these and the instruction set, which says where a product and a sum are rounded once.
#include "cpu/executor.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <numeric>

#include "cpu/cut.h"
#include "cpu/short_groups.h"
#include "cpu/tile.h"

namespace cges::cpu {
namespace {

constexpr int64_t kGroupsPerThread = 1024;  // at least, whose parts one thread adds up
constexpr int64_t kGroupsAtOnce = 128;      // of those
constexpr int64_t kLeastScratch = 1 << 20;  // bytes: what the widest pieces need, whatever the L2
// Six arrays of columns, of which sums are in double, a block of z and two new states that nobody keeps.
static_assert((3 + 3 * 2 + 2) * kPieceRowBytes + kBlockBytes <= kLeastScratch);
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

// LargeGroups on their way through the passes.
class LargeRun {
 public:
  LargeRun(const StepTensor& tensor, const LargeGroups& large)
      : large(large), tensor_(tensor), L_(working_layout(tensor)) {}
  virtual ~LargeRun() = default;

  virtual void sum(const Piece&, bool first) = 0;
  // Adds up the parts of groups [g0, g1) and goes on with their searches; whether all these are done.
  virtual bool solve(int64_t g0, int64_t g1, bool first) = 0;
  virtual void apply(const Piece&) = 0;

  const LargeGroups& large;
  std::atomic<bool> done{false};

 protected:
  const StepTensor& tensor_;
  const Layout L_;
};

template <typename T>
class TypedLargeRun final : public LargeRun {
  using Runner = TileRunner<T>;
  using A = typename Runner::A;

 public:
  TypedLargeRun(const StepTensor& tensor, const LargeGroups& large)
      : LargeRun(tensor, large),
        groups_(large.groups),
        n_(large.parts * groups_),
        searches_(tensor.h->searches()),
        memory_(std::make_unique_for_overwrite<A[]>((searches_ ? 3 : 2) * n_)),
        sums_{searches_ ? &memory_[2 * n_] : nullptr, &memory_[0], &memory_[n_]},
        alive_(std::make_unique_for_overwrite<bool[]>(n_)),
        solvers_(groups_) {
    for (auto& solver : solvers_) solver.start(tensor.thresholds().template as<A>());
  }

  void sum(const Piece& piece, bool first) override {
    const int64_t at = piece.part * groups_ + piece.group;
    runner(piece).sum_piece(&solvers_[piece.group], sums_ + at, alive_.get() + at, first);
  }

  bool solve(int64_t g0, int64_t g1, bool first) override {
    double count[kGroupsAtOnce] = {}, l1[kGroupsAtOnce] = {}, l2_squared[kGroupsAtOnce] = {};
    for (int64_t part = 0; part < large.parts; ++part) {
      const Sums<A> of_part = sums_ + (part * groups_ + g0);
      for (int64_t g = 0; g < g1 - g0; ++g) {
        l1[g] += of_part.l1[g];
        l2_squared[g] += of_part.l2_squared[g];
        if (searches_) count[g] += of_part.count[g];
        if (first) alive_[g0 + g] |= alive_[part * groups_ + g0 + g];
      }
    }
    return Runner::solve(tensor_, g1 - g0, &solvers_[g0], {count, l1, l2_squared});
  }

  void apply(const Piece& piece) override {
    if (tensor_.held != nullptr && piece.part == 0) (*tensor_.held)[piece.c0 / L_.R2] = !alive_[piece.group];
    runner(piece).apply_piece(&solvers_[piece.group], alive_.get() + piece.group);
  }

 private:
  Runner runner(const Piece& piece) const {
    return Runner(tensor_, L_, piece, TileKind::piece, thread_scratch());
  }

  const int64_t groups_, n_;
  const bool searches_;
  // By part and group; whole groups are alive in part 0.
  const std::unique_ptr<A[]> memory_;
  const Sums<A> sums_;
  const std::unique_ptr<bool[]> alive_;
  std::vector<typename Runner::Solver> solvers_;
};

struct PieceOfRun {
  LargeRun* run;
  const Piece* piece;
  int64_t elements() const { return piece->elements(); }
};

struct GroupsOfRun {
  LargeRun* run;
  int64_t begin, end;
};

// Two passes over large groups, in exact mode one more per further sweep.
void run_large(const std::vector<StepTensor>& tensors, const std::vector<LargeGroups>& together) {
  std::vector<std::unique_ptr<LargeRun>> runs;
  std::vector<PieceOfRun> pieces, open;
  std::vector<GroupsOfRun> groups;
  for (const LargeGroups& large : together) {
    const StepTensor& tensor = tensors[large.pieces.front().tensor];
    with_type(tensor.dtype,
              [&]<typename T>() { runs.push_back(std::make_unique<TypedLargeRun<T>>(tensor, large)); });
    LargeRun* const run = runs.back().get();
    for (const Piece& piece : large.pieces) pieces.push_back({run, &piece});
    for (int64_t g = 0; g < large.groups; g += kGroupsAtOnce)
      groups.push_back({run, g, std::min(g + kGroupsAtOnce, large.groups)});
  }
  open = pieces;
  for (bool first = true; !open.empty(); first = false) {
    parallel_for_each(open, Order::forward, [&](const PieceOfRun& of) { of.run->sum(*of.piece, first); });
    for (const auto& run : runs) run->done = true;
    at::parallel_for(0, groups.size(), kGroupsPerThread / kGroupsAtOnce, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (!groups[i].run->solve(groups[i].begin, groups[i].end, first)) groups[i].run->done = false;
    });
    std::erase_if(open, [](const PieceOfRun& of) { return of.run->done.load(); });
  }
  // Backward: what the last sweep ended with is still in the cache.
  parallel_for_each(pieces, Order::backward, [](const PieceOfRun& of) { of.run->apply(*of.piece); });
}

}  // namespace

void step(const std::vector<StepTensor>& tensors) {
  const Work work = cut(tensors);
  if (!work.whole.empty()) run_whole_tiles(tensors, work.whole);
  for (const std::vector<LargeGroups>& together : work.passes) run_large(tensors, together);
}

}  // namespace cges::cpu
