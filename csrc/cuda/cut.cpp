// Cuts tensors into the work items of the CUDA executor. A tensor takes the first path of rows, tiles, shared
// panels and chunks that can hold its groups; docs/design/cuda-executor.md describes these. CudaExecutor
// (plan/cuda_executor.cpp) calls cut() once.
#include <algorithm>
#include <numeric>

#include "cuda/cut_chunks.h"

namespace cges::cuda {
namespace {

// A part of a shared panel leaves one kWaitRoom-th of the room for z free, so that its block can take in rows
// of the next tile while it waits for the other parts.
constexpr int64_t kWaitRoom = 5;
constexpr int64_t kSmallTile = 8192;  // the number of elements up to which tiles are not cut smaller
// The bytes of each row that a tile holds. With 256 the memory reaches its full speed, with 128 nine tenths
// of that, with 64 half.
constexpr int64_t kTileRowBytes = 256, kNarrowRowBytes = 128, kLeastRowBytes = 64;
// The number of accesses of 16 bytes (kPacks), or of one element (kSingles), that a thread of a strip makes
// to a tensor, unless its group needs more.
constexpr int64_t kPacks = 2, kSingles = 8;

int64_t ceil_power_of_two(int64_t n) { return n <= 1 ? 1 : 2 * ceil_power_of_two(ceil_div(n, 2)); }

template <typename A>
class Cutter {
 public:
  Cutter(const Device& device, int64_t size, int states)
      : device_(device),
        size_(size),
        states_(states),
        vector_(16 / size),
        elements_of_thread_(size == 8 ? kElementsOfThread<8> : kElementsOfThread<4>) {}

  // Cuts a tensor. Rows and elements without groups only go on lists: finish() settles how many threads a
  // strip has, and whether elements go with the rows or with the tiles.
  void add(int32_t tensor, const TensorShape& shape) {
    tensor_ = tensor;
    const Layout L = shape.layout.rows_last();
    if (L.numel() == 0) return;
    if (!shape.has_groups)
      elements_.push_back({tensor, L.numel(), 1});
    else if (L.R1 == 1 && L.R2 <= kThreads * elements_of_thread_)
      rows_.push_back({tensor, L.num_groups(), L.R2});
    else if (L.R1 == 1)
      add_long_rows(L.num_groups(), L.R2);
    else
      add_matrices(L);
  }

  Work finish() {
    const bool rows_run = !rows_.empty() || work_.tiles.empty();
    // Small blocks come and go more evenly. They have all kThreads only where a group needs as many.
    work_.strip_threads = kThreads / 2;
    for (const Rows& x : rows_)
      if (lanes_of(x.size) > work_.strip_threads) work_.strip_threads = kThreads;
    for (const Rows& x : rows_) add_rows(x);
    for (const Rows& x : elements_) {
      tensor_ = x.tensor;
      if (rows_run)
        add_strips(Strip::Kind::elements, x.groups);
      else
        add_elements(x.groups);
    }
    // The largest tiles come first, so that only small ones are left at the end.
    std::stable_sort(work_.tiles.begin(), work_.tiles.end(),
                     [](const Tile& a, const Tile& b) { return elements_of(a) > elements_of(b); });
    work_.tiles_in_parts = int32_t(parts_.size());
    work_.tiles.insert(work_.tiles.begin(), parts_.begin(), parts_.end());
    share_memory();
    chunks_.add_windows();
    return std::move(work_);
  }

 private:
  static int64_t elements_of(const Tile& x) { return int64_t{x.rows} * x.columns * (x.across / x.lanes); }

  // A tile of n contiguous elements, which are one group, a part of one, or without groups. Its rows are as
  // long as all threads of a block reach.
  Tile tile_of_run(Tile::Kind kind, int64_t begin, int64_t n) const {
    const int64_t columns = std::min(n, kTileThreads * vector_), rows = ceil_div(n, columns);
    Tile made = tile(begin, columns, rows, columns, columns, 1);
    made.kind = kind;
    made.last_columns = uint16_t(n - (rows - 1) * columns);
    return made;
  }
  Tile tile(int64_t begin, int64_t pitch, int64_t rows, int64_t columns, int64_t run,
            int64_t matrices) const {
    const int64_t lanes = ceil_div(columns, vector_), across = lanes * matrices, down = kTileThreads / across;
    Tile made{};
    made.begin = begin;
    made.pitch = pitch;
    made.rows = int32_t(rows);
    made.tensor = uint16_t(tensor_);
    made.kind = Tile::Kind::groups;
    made.columns = made.last_columns = uint16_t(columns);
    made.run = uint16_t(run);
    made.groups_each = uint16_t(columns / run);
    made.groups = uint16_t(made.groups_each * matrices);
    made.lanes = uint16_t(lanes);
    made.across = uint16_t(across);
    made.down = uint16_t(down);
    made.passes = uint16_t(ceil_div(rows, down));
    made.parts = 1;
    made.across_inverse = uint32_t(ceil_div(Tile::kOne, across));
    return made;
  }
  static int64_t passes_of(const Tile& x) { return std::max<int64_t>(x.passes, kLeastPasses); }
  int64_t pass_bytes() const { return kTileThreads * vector_ * int64_t(sizeof(A)); }
  // The number of passes for which the shared memory has room for z, beside a ring of `slots` slots.
  int64_t room(int slots) const {
    return (device_.tile_bytes - TileMemory<A>(slots, states_).z) / pass_bytes();
  }

