// Tiles: whole groups that lie across rows ("feature", "channel"), rows too long for registers, and
// elements without groups. A block goes from tile to tile and never stops reading: copies run ahead of it
// through a ring, over the ends of tiles and tensors, and a finished tile is written back in the same loop
// that takes in the next.
//
//   loop:  w = s * soft(z, t) of the old tile's row;  z of the new one's, in its place
//   then:  the new tile's sums -> solve, in exact mode again and again over z on the chip
//
// Each element crosses the memory once.
#pragma once
#include "cuda/groups.cuh"
#include "cuda/ring.cuh"

namespace cges::cuda {

// The s of a group that was dead before the step and stays so; no other has it.
template <typename A>
constexpr A kDead = A(-1);

// What each group of a tile adds up to, told to the first of the threads that share it: `parts` threads
// side by side. `stats`: this thread's, of its columns. `slot`: memory of the block where each thread may
// write what it could copy there itself. Always in the same order; a barrier must follow before the slot is
// used again.
template <bool counts, typename A, int kVector>
__device__ __forceinline__ GroupStats<A> sum_tile(const GroupStats<A> (&stats)[kVector], const Tile& tile,
                                                  int parts, A* slot) {
  constexpr int kEach = 16 / sizeof(A);  // numbers of a thread in one of the slot's arrays
  constexpr int kArrays = kVector / kEach, kTogether = kRingArrays / kArrays, kSums = counts ? 3 : 2;
  const auto entry = [&](int k, int thread, int v) -> A& {
    return slot[((k * kArrays + v / kEach) * kTileThreads + thread) * kEach + v % kEach];
  };
  const int group = threadIdx.x / parts, run = tile.run;
  const int matrix = tile.groups_each == tile.groups ? 0 : group / tile.groups_each;
  const int begin = matrix * tile.lanes * kVector + (group - matrix * tile.groups_each) * run;
  A total[kSums] = {};
#pragma unroll
  for (int first = 0; first < kSums; first += kTogether) {
    if (first > 0) __syncthreads();  // others still read what is there
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const A mine[3] = {stats[v].l1, stats[v].l2_squared, stats[v].count};
#pragma unroll
      for (int k = first; k < kSums && k < first + kTogether; ++k) entry(k - first, threadIdx.x, v) = mine[k];
    }
    __syncthreads();
    if (group >= tile.groups) continue;
    for (int i = threadIdx.x % parts; i < tile.down * run; i += parts) {
      const int row = run == 1 ? i : i / run, column = begin + (i - row * run);
      const int thread = row * tile.across + column / kVector;
#pragma unroll
      for (int k = first; k < kSums && k < first + kTogether; ++k)
        total[k] += entry(k - first, thread, column % kVector);
    }
  }
  for (int apart = parts / 2; apart > 0; apart /= 2)
    for (A& sum : total) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  return {counts ? total[kSums - 1] : A(0), total[0], total[1]};
}

// A block on its way from tile to tile. `plain`: all tensors of the launch are, see SgdRule.
template <typename T, bool plain, typename Table>
struct TileWalk {
  using A = Compute<T>;
  static constexpr int kStates = SgdRule<A, plain>::kStates, kVector = Pack<T>::kSize, kEach = Pack<A>::kSize;
  using MyPart = Part<T, kStates>;
  // Exact mode's first sums are counted in the loop that takes z in; with eight columns a thread, registers
  // are too few.
  static constexpr bool kSweepsFirst = kVector > 4;

  const Table& table;
  Tile* const queue;          // the k-th at k % kQueue
  Shrinkage<A>* const found;  // each group's
  int* const alive;  // whether any of its weights was not zero, where zeros are frozen group by group
  Ring<T, kStates> ring;
  A* const z;  // this thread's

