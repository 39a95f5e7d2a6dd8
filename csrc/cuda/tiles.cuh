// The work of step_tiles (kernels.cuh). Its tiles are whole groups that lie across rows ("feature",
// "channel"), contiguous groups too long for registers, parts of groups that no single block can hold, and
// elements without groups. A block goes from tile to tile and never stops reading: copies run ahead of it
// through a ring, across the ends of tiles and tensors, and a finished tile is written back in the same loop
// that takes in the next one.
//
//   loop over rows:  w = s * soft(z, t) of the old tile's row;  z of the new tile's row
//   after it:        the new tile's sums, with those of other parts -> solve (in exact mode with sweeps of z)
//
// Each element crosses the memory once.
#pragma once
#include "cuda/ring.cuh"
#include "cuda/tile_sums.cuh"
#include "cuda/z_rows.cuh"

namespace cges::cuda {

// The value of s that marks a group that was zero before the step and is frozen. No other group has a
// negative s.
template <typename A>
constexpr A kDead = A(-1);

// A block's walk from tile to tile. `plain`: the steps of all tensors in the launch are, see Known.
template <typename T, typename Rule, bool plain, typename Table>
struct TileWalk {
  using A = Compute<T>;
  static constexpr int kStates = Rule::kStates, kVector = Pack<T>::kSize;
  using Group = ParamGroup<A, Rule>;
  using Update = typename Rule::template Update<A, plain ? Known::plain : Known::nothing>;
  using PlainUpdate = typename Rule::template Update<A, Known::plain>;
  using MyPart = Part<T, kStates>;
  // A thread that has eight columns (16-bit types) has too few registers for everything. Then exact mode
  // takes its first sums in a sweep over z and not in the loop that takes z in (kSweepsFirst), and only plain
  // launches go on with the next tile while a part waits for the others (kGoesOn).
  static constexpr bool kSweepsFirst = kVector > 4, kGoesOn = plain || kVector <= 4;

  const Table& table;
  Tile* const queue;          // the block's k-th tile lies at k % kQueue
  Shrinkage<A>* const found;  // the (s, t) of each group
  int* const alive;           // for each group whether it has a nonzero weight, if zeros are frozen by groups
  Ring<T, kStates> ring;
  const ZRows<A, kVector> z;

  __device__ TileWalk(const Table& table, unsigned char* memory, const TileMemory<A>& at)
      : table(table),
        queue(reinterpret_cast<Tile*>(memory)),
        found(reinterpret_cast<Shrinkage<A>*>(memory + at.found)),
        alive(reinterpret_cast<int*>(memory + at.alive)),
        ring(memory + at.ring, table.slots),
        z(memory + at.z, table.z_passes) {}

  // The phase and the param group of a tile's tensor, from the arguments.
  __device__ Phase phase(const Tile& tile) const { return plain ? Phase::running : table.phase(tile.tensor); }
  __device__ Group told(const Tile& tile) const {
    const Group& h = table.of(tile.tensor);
    return plain ? h : h.resolved(table.loss_scale.grad_scale);
  }
  __device__ MyPart part(const Tile& tile) const {
    return MyPart(tile, table.tensors[tile.tensor], table.phase(tile.tensor));
  }
  __device__ Tile& queued(int k) const { return queue[k % kQueue]; }

