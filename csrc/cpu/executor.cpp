// Runs cpu::step on all threads. Tiles of whole groups (cut.cpp) are one flat list, which one parallel region
// works off. Large groups are cut into pieces and take a parallel region for each pass over them.
// plan/executor.cpp calls this.
//
// The step is bound by memory (20 bytes per fp32 element with momentum), so a tile is cut such that its z
// stays in the cache between the sums and the apply. It has whole groups, as many neighbours as fit:
//   rows ("filter"):      a run of whole contiguous groups
//   columns ("feature"):  if they are short, all R1 rows of a panel of neighbouring columns
//   no groups:            a run of elements
// z takes the place of w as soon as w has been read, and is shrunk in place. If w cannot hold z (16-bit
// types, or zeros of w that are still needed), z lies in scratch. Groups of a few elements are solved side by
// side, a block of them at a time, and their z lies in scratch too (short_groups.h).
//
// A group that does not fit a tile is cut into pieces, which are long runs of memory. A first pass updates
// and sums, the sums of the pieces are added in index order, and a second pass applies. That moves 28 bytes
// per element, less what the caches still hold; exact mode reads z once more for each further sweep. Columns
// of some hundred rows go in pieces as well, whole rows at a time, because panels of them would be too narrow
// for the processor to prefetch their rows. If w cannot hold z, the first pass only reads and sums, and the
// second updates again.
//
// The order of sums depends only on a tensor's shape, type and hyperparameters and on the cache size. The
// bits of the result depend on these and on the instruction set, which decides where a product and a sum are
// rounded once.
#include "cpu/executor.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <numeric>

#include "cpu/cut.h"
#include "cpu/short_groups.h"
#include "cpu/tile.h"

namespace cges::cpu {
namespace {

constexpr int64_t kGroupsPerThread = 1024;  // the fewest large groups whose parts one thread adds up
constexpr int64_t kGroupsAtOnce = 128;      // the number of these groups that are added up side by side
constexpr int64_t kLeastScratch = 1 << 20;  // the bytes that the widest pieces need, however small the L2 is
// For each column TileRunner takes s, t and alive, three sums in double, and up to two new states that are
// not kept; and a block of z.
static_assert((3 + 3 * 2 + 2) * kPieceRowBytes + kBlockBytes <= kLeastScratch);
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

// The thread's own scratch. An eighth of the L2 is left for tensors that pass through it.
Scratch& thread_scratch() {
  static thread_local const auto scratch =
      std::make_unique<Scratch>(std::max(l2_bytes() - l2_bytes() / 8, kLeastScratch));
  return *scratch;
}

enum class Order { forward, backward };

// Calls f for each item. Each thread has a share of neighbouring items, the same share in every call: its
// caches may still hold them, and only at the share's two ends are there cache lines of other threads. It
// works through them in `order`. When it is done it helps the other threads from the far ends of their
// shares, so a thread that runs alone does all the work.
//
// `taken` bounds what owner and helpers take together, so their two ends never cross, and each increment is
// atomic, so no item is taken twice. Items do not depend on each other, and the end of the region orders
// their writes before what follows: relaxed order is enough.
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

// Calls f with the C++ type of `dtype`.
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

// The state of LargeGroups from pass to pass: the sums of their parts and the searches of the groups. sum()
// and apply() are called once for each piece and pass, solve() between passes.
class LargeRun {
 public:
  LargeRun(const StepTensor& tensor, const LargeGroups& large)
      : large(large), tensor_(tensor), L_(working_layout(tensor)) {}
  virtual ~LargeRun() = default;

  virtual void sum(const Piece&, bool first) = 0;
  // Adds up the parts of groups [g0, g1) and advances their searches. Returns whether all of these are done.
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
  // Arrays of [parts, groups]. After the first solve(), part 0 of alive_ says for each whole group whether it
  // has a weight that is not zero.
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

// Takes large groups through their two passes. Exact mode has a further pass for each further sweep, which
// leaves out the LargeGroups whose searches are all done.
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
  // Backward, since the pieces that the last sweep ended with are still in the cache.
  parallel_for_each(pieces, Order::backward, [](const PieceOfRun& of) { of.run->apply(*of.piece); });
}

}  // namespace

void step(const std::vector<StepTensor>& tensors) {
  const Work work = cut(tensors);
  if (!work.whole.empty()) run_whole_tiles(tensors, work.whole);
  for (const std::vector<LargeGroups>& together : work.passes) run_large(tensors, together);
}

}  // namespace cges::cpu