  // Whether a block's threads reach across all columns, and there is at most one group to solve for each of
  // them.
  bool spans(int64_t columns, int64_t run, int64_t matrices) const {
    return ceil_div(columns, vector_) * matrices <= kTileThreads && columns / run * matrices <= kTileThreads;
  }
  // Whether a block can take a tile of these sizes: z must fit, and the number of bytes from a thread's row
  // to its next one must fit 32 bits.
  bool tile_fits(int64_t rows, int64_t pitch, int64_t columns, int64_t run, int64_t matrices) const {
    if (!spans(columns, run, matrices)) return false;
    const int64_t down = kTileThreads / (ceil_div(columns, vector_) * matrices);
    return rows <= down || (ceil_div(rows, down) <= room(kLeastSlots) && down * pitch * size_ <= UINT32_MAX);
  }
  bool run_fits(int64_t n) const { return ceil_div(n, kTileThreads * vector_) <= room(kLeastSlots); }

  // Divides the shared memory of step_tiles. Every tile leaves room for the shortest ring. A longer ring, and
  // more room for z so that parts need not wait for each other at once, make the step faster and change no
  // bits.
  void share_memory() {
    int64_t passes = 0, wish = 0;
    for (const Tile& x : work_.tiles) {
      passes = std::max(passes, passes_of(x));
      wish = std::max(wish, x.parts > 1 ? passes_of(x) * kWaitRoom / (kWaitRoom - 1) : passes_of(x));
    }
    work_.slots = wish <= room(kMostSlots) ? kMostSlots : kLeastSlots;
    work_.z_passes = int32_t(work_.tiles_in_parts > 0 ? room(work_.slots) : passes);
    work_.shared_tiles = TileMemory<A>(work_.slots, states_).z + work_.z_passes * pass_bytes();
  }

  // Adds elements without groups as tiles.
  void add_elements(int64_t n) {
    const int64_t row = kTileThreads * vector_;
    int64_t each = row;
    while (2 * each <= kSlab && run_fits(2 * each)) each *= 2;
    for (int64_t i = 0; i < n; i += each)
      work_.tiles.push_back(tile_of_run(Tile::Kind::elements, i, std::min(each, n - i)));
  }

  // Contiguous groups of a tensor.
  struct Rows {
    int32_t tensor;
    int64_t groups, size;
  };

  // The number of neighbouring elements that a thread has: those in 16 bytes if no group ends within them, or
  // else one.
  int64_t width_of(int64_t size) const { return size % vector_ == 0 ? vector_ : 1; }

  // The number of threads that share a group.
  int64_t lanes_of(int64_t size) const {
    const int64_t width = width_of(size);
    const int64_t wish = ceil_power_of_two(ceil_div(size, width > 1 ? kPacks * width : kSingles));
    const int64_t least = ceil_power_of_two(ceil_div(size, elements_of_thread_));
    return std::max(std::min<int64_t>(wish, width > 1 ? kThreads : kWarp), least);
  }

  void push_strip(Strip::Kind kind, int64_t begin, int64_t size, int64_t groups, int64_t lanes,
                  int64_t width) {
    work_.strips.push_back({begin, tensor_, kind, int32_t(size), int32_t(groups), int32_t(lanes),
                            int32_t(width), work_.strip_groups});
    if (kind == Strip::Kind::groups) work_.strip_groups += groups;
  }

  // Adds strips for n elements that need no common sums. Elements beyond the last whole access are accessed
  // one by one.
  void add_strips(Strip::Kind kind, int64_t n) {
    const int64_t lanes = work_.strip_threads, most = lanes * kPacks * vector_;
    const bool one_by_one = kind == Strip::Kind::ones || (n % vector_ != 0 && n < most);
    const int64_t whole = one_by_one ? 0 : n / vector_ * vector_;
    for (int64_t i = 0; i < whole; i += most)
      push_strip(kind, i, std::min(most, whole - i), 1, lanes, vector_);
    for (int64_t i = whole; i < n; i += lanes * elements_of_thread_)
      push_strip(kind, i, std::min(lanes * elements_of_thread_, n - i), 1, lanes, 1);
  }

