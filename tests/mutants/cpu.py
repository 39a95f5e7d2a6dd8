"""Breaks of the CPU executor, csrc/cpu: bounds, the order of sums, tails, and what threads share."""

from .mutant import Mutant

CUT = "csrc/cpu/cut.cpp"
TILE = "csrc/cpu/tile.h"
ROWS = "csrc/cpu/rows.inc"
SHORT = "csrc/cpu/short_groups.h"
SIDE_BY_SIDE = "csrc/cpu/short_groups.inc"
EXECUTOR = "csrc/cpu/executor.cpp"
VECTORS = "csrc/cpu/rows.cpp"
CONVERT = "csrc/cpu/convert.inc"

MUTANTS = (
    Mutant(
        "a first step reads states that hold nothing yet",
        ROWS,
        old="x[s] = reads_state(phase) ? A(states[s][i]) : A(0);",
        new="x[s] = A(states[s][i]);",
        seen_by=("test_cpu_third_rule",),
    ),
    Mutant(
        "the last columns of a row are in no tile",
        CUT,
        old="for (int64_t c = 0; c < L.row_length(); c += columns)",
        new="for (int64_t c = 0; c + columns <= L.row_length(); c += columns)",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "a piece of a run goes on into the next run",
        CUT,
        old="r, std::min(r + rows, L.R1), c, std::min(c + columns, right)};",
        new="r, std::min(r + rows, L.R1), c, c + columns};",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "parts of large groups follow the threads",
        CUT,
        old="rows = even_part(L.R1, rows);",
        new="rows = even_part(L.R1, parts_of(rows, at::get_num_threads()));",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "blocks of rows follow how threads share the columns",
        TILE,
        old="const bool shared = kind == TileKind::piece && summed_by_columns(layout);",
        new="const bool shared = kind == TileKind::whole && summed_by_columns(layout);",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "dead groups are looked for after the update",
        TILE,
        old="""\
        if (first) find_alive(r0, r1);
        update_rows(r0, r1, /*keep_states=*/z_stays_);
""",
        new="""\
        update_rows(r0, r1, /*keep_states=*/z_stays_);
        if (first) find_alive(r0, r1);
""",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "sums go on from sweep to sweep",
        TILE,
        old="if (sum != nullptr) std::fill_n(sum, groups_ * fold_, 0.0);",
        new="if (sum != nullptr && first) std::fill_n(sum, groups_ * fold_, 0.0);",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "buffers move on each time that z is made",
        TILE,
        old="update_rows(r0, r1, /*keep_states=*/z_stays_);",
        new="update_rows(r0, r1, /*keep_states=*/true);",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "dead groups keep their momentum",
        TILE,
        old="if (state(s, r) != nullptr) zero_dead_groups(state(s, r));",
        new=";",
        seen_by=("test_cpu_cuts", "test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "the last group decides whether all searches are done",
        TILE,
        old="all_done &= solvers[g].done;",
        new="all_done = solvers[g].done;",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "the last of the rows beyond whole eights is not summed",
        ROWS,
        old="for (; r < rows; ++r, z_row += stride)",
        new="for (; r + 1 < rows; ++r, z_row += stride)",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "the last element of a run is not summed",
        ROWS,
        old="for (int j = 0; j < columns; ++j) last[j] = j < before ? A(0) : end[j];",
        new="for (int j = 0; j + 1 < columns; ++j) last[j] = j < before ? A(0) : end[j];",
        seen_by=("test_executors",),
    ),
    Mutant(
        "the last row of a run is summed twice",
        ROWS,
        old="last[j] = j < before ? A(0) : end[j];",
        new="last[j] = end[j];",
        seen_by=("test_executors",),
    ),
    Mutant(
        "half of a run's columns are not added up",
        ROWS,
        old="for (int half = n / 2; half > 0; half /= 2)",
        new="for (int half = n / 4; half > 0; half /= 2)",
        seen_by=("test_executors",),
    ),
    Mutant(
        "the last row alone says which columns are alive",
        ROWS,
        old="alive[j] = w[j] != T(0) ? Compute<T>(1) : alive[j];",
        new="alive[j] = w[j] != T(0) ? Compute<T>(1) : Compute<T>(0);",
        seen_by=("test_state*", "test_frozen_zeros", "test_cpu_cuts"),
    ),
    Mutant(
        "the last block of small matrices takes too many",
        SHORT,
        old="run_matrices(k1, std::min(matrices, tile.k1_end - k1));",
        new="run_matrices(k1, matrices);",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "an element takes the (s, t) of the run before",
        SIDE_BY_SIDE,
        old="const Index inverse = Index((1 << 16) / run + 1);",
        new="const Index inverse = Index((1 << 16) / run);",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "a short group is never listed as held",
        SHORT,
        old="(*tensor_.held)[c / L_.R2 + g] = alive_[g * L_.R2] == 0;",
        new="(*tensor_.held)[c / L_.R2 + g] = 0;",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "a short group is listed as held where another is",
        SHORT,
        old="(*tensor_.held)[c / L_.R2 + g] =",
        new="(*tensor_.held)[g] =",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "a short run is alive by its first element",
        SHORT,
        old="std::fill_n(group, L_.R2, *std::max_element(group, group + L_.R2));",
        new="std::fill_n(group, L_.R2, *group);",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "one pass of sorting too few",
        SIDE_BY_SIDE,
        old="for (int64_t pass = 0; pass < elements; ++pass)",
        new="for (int64_t pass = 0; pass + 1 < elements; ++pass)",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "the largest root drops NaN",
        SIDE_BY_SIDE,
        old="most[j] = rise <= most[j] ? most[j] : rise;  // so that NaN stays",
        new="most[j] = rise > most[j] ? rise : most[j];",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "a search that is done goes on beside others",
        SIDE_BY_SIDE,
        old="t[j] = open[j] != 0 ? group.at.t : t[j];",
        new="t[j] = group.at.t;",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "a tail of three elements counts one twice",
        SIDE_BY_SIDE,
        old="if (elements & 2) add.template operator()<2>(k), k += 2;",
        new="if (elements & 2) add.template operator()<2>(k), k += 1;",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "AVX2 cuts float16 off instead of rounding",
        VECTORS,
        old="_mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT)",
        new="_mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_ZERO)",
        seen_by=("test_cpu_vectors",),
    ),
    Mutant(
        "the last float16 numbers of a block are not narrowed",
        CONVERT,
        old="for (; i < n; ++i) to[i] = c10::Half(from[i]);",
        new="for (; i + 1 < n; ++i) to[i] = c10::Half(from[i]);",
        seen_by=("test_cpu_vectors",),
    ),
    Mutant(
        "a negative float16 that rounds to zero keeps its sign",
        CONVERT,
        old="w[i + k].x = narrowed[k].x == 0x8000 ? 0 : narrowed[k].x;",
        new="w[i + k].x = narrowed[k].x;",
        seen_by=("test_cpu_vectors",),
    ),
    Mutant(
        "a run of groups that are not held goes on into held ones",
        CUT,
        old="tiles.push_back({index, 0, 1, 0, 1, c, std::min(c + columns, right)});",
        new="tiles.push_back({index, 0, 1, 0, 1, c, std::min(c + columns, L.row_length())});",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "groups are held that died in this very step",
        TILE,
        old="(*tensor_.held)[group0_ + g] = !is_alive(g);",
        new="(*tensor_.held)[group0_ + g] = !is_alive(g) || solvers_[g].at.s == A(0);",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "held groups outlive steps with other states",
        "csrc/plan/held.h",
        old="return tensor.as_left && tensor.phase == last ? Use::go_on : Use::begin;",
        new="return tensor.as_left ? Use::go_on : Use::begin;",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "held groups outlive steps that hold none",
        "csrc/plan/held.h",
        old="const Phase last = std::exchange(phase_, Phase::skipped);",
        new="const Phase last = phase_;",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "held groups outlive what others write to states",
        "csrc/plan/gather.cpp",
        old="version_of(inputs.states[s]) == last.version;",
        new="true;",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "held groups outlive what others write to weights",
        "csrc/plan/gather.cpp",
        old="bool same = slot.version != kUnknown && version_of(slot.param) == slot.version;",
        new="bool same = true;",
        seen_by=("test_skip_dead",),
    ),
    Mutant(
        "a thread takes a tile beyond its share",
        EXECUTOR,
        old="while (share.taken.fetch_add(1, std::memory_order_relaxed) < end - begin) {",
        new="while (share.taken.fetch_add(1, std::memory_order_relaxed) <= end - begin) {",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "the first part alone says which large groups are alive",
        EXECUTOR,
        old="if (first) alive_[g0 + g] |= alive_[part * groups_ + g0 + g];",
        new="if (first && part == 0) alive_[g0 + g] |= alive_[part * groups_ + g0 + g];",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "large groups are swept once",
        EXECUTOR,
        old="std::erase_if(open, [](const PieceOfRun& of) { return of.run->done.load(); });",
        new="open.clear();",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "the first of the large groups that share a pass ends it for all",
        EXECUTOR,
        old="std::erase_if(open, [](const PieceOfRun& of) { return of.run->done.load(); });",
        new="std::erase_if(open, [&](const PieceOfRun&) { return runs[0]->done.load(); });",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "z of a piece is where its tile's rows would be",
        TILE,
        old="return z_ + (z_stays_ ? row : row % block_rows_) * tile_.columns();",
        new="return z_ + (z_stays_ ? row : row % kBlockRows) * tile_.columns();",
        seen_by=("test_cpu_cuts",),
    ),
)
