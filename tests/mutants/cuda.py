"""Breaks of the CUDA executor, csrc/cuda: bounds, barriers, the ring of copies, counters, the plain path."""

from .mutant import Mutant

ROWS = "csrc/cuda/rows.cuh"
MEMORY = "csrc/cuda/memory.cuh"
RING = "csrc/cuda/ring.cuh"
TILES = "csrc/cuda/tiles.cuh"
TILE_SUMS = "csrc/cuda/tile_sums.cuh"
GROUPS = "csrc/cuda/groups.cuh"
SLAB = "csrc/cuda/slab.cuh"
ITEMS = "csrc/cuda/items.cuh"
CUT = "csrc/cuda/cut.cpp"
EXECUTOR = "csrc/cuda/executor.h"
LAUNCH = "csrc/cuda/launch.cu"

MUTANTS = (
    # Rows
    Mutant(
        "warps read each other's sums before they are there",
        ROWS,
        old="""\
  if (lane == 0) exchange[warp] = sums;
  __syncthreads();
""",
        new="""\
  if (lane == 0) exchange[warp] = sums;
""",
        seen_by=("test_cuda_rows*",),
    ),
    Mutant(
        "what is alive and the first sweep share their words",
        ROWS,
        old="dead = add_up<false>(alive, strip.lanes, exchange + kWarps).alive == A(0);",
        new="dead = add_up<false>(alive, strip.lanes, exchange).alive == A(0);",
        seen_by=("test_cuda_sanitizers",),
        sanitizer=True,
    ),
    Mutant(
        "held rows are read all the same",
        ROWS,
        old="if (mine.size > 0 && load<false>(held) != 0) mine.size = 0;",
        new="if (mine.size > 0 && load<false>(held) == 2) mine.size = 0;",
        seen_by=("test_cuda_skip_dead",),
    ),
    Mutant(
        "a block whose first row is held steps none",
        ROWS,
        old="__syncthreads_and(idle) : __all_sync(kAllLanes, idle);",
        new="__syncthreads_or(idle) : __any_sync(kAllLanes, idle);",
        seen_by=("test_cuda_skip_dead", "test_skip_dead"),
    ),
    Mutant(
        "rows that live count as held",
        ROWS,
        old="store<false>(held, uint8_t(dead));",
        new="store<false>(held, uint8_t(1));",
        seen_by=("test_cuda_skip_dead", "test_skip_dead"),
    ),
    Mutant(
        "teams of a strip share one row's place on the list",
        ROWS,
        old="held = table.held + strip.first_group + threadIdx.x / strip.lanes;",
        new="held = table.held + strip.first_group;",
        seen_by=("test_cuda_skip_dead",),
    ),
    Mutant(
        "strips share places on the list",
        CUT,
        old="if (kind == Strip::Kind::groups) work_.strip_groups += groups;",
        new="if (kind == Strip::Kind::groups) work_.strip_groups += 1;",
        seen_by=("test_cuda_skip_dead",),
    ),
    Mutant(
        "rows are skipped without skip_dead",
        LAUNCH,
        old="h.skip_dead && h.freeze == Freeze::group,",
        new="h.freeze == Freeze::group,",
        seen_by=("test_cuda_skip_dead",),
    ),
    Mutant(
        "lists outlive steps without frozen groups",
        LAUNCH,
        old="h.skip_dead && h.freeze == Freeze::group,",
        new="h.skip_dead,",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "elements without groups lose the sign of their zeros",
        ROWS,
        old="if (grouped ? h.thresholds.any() : h.thresholds.c != A(0))",
        new="if (h.thresholds.any())",
        seen_by=("test_cuda_rows*",),
    ),
    Mutant(
        "zeros of 16 bits keep their sign",
        MEMORY,
        old="if (zeros) pair = __hadd2(pair, round_pair(T(), 0.0f, 0.0f));",
        new="if (zeros) pair = round_pair(T(), x[v], x[v + 1]);",
        seen_by=("test_cuda_rows*",),
    ),
    Mutant(
        "narrow reads take an element too many",
        MEMORY,
        old="pack.x[v] = v < n ? load<once>(p + v) : T(0.0f);",
        new="pack.x[v] = v <= n ? load<once>(p + v) : T(0.0f);",
        seen_by=("test_cuda_tiles*",),
    ),
    Mutant(
        "a plain step forgets the loss scale",
        LAUNCH,
        old=" && !h.device.any() &&\n         loss_scale.grad_scale == nullptr;",
        new=" && !h.device.any();",
        seen_by=("test_cuda_rows*",),
    ),
    # Tiles
    Mutant(
        "the ring is read a stage early",
        RING,
        old="__pipeline_wait_prior(kMostSlots - 1);",
        new="__pipeline_wait_prior(kMostSlots);",
        seen_by=("test_cuda_tiles*",),
    ),
    Mutant(
        "a run's last row is as long as the others",
        RING,
        old="return (rows == 1 && form >> 16 & 1 ? form >> 8 : form) & 0xff;",
        new="return form & 0xff;",
        seen_by=("test_cuda_tiles*",),
    ),
    Mutant(
        "what lies behind the end of a run is summed",
        TILES,
        old="if (v >= n) x[v] = A(0);",
        new="if (v > kVector) x[v] = A(0);",
        seen_by=("test_cuda_tiles*",),
    ),
    Mutant(
        "what is alive stays so for the next tile",
        TILES,
        old="alive[mine] = 0;  // for the next tile",
        new="",
        seen_by=("test_cuda_tiles*",),
    ),
    Mutant(
        "sums of 16 bits are written while others are read",
        TILE_SUMS,
        old="if (first > 0) __syncthreads();  // others still read what is there",
        new="",
        seen_by=("test_cuda_tiles*",),
    ),
    # Panels that blocks share
    Mutant(
        "a part's sums count as told before they are",
        TILE_SUMS,
        old="""\
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
""",
        new="""\
    if (threadIdx.x != 0) return;
    __threadfence();
""",
        seen_by=("test_cuda_shared",),
    ),
    Mutant(
        "the last part is not waited for",
        TILE_SUMS,
        old="wait_for(arrived, tile.parts * (sweep + 1));",
        new="wait_for(arrived, tile.parts * (sweep + 1) - 1);",
        seen_by=("test_cuda_shared",),
    ),
    Mutant(
        "a sweep's sums take the place of the last one's",
        TILE_SUMS,
        old="(int64_t(sweep % 2) * tile.parts + part)",
        new="(int64_t(sweep * 0) * tile.parts + part)",
        seen_by=("test_cuda_shared",),
    ),
    Mutant(
        "who has left a panel is not set back",
        TILE_SUMS,
        old="atomicExch(left, 0);",
        new="",
        seen_by=("test_cuda_shared",),
    ),
    Mutant(
        "there is room for the sums of one sweep",
        EXECUTOR,
        old="return 2 * parts * groups * int64_t(sizeof(Sums<A>));",
        new="return parts * groups * int64_t(sizeof(Sums<A>));",
        seen_by=("test_cuda_shared",),
    ),
    Mutant(
        "a band has more tiles than blocks",
        CUT,
        old="const int64_t band = std::max<int64_t>(device_.multiprocessors / parts, 1);",
        new="const int64_t band = std::max<int64_t>(device_.multiprocessors, 1);",
        seen_by=("test_cuda_shared",),
    ),
    Mutant(
        "blocks that wait for each other do not start together",
        LAUNCH,
        old="kTileThreads, work.shared_tiles, work.tiles_in_parts > 0);",
        new="kTileThreads, work.shared_tiles, work.tiles_in_parts < 0);",
        seen_by=("test_cuda_shared",),
    ),
    # Chunks
    Mutant(
        "one thread's word is read before it is there",
        GROUPS,
        old="""\
  if (threadIdx.x == 0) *word = f();
  __syncthreads();
""",
        new="""\
  if (threadIdx.x == 0) *word = f();
""",
        seen_by=("test_cuda_paths", "test_cuda_steps"),
    ),
    Mutant(
        "a chunk's sums count as there before they are",
        GROUPS,
        old="""\
  __syncthreads();
  if (threadIdx.x == 0) *word = f();
""",
        new="""\
  if (threadIdx.x == 0) *word = f();
""",
        seen_by=("test_cuda_sanitizers",),
        sanitizer=True,
    ),
    Mutant(
        "threads that are left over work all the same",
        SLAB,
        old="if (row >= stride) column = columns;  // left over: idle",
        new="",
        seen_by=("test_cuda_paths", "test_cuda_steps"),
    ),
    Mutant(
        "buffers move on in the sweeps of chunks",
        SLAB,
        old="const bool writes_states = kept && writes_state(phase);",
        new="const bool writes_states = (kept || phase == Phase::running) && writes_state(phase);",
        seen_by=("test_cuda_paths", "test_cuda_steps"),
    ),
    Mutant(
        "the counters of chunks are left as they are",
        ITEMS,
        old="i < kCounters + kPanelCounters * table.panels;",
        new="i < kCounters;",
        seen_by=("test_cuda_paths", "test_cuda_steps"),
    ),
    Mutant(
        "the last param group says how many sweeps there are",
        LAUNCH,
        old="if (h.searches()) table.stages = ShrinkageSolver<A>::kMaxSweeps;",
        new="table.stages = h.searches() ? ShrinkageSolver<A>::kMaxSweeps : 1;",
        seen_by=("test_cuda_paths", "test_cuda_steps"),
    ),
)