  // Begins to copy the block's k-th tile into the queue, or zeros (passes = 0) if there is none. Tiles are
  // dealt out in rounds, so that neighbouring tiles are worked on at the same time. Every other round is
  // dealt in reverse, so that a block that had one of the larger tiles of a round has one of the smaller ones
  // of the next. Rounds of tiles that wait for others are never reversed: see add_parts in cut.cpp.
  __device__ void fetch_tile(int k) {
    constexpr int kPieces = sizeof(Tile) / 16;
    if (threadIdx.x >= kPieces) return;
    const int64_t first = int64_t(k) * gridDim.x;
    const bool back = k % 2 != 0 && first >= table.tiles_in_parts;
    const int64_t i = first + (back ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    const bool none = i >= table.tile_count;
    __pipeline_memcpy_async(reinterpret_cast<uint4*>(&queued(k)) + threadIdx.x,
                            reinterpret_cast<const uint4*>(table.tiles + (none ? 0 : i)) + threadIdx.x, 16,
                            none ? 16 : 0);
  }

  // The data that a thread works on: the old tile, which is written back, the new one, which is taken in, and
  // the part whose rows are fetched ahead.
  struct Hand {
    MyPart out, in, ahead;
    // For the old tile: the row of z in turn; each column's (s, t); whether these still wait for the sums of
    // other parts; whether anything shrinks.
    int out_row = 0;
    Shrinkage<A> at[kVector] = {};
    bool waits = false, shrinks = true;
    // For the new tile: the row of z in turn; its update, its l1 threshold, whether zeros stay; its sums.
    // Bit v of `any` says whether column v has a weight that is not zero.
    int in_row = 0;
    Update update;
    A c;
    bool freezes_elements;
    GroupStats<A> stats[kVector];
    unsigned any;
  };

  // Stores w = s * soft(z, t) of a row, or z itself if nothing shrinks. `simple` promises that it does.
  template <bool simple, bool wide>
  __device__ __forceinline__ void apply(const Hand& hand) const {
    A x[kVector];
    z.load(hand.out_row, x);
    Pack<T> w;
    if (simple || hand.shrinks) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) x[v] = shrink(x[v], hand.at[v]);
      w = round_pack<true, T>(x);
    } else {
      w = round_pack<false, T>(x);
    }
    store_pack<true>(hand.out.w, w, wide || hand.out.unit() == 16, wide ? kVector : hand.out.length());
  }