  __device__ TileWalk(const Table& table, unsigned char* memory, const TileMemory<A>& at)
      : table(table),
        queue(reinterpret_cast<Tile*>(memory)),
        found(reinterpret_cast<Shrinkage<A>*>(memory + at.found)),
        alive(reinterpret_cast<int*>(memory + at.alive)),
        ring(memory + at.ring, table.slots),
        z(reinterpret_cast<A*>(memory + at.z) + threadIdx.x * kEach) {}

  // What the launch says of a tile's tensor.
  __device__ Phase phase(const Tile& tile) const { return plain ? Phase::running : table.phase(tile.tensor); }
  __device__ ParamGroup<A> told(const Tile& tile) const {
    const ParamGroup<A>& h = table.of(tile.tensor);
    return plain ? h : h.resolved(table.loss_scale.grad_scale);
  }
  __device__ MyPart part(const Tile& tile) const {
    return MyPart(tile, table.tensors[tile.tensor], tile.passes > 0 && table.steps(tile.tensor));
  }
  __device__ Tile& queued(int k) const { return queue[k % kQueue]; }

  // Puts the block's k-th tile in the queue, or none; there and back, so that who had one of the larger of
  // a round has one of the smaller of the next. What is side by side is worked on at the same time.
  __device__ void fetch_tile(int k) {
    constexpr int kPieces = sizeof(Tile) / 16;
    if (threadIdx.x >= kPieces) return;
    const int64_t i = int64_t(k) * gridDim.x + (k % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    const bool none = i >= table.tile_count;
    __pipeline_memcpy_async(reinterpret_cast<uint4*>(&queued(k)) + threadIdx.x,
                            reinterpret_cast<const uint4*>(table.tiles + (none ? 0 : i)) + threadIdx.x, 16,
                            none ? 16 : 0);
  }

  // This thread's z of its rows, in turn.
  __device__ A* z_of(int pass) const { return z + pass * (kVector * kTileThreads); }
  __device__ void load_z(int pass, A (&x)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; v += kEach) {
      const Pack<A> some = load_shared(z_of(pass) + v * kTileThreads);
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[v + i] = some.x[i];
    }
  }
  __device__ void store_z(int pass, const A (&x)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; v += kEach) {
      Pack<A> some;
#pragma unroll
      for (int i = 0; i < kEach; ++i) some.x[i] = x[v + i];
      store_shared(z_of(pass) + v * kTileThreads, some);
    }
  }

  // What a thread has in hand: the old tile on its way back, the new one on its way in, the row that is
  // fetched next.
  struct Hand {
    MyPart out, in, ahead;
    // Of the old one: each column's (s, t), and whether anything shrinks.
    Shrinkage<A> at[kVector] = {};
    bool shrinks = true;
    // Of the new one: its rule, its l1 threshold, whether zeros stay; its sums, and bit v of `any` where
    // column v has a weight that is not zero.
    SgdRule<A, plain> rule;
    A c;
    bool freezes_elements;
    Phase phase_ahead;
    GroupStats<A> stats[kVector];
    unsigned any;
  };

  // w = s * soft(z, t) of a row; z itself where nothing shrinks. `simple`: it does.
  template <bool simple, bool wide>
  __device__ __forceinline__ void apply(const Hand& hand, int pass) const {
    A x[kVector];
    load_z(pass, x);
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

  // z of a row, which the ring has brought; the new states, and sums. `simple`: the step of it is plain.
  template <bool simple, bool wide>
  __device__ __forceinline__ void take_in(Hand& hand, int pass) const {
    const SgdRule<A, plain || simple> rule(hand.rule);
    const int n = wide ? kVector : hand.in.length();
    const Pack<T> w = ring.read(0);
    Pack<T> grad{}, states[kStates] = {};
    if (rule.reads_grad()) grad = ring.read(1);
    for (int s = 0; s < kStates && rule.reads_states(); ++s) states[s] = ring.read(2 + s);
    A x[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      x[v] = v < n ? A(w.x[v]) : A(0);
      if (!simple && x[v] != A(0)) hand.any |= 1u << v;
    }
    update_pack<T>(rule, !simple && hand.freezes_elements, false, x, grad, states);
    for (int s = 0; s < kStates && rule.writes_states(); ++s)
      store_pack<true>(hand.in.states[s], states[s], wide || hand.in.unit() == 16, n);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (v >= n) x[v] = A(0);
      group_stats(x[v], hand.c, hand.stats[v]);
    }
    store_z(pass, x);
  }

  // The next row for the ring. `simple`: a step reads all there is.
  template <bool simple, bool wide>
  __device__ __forceinline__ void fetch(Hand& hand) {
    constexpr bool all = plain || simple;
    ring.template fetch<wide>(hand.ahead, all || hand.phase_ahead != Phase::prox_alone,
                              all || hand.phase_ahead == Phase::running);
  }

  // Rows of some passes: the old tile's way back and the new one's way in, while the ring goes on ahead.
  template <bool simple, bool wide>
  __device__ __forceinline__ void pass_over(Hand& hand, int pass, int end) {
#pragma unroll 1
    for (; pass < end; ++pass) {
      fetch<simple, wide>(hand);
      if (hand.out.rows > 0) apply<simple, wide>(hand, pass);
      hand.out.go_on();
      ring.wait();
      if (hand.in.rows > 0) take_in<simple, wide>(hand, pass);
      hand.in.go_on();
    }
  }

  // All of the two tiles' rows. The choice of a path is made here: no loop over elements asks.
  __device__ __forceinline__ void pass_over(Hand& hand, const Tile& now, const Tile& next) {
    const int passes = now.passes > 0 ? max(int(now.passes), kLeastPasses) : 0;
    int pass = 0;
    while (pass < passes) {
      int end = passes - ring.ahead();
      if (pass == end) {  // from here on the ring fetches the next tile's rows
        hand.ahead = part(next);
        hand.phase_ahead = phase(next);
        end = passes;
      }
      const bool simple =
          hand.shrinks && (plain || (table.plain(now.tensor) && hand.phase_ahead == Phase::running));
      const bool wide = (hand.out.unit() | hand.in.unit() | hand.ahead.unit()) == 16;
      if (simple && wide)
        pass_over<true, true>(hand, pass, end);
      else if (simple)
        pass_over<true, false>(hand, pass, end);
      else if (wide)
        pass_over<false, true>(hand, pass, end);
      else
        pass_over<false, false>(hand, pass, end);
      pass = end;
    }
#pragma unroll 1
    for (; hand.out.rows > 0; ++pass, hand.out.go_on()) apply<false, false>(hand, pass);
  }

  // (s, t) of this thread's columns, once all of the tile's z is on the chip. At least one barrier.
  __device__ __forceinline__ void solve_tile(Hand& hand, const Tile& tile) const {
    const ParamGroup<A> h = told(tile);
    const bool groups = tile.kind == Tile::Kind::groups,
               freezes = !plain && groups && h.freeze == Freeze::group;
    hand.shrinks = groups ? h.thresholds.any() : h.thresholds.c != A(0);

    if (!groups || !(h.thresholds.need_norms() || freezes)) {
      for (Shrinkage<A>& at : hand.at) at = {A(1), h.thresholds.c};
      return __syncthreads();
    }
    int group[kVector];  // of each column
    const int side = threadIdx.x - tile.row_of(threadIdx.x) * tile.across;
    const int matrix = tile.across == tile.lanes ? 0 : side / tile.lanes;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int column = min((side - matrix * tile.lanes) * kVector + v, tile.columns - 1);
      group[v] = matrix * tile.groups_each + (tile.run == 1 ? column : column / tile.run);
      if (freezes && hand.any >> v & 1) atomicOr(&alive[group[v]], 1);
    }
    int parts = kWarp;  // threads that add up a group
    while (tile.groups * parts > kTileThreads) parts /= 2;
    A* const slot = reinterpret_cast<A*>(ring.free_slot());
    const int mine = threadIdx.x / parts;
    const bool solves = threadIdx.x % parts == 0 && mine < tile.groups, exact = !plain && h.exact;
    ShrinkageSolver<A> solver;
    solver.start(h.thresholds);
    bool dead = false;
    for (Shrinkage<A>& at : hand.at) at = {A(1), h.thresholds.c};
    for (bool first = true;; first = false) {
      if (exact && (!first || kSweepsFirst)) sweep(hand, part(tile).rows);
      const GroupStats<A> sums = exact ? sum_tile<true>(hand.stats, tile, parts, slot)
                                       : sum_tile<false>(hand.stats, tile, parts, slot);
      if (solves) {
        if (first && freezes) {
          dead = alive[mine] == 0;
          alive[mine] = 0;  // for the next tile
        }
        if (!dead && !solver.done) solver.solve_shrinkage(sums, h.thresholds, exact, kEpsilon<A>);
        found[mine] = dead ? Shrinkage<A>{kDead<A>, A(0)} : solver.at;
      }
      const bool searching = __syncthreads_or(solves && !dead && !solver.done);
#pragma unroll
      for (int v = 0; v < kVector; ++v) hand.at[v] = found[group[v]];
      if (!searching) {
        if (freezes) clear_dead(hand, part(tile));
        return;
      }
    }
  }

  // The sums once more, of z and each column's t.
  __device__ __forceinline__ void sweep(Hand& hand, int rows) const {
    for (GroupStats<A>& sums : hand.stats) sums = {};
#pragma unroll 2
    for (int pass = 0; pass < rows; ++pass) {
      A x[kVector];
      load_z(pass, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) group_stats(x[v], hand.at[v].t, hand.stats[v]);
    }
  }

  // Zeros for z and the states of groups that were dead before the step.
  __device__ __forceinline__ void clear_dead(Hand& hand, MyPart mine) const {
    unsigned dead = 0;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (hand.at[v].s != kDead<A>) continue;
      dead |= 1u << v;
      hand.at[v] = {A(0), A(0)};
    }
    for (int pass = 0; dead != 0 && mine.rows > 0; ++pass, mine.go_on()) {
      A x[kVector];
      load_z(pass, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (!(dead >> v & 1)) continue;
        x[v] = A(0);
        for (T* const state : mine.states)
          if (hand.rule.writes_states() && v < mine.length()) store<true>(state + v, T(0.0f));
      }
      store_z(pass, x);
    }
  }

  __device__ void run() {
    alive[threadIdx.x] = 0;
    if (threadIdx.x == 0) queue[kQueue - 1] = {};  // before the first there is none
    for (int k = 0; k < 3; ++k) fetch_tile(k);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    const Tile& first = queue[0];
    Hand hand{.out = part(first),
              .in = part(first),
              .ahead = part(first),
              .rule = SgdRule<A, plain>(table.of(first.tensor), phase(first)),
              .phase_ahead = phase(first)};
    for (int i = 0; i < ring.ahead(); ++i) fetch<false, false>(hand);
    for (int k = 0;; ++k) {
      const Tile &old = queued(k + kQueue - 1), &now = queued(k), &next = queued(k + 1);
      if (old.passes + now.passes == 0) break;
      fetch_tile(k + 3);  // with the first row of this tile's; it is there when the next tile's rows are
      hand.out = part(old);
      hand.in = part(now);
      const ParamGroup<A> h = told(now);
      hand.rule = SgdRule<A, plain>(h, phase(now));
      hand.c = h.thresholds.c;
      hand.freezes_elements = h.freeze == Freeze::element;
      for (GroupStats<A>& sums : hand.stats) sums = {};
      hand.any = 0;
      pass_over(hand, now, next);
      if (now.passes > 0) solve_tile(hand, now);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);  // no copy outlives its block
  }
};

}  // namespace cges::cuda