  void add_rows(const Rows& rows) {
    tensor_ = rows.tensor;
    if (rows.size == 1) {
      work_.ones = true;
      return add_strips(Strip::Kind::ones, rows.groups);
    }
    const int64_t lanes = lanes_of(rows.size), together = work_.strip_threads / lanes;
    for (int64_t g = 0; g < rows.groups; g += together)
      push_strip(Strip::Kind::groups, g * rows.size, rows.size, std::min(together, rows.groups - g), lanes,
                 width_of(rows.size));
  }

  // Adds contiguous groups that are too long for the registers of a block.
  void add_long_rows(int64_t groups, int64_t n) {
    const int64_t columns = kTileThreads * vector_, rows = ceil_div(n, columns);
    if (run_fits(n)) {
      for (int64_t i = 0; i < groups; ++i) work_.tiles.push_back(tile_of_run(Tile::Kind::groups, i * n, n));
    } else if (const int64_t each = rows_of_part(rows, 1, groups, columns) * columns; each > 0) {
      add_parts(groups, ceil_div(n, each), 1, [&](int64_t group, int64_t part) {
        return tile_of_run(Tile::Kind::groups, group * n + part * each, std::min(each, n - part * each));
      });
    } else {
      for (int64_t i = 0; i < groups; ++i) chunks_.add_run(tensor_, i * n, n);
    }
  }

  // Adds groups that lie across the R1 rows of a matrix, which has K2*R2 columns at each k1.
  void add_matrices(const Layout& L) {
    if (const int64_t columns = tile_columns(L); columns > 0)
      add_tiles(L, columns);
    else if (!add_shared_panels(L))
      chunks_.add_panels(tensor_, L);
  }

  // The number of rows of each part of a shared panel (the last one may have fewer): a multiple of `down`,
  // the number of rows that threads work on at once. 0 if not enough blocks run at once to hold all parts.
  int64_t rows_of_part(int64_t rows, int64_t down, int64_t panels, int64_t columns) const {
    // Some room stays free, see kWaitRoom.
    const int64_t passes = std::max<int64_t>(room(kLeastSlots) * (kWaitRoom - 1) / kWaitRoom, 1);
    int64_t parts = ceil_div(rows, passes * down), each = 0;
    do {
      each = round_up(ceil_div(rows, parts), down);
      parts *= 2;
    } while (each > down && too_few(panels * ceil_div(rows, each), each * columns));
    return device_.cooperative && ceil_div(rows, each) <= device_.multiprocessors ? each : 0;
  }

  // Adds shared panels, whose parts wait for each other. Tiles are numbered band by band. A band is some
  // panels side by side: first the first parts of all of them, then their second parts, and so on. No block
  // waits for ever: a band has no more tiles than blocks run at once, which is at least one on each
  // multiprocessor, and blocks take tiles in the order of their numbers. So no block has two tiles of a band,
  // and once all earlier bands are done, each tile of the band is the next one of some block.
  template <typename MakeTile>
  void add_parts(int64_t panels, int64_t parts, int64_t groups, MakeTile make) {
    const int64_t band = std::max<int64_t>(device_.multiprocessors / parts, 1);
    for (int64_t first = 0; first < panels; first += band)
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = first; i < std::min(first + band, panels); ++i) {
          Tile made = make(i, part);
          made.parts = uint16_t(parts);
          made.part = uint16_t(part);
          made.panel = int32_t(work_.panels + i);
          made.sums = work_.scratch_bytes + i * sums_bytes<A>(groups, parts);
          parts_.push_back(made);
        }
    work_.panels += int32_t(panels);
    work_.scratch_bytes += panels * sums_bytes<A>(groups, parts);
  }

  // Cuts matrices into shared panels, if these can be held. The narrower a panel, the taller and fewer are
  // its parts.
  bool add_shared_panels(const Layout& L) {
    const int64_t pitch = L.row_length();
    for (const int64_t step : {std::lcm(L.R2, vector_), L.R2})
      for (const int64_t bytes : {kTileRowBytes, kNarrowRowBytes}) {
        const int64_t columns = std::min(round_up(bytes / size_, step), pitch);
        if (!spans(columns, L.R2, 1)) continue;
        const int64_t across = ceil_div(pitch, columns), down = kTileThreads / ceil_div(columns, vector_);
        const int64_t rows = rows_of_part(L.R1, down, L.K1 * across, columns);
        if (rows == 0 || down * pitch * size_ > UINT32_MAX) continue;
        add_parts(L.K1 * across, ceil_div(L.R1, rows), columns / L.R2, [&](int64_t panel, int64_t part) {
          const int64_t c = panel % across * columns, r = part * rows;
          return tile(L.offset(panel / across, r, 0) + c, pitch, std::min(rows, L.R1 - r),
                      std::min(columns, pitch - c), L.R2, 1);
        });
        return true;
      }
    return false;
  }