  // Makes z of a row that the ring has brought, stores the new states and adds to the sums. `simple` promises
  // that the tensor's step is plain.
  template <bool simple, bool wide>
  __device__ __forceinline__ void take_in(Hand& hand) const {
    using Here = std::conditional_t<simple, PlainUpdate, Update>;
    const Here update(hand.update);
    const Phase phase = update.phase();
    const int n = wide ? kVector : hand.in.length();
    const Pack<T> w = ring.read(0);
    Pack<T> grad{}, states[kStates] = {};
    if (reads_grad(phase)) grad = ring.read(1);
    for (int s = 0; s < kStates && reads_state(phase); ++s) states[s] = ring.read(2 + s);
    A x[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      x[v] = v < n ? A(w.x[v]) : A(0);
      if (!simple && x[v] != A(0)) hand.any |= 1u << v;
    }
    update_pack<T>(update, !simple && hand.freezes_elements, false, x, grad, states);
    for (int s = 0; s < kStates && writes_state(phase); ++s)
      store_pack<true>(hand.in.states[s], states[s], wide || hand.in.unit() == 16, n);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (v >= n) x[v] = A(0);
      group_stats(x[v], hand.c, hand.stats[v]);
    }
    z.store(hand.in_row, x);
  }

  // Some passes: each writes back a row of the old tile and takes in one of the new tile, and the ring
  // fetches ahead. A row is written back before one is taken in, because the new row may take the old one's
  // place in z.
  template <bool simple, bool wide>
  __device__ __forceinline__ void pass_over(Hand& hand, int pass, int end) {
#pragma unroll 1
    for (; pass < end; ++pass) {
      ring.template fetch<plain || simple, wide>(hand.ahead);
      if (hand.out.rows > 0) apply<simple, wide>(hand);
      hand.out.go_on();
      hand.out_row += z.kRow;
      ring.wait();
      if (hand.in.rows > 0) take_in<simple, wide>(hand);
      hand.in.go_on();
      hand.in_row += z.kRow;
    }
  }

  static __device__ int passes_of(const Tile& tile) {
    return tile.passes > 0 ? max(int(tile.passes), kLeastPasses) : 0;
  }

  // All rows of the two tiles. The choice of a path is made here and not in loops over elements.
  __device__ __forceinline__ void pass_over(Hand& hand, const Tile& old, const Tile& now, const Tile& next) {
    const int passes = passes_of(now), goes_over = passes - ring.ahead();
    // While the old tile waits for its other parts, the new one is taken in as long as z has room for it.
    const int waits_until = kGoesOn && hand.waits ? min(passes, table.z_passes - passes_of(old)) : 0;
    for (int pass = 0;;) {
      if constexpr (kGoesOn) {
        if (hand.waits && pass == waits_until) {  // no more room, so the old tile must be solved now
          hand.out_row = z.back(hand.in_row, pass + passes_of(old));
          solve_tile<true>(hand, old, hand.out_row);
          hand.out = part(old);
        }
      }
      if (pass == passes) break;
      if (pass == goes_over) {  // from here on the ring fetches rows of the next tile
        hand.ahead = part(next);
      }
      // The passes up to `end` are alike: the ring stays with one tile, and no row of z goes round.
      int end = pass < goes_over ? goes_over : passes;
      if (pass < waits_until) end = min(end, waits_until);
      end = min(end, pass + min(z.left(hand.in_row), z.left(hand.out_row)));
      // These hold for all three parts in hand: the one that is written back, the one that is taken in, and
      // the one that is fetched.
      const bool simple = hand.shrinks && (plain || (table.plain(now.tensor) && hand.ahead.reads_states()));
      const bool wide = (hand.out.unit() | hand.in.unit() | hand.ahead.unit()) == 16;
      if (simple && wide)
        pass_over<true, true>(hand, pass, end);
      else if (simple)
        pass_over<true, false>(hand, pass, end);
      else if (wide)
        pass_over<false, true>(hand, pass, end);
      else
        pass_over<false, false>(hand, pass, end);
      z.wrap(hand.in_row);
      z.wrap(hand.out_row);
      pass = end;
    }
    // Writes back the rows that are left of an old tile that has more rows than the new one.
#pragma unroll 1
    for (; hand.out.rows > 0; hand.out.go_on(), z.turn(hand.out_row)) apply<false, false>(hand);
  }

  // Calls f(v, group) for each of this thread's columns. A column that does not exist counts as the last one.
  template <typename F>
  __device__ __forceinline__ void for_each_group(const Tile& tile, F f) const {
    const int side = threadIdx.x - tile.row_of(threadIdx.x) * tile.across;
    const int matrix = tile.across == tile.lanes ? 0 : side / tile.lanes;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int column = min((side - matrix * tile.lanes) * kVector + v, tile.columns - 1);
      f(v, matrix * tile.groups_each + (tile.run == 1 ? column : column / tile.run));
    }
  }

  // Finds (s, t) of this thread's columns, once all of the tile's z lies on the chip, from row `begin` on.
  // For a part of a panel it writes the part's sums and returns with hand.waits set; when it is called
  // again as `comes_back`, it reads those of all parts. In exact mode, and without kGoesOn, it does both at
  // once. The first call always has a barrier, which also makes the tiles that fetch_tile has copied
  // visible to all threads.
  template <bool comes_back>
  __device__ __forceinline__ void solve_tile(Hand& hand, const Tile& tile, int begin) const {
    const Group h = told(tile);
    const bool groups = tile.kind == Tile::Kind::groups;
    const bool freezes = !plain && groups && h.freeze == Freeze::group;
    const bool exact = !plain && !comes_back && h.exact;
    hand.waits = false;
    hand.shrinks = groups ? h.thresholds.any() : h.thresholds.c != A(0);
    for (Shrinkage<A>& at : hand.at) at = {A(1), h.thresholds.c};
    if (!comes_back && (!groups || !(h.thresholds.need_norms() || freezes) || !table.steps(tile.tensor)))
      return __syncthreads();
    if (!comes_back && freezes)
      for_each_group(tile, [&](int v, int group) {
        if (hand.any >> v & 1) atomicOr(&alive[group], 1);
      });
    int sharers = kWarp;  // threads that add up a group together; a power of two
    while (tile.groups * sharers > kTileThreads) sharers /= 2;
    const int mine = threadIdx.x / sharers;
    const bool solves = threadIdx.x % sharers == 0 && mine < tile.groups;
    const SharedPanel<A> panel(table, tile);
    ShrinkageSolver<A> solver;
    solver.start(h.thresholds);
    bool dead = false;
    for (int sweeps = 0;; ++sweeps) {
      Sums<A> sums{};
      if constexpr (!comes_back) {
        if (exact && (sweeps > 0 || kSweepsFirst)) sweep(hand, part(tile).rows, begin);
        A* const slot = reinterpret_cast<A*>(ring.free_slot());
        sums.stats = exact ? sum_tile<true>(hand.stats, tile, sharers, slot)
                           : sum_tile<false>(hand.stats, tile, sharers, slot);
        if (solves && freezes && sweeps == 0) {
          sums.alive = A(alive[mine]);
          alive[mine] = 0;  // for the next tile
        }
        if (tile.parts > 1) panel.tell(sweeps, solves, mine, sums);
        if (kGoesOn && tile.parts > 1 && !exact) {
          hand.waits = true;
          return;
        }
      }
      if (tile.parts > 1) sums = panel.hear(sweeps, sharers, mine);
      if (solves) {
        if (sweeps == 0) dead = freezes && sums.alive == A(0);
        if (!dead && !solver.done) solver.solve_shrinkage(sums.stats, h.thresholds, exact, kEpsilon<A>);
        found[mine] = dead ? Shrinkage<A>{kDead<A>, A(0)} : solver.at;
      }
      const bool searching = __syncthreads_or(solves && !dead && !solver.done);
      for_each_group(tile, [&](int v, int group) { hand.at[v] = found[group]; });
      if (!searching) break;
    }
    if (tile.parts > 1) panel.leave();
    if (freezes) clear_dead(hand, tile, begin);
  }

  // Takes the thread's sums again, from z at each column's t.
  __device__ __forceinline__ void sweep(Hand& hand, int rows, int row) const {
    for (GroupStats<A>& sums : hand.stats) sums = {};
#pragma unroll(kVector > 4 ? 1 : 2)
    for (; rows > 0; --rows, z.turn(row)) {
      A x[kVector];
      z.load(row, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) group_stats(x[v], hand.at[v].t, hand.stats[v]);
    }
  }

  // Sets z and the states of dead groups to zero: those that were zero before the step and are frozen.
  __device__ __forceinline__ void clear_dead(Hand& hand, const Tile& tile, int row) const {
    unsigned dead = 0;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (hand.at[v].s != kDead<A>) continue;
      dead |= 1u << v;
      hand.at[v] = {A(0), A(0)};
    }
    const bool writes_states = writes_state(phase(tile));
    for (MyPart mine = part(tile); dead != 0 && mine.rows > 0; mine.go_on(), z.turn(row)) {
      A x[kVector];
      z.load(row, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (!(dead >> v & 1)) continue;
        x[v] = A(0);
        for (T* const state : mine.states)
          if (writes_states && v < mine.length()) store<true>(state + v, T(0.0f));
      }
      z.store(row, x);
    }
  }

  // Walks over all tiles of the block. In turn k its k-th tile is taken in and the one before is written
  // back, so there is one more turn than there are tiles.
  __device__ void run() {
    alive[threadIdx.x] = 0;
    if (threadIdx.x == 0) queue[kQueue - 1] = {};  // before the first tile there is none
    for (int k = 0; k < 3; ++k) fetch_tile(k);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    const Tile& first = queue[0];
    Hand hand{.out = part(first),
              .in = part(first),
              .ahead = part(first),
              .update = Update(table.of(first.tensor).rule, table.own(first.tensor), phase(first))};
    for (int i = 0; i < ring.ahead(); ++i) ring.template fetch<plain, false>(hand.ahead);
    for (int k = 0;; ++k) {
      const Tile &old = queued(k + kQueue - 1), &now = queued(k), &next = queued(k + 1);
      if (old.passes + now.passes == 0) break;
      // This copy is committed with the first row that this tile's loop fetches, and copies end in order. So
      // it is there when the next tile's first row is read. The barrier after that tile makes it visible to
      // all threads, and it is needed by the tile after, as `next`.
      fetch_tile(k + 3);
      hand.out = part(old);
      if (kGoesOn && hand.waits) hand.out.rows = 0;
      hand.out_row = z.back(hand.in_row, passes_of(old));
      hand.in = part(now);
      const Group h = told(now);
      hand.update = Update(h.rule, table.own(now.tensor), phase(now));
      hand.c = h.thresholds.c;
      hand.freezes_elements = h.freeze == Freeze::element;
      for (GroupStats<A>& sums : hand.stats) sums = {};
      hand.any = 0;
      pass_over(hand, old, now, next);
      if (now.passes > 0) solve_tile<false>(hand, now, z.back(hand.in_row, passes_of(now)));
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);  // no copy outlives its block
  }
};

}  // namespace cges::cuda