  // Adds tiles of all rows and `columns` columns. If these are all columns, a tile may have several matrices.
  void add_tiles(const Layout& L, int64_t columns) {
    const int64_t pitch = L.row_length(), each = columns == pitch ? tile_matrices(L) : 1;
    for (int64_t k1 = 0; k1 < L.K1; k1 += each)
      for (int64_t c = 0; c < pitch; c += columns)
        work_.tiles.push_back(tile(L.offset(k1, 0, 0) + c, pitch, L.R1, std::min(columns, pitch - c), L.R2,
                                   std::min(each, L.K1 - k1)));
  }

  // Whether `tiles` tiles would keep fewer than half of the multiprocessors busy, so that smaller tiles are
  // better. Tiles of kSmallTile elements and fewer are not cut smaller.
  bool too_few(int64_t tiles, int64_t elements) const {
    return tiles < device_.multiprocessors / 2 && elements > kSmallTile;
  }

  // The number of columns of a tile that holds all rows: those of whole groups, and if possible whole
  // accesses of 16 bytes. 0 if no tile fits.
  int64_t tile_columns(const Layout& L) const {
    const int64_t pitch = L.row_length();
    for (const int64_t step : {std::lcm(L.R2, vector_), L.R2}) {
      // Narrow accesses are only worth it if rows do not begin at multiples of 16 bytes anyway, or if panels
      // cannot be shared.
      if (step % vector_ != 0 && pitch % vector_ == 0 && device_.cooperative) break;
      const auto of_bytes = [&](int64_t bytes) { return std::min(round_up(bytes / size_, step), pitch); };
      const auto fits = [&](int64_t columns) { return tile_fits(L.R1, pitch, columns, L.R2, 1); };
      int64_t bytes = kTileRowBytes;
      // If panels cannot be shared, groups that do not fit a tile cross the memory twice. Then narrower tiles
      // are better.
      const int64_t least = device_.cooperative ? kNarrowRowBytes : kLeastRowBytes;
      while (bytes > least && !fits(of_bytes(bytes))) bytes /= 2;
      if (!fits(of_bytes(bytes))) continue;
      while (of_bytes(bytes) < pitch && 2 * bytes * L.R1 <= kSlab * size_ && fits(of_bytes(2 * bytes)))
        bytes *= 2;
      while (bytes > kLeastRowBytes && of_bytes(bytes / 2) < of_bytes(bytes) &&
             too_few(L.K1 * ceil_div(pitch, of_bytes(bytes)), L.R1 * of_bytes(bytes)))
        bytes /= 2;
      return of_bytes(bytes);
    }
    return 0;
  }

  // The number of whole matrices that a tile holds.
  int64_t tile_matrices(const Layout& L) const {
    const int64_t elements = L.R1 * L.row_length();
    int64_t matrices = std::clamp<int64_t>(kSlab / elements, 1, L.K1);
    while (matrices > 1 && (!tile_fits(L.R1, L.row_length(), L.row_length(), L.R2, matrices) ||
                            too_few(ceil_div(L.K1, matrices), matrices * elements)))
      matrices = ceil_div(matrices, 2);
    return matrices;
  }

  const Device device_;
  const int64_t size_;
  const int states_;  // the number of states that the rule keeps
  const int64_t vector_, elements_of_thread_;
  std::vector<Rows> rows_, elements_;  // elements_ have no groups, so each element counts as one
  int32_t tensor_ = 0;
  std::vector<Tile> parts_;
  Work work_;
  ChunkCutter<A> chunks_{device_, size_, states_, work_};
};

template <typename A>
Work cut_all(const std::vector<TensorShape>& tensors, int64_t size, int states, const Device& device) {
  Cutter<A> cutter(device, size, states);
  for (size_t i = 0; i < tensors.size(); ++i) cutter.add(int32_t(i), tensors[i]);
  return cutter.finish();
}

}  // namespace

Work cut(const std::vector<TensorShape>& tensors, Rule rule, DType dtype, const Device& device) {
  const int states = states_of(rule).n;
  if (dtype == DType::f64) return cut_all<double>(tensors, sizeof(double), states, device);
  return cut_all<float>(tensors, dtype == DType::f32 ? 4 : 2, states, device);
}

}  // namespace cges::cuda
