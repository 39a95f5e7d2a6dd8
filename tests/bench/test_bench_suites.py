"""The CPU suite in miniature: rows, files, plots and the README's part; and the counting of instructions."""

import json

import pytest
import torch

from bench import baselines, core, lab, pages, plots, run, suites, table, timing, workloads
from bench.rows import Bench
from bench.workloads import Case
from cges_kernels import available_backends

pytestmark = pytest.mark.xdist_group("bench_suites")


class Tiny(lab.Cpu):
    copy_bytes, seconds = 2**12, 0.0

    def __init__(self):
        self.cache_bytes = 2**11

    def free(self):
        pass


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a few rows of each suite, beside its files and plots."""
    if "cpu" not in available_backends():
        pytest.skip("the CPU executor is not built")
    with pytest.MonkeyPatch.context() as patch:
        others = suites.baselines.others()

        def no_compiler(*arguments, **options):
            raise ValueError("no compiler")

        patch.setattr(suites.baselines, "others", lambda: {**others, "compiled": no_compiler})
        patch.setattr(suites, "DTYPES", {name: suites.DTYPES[name] for name in ("fp32", "bf16")})
        patch.setattr(suites, "SPECS", ("feature", "filter"))
        patch.setattr(core, "SECONDS", 1e-9)
        small = workloads.small
        patch.setattr(workloads, "resnet50", lambda: [(6, 3, 2, 2), (6,)])
        cases = [Case("small feature", "feature", [(6, 5), (6,)]), Case("m feature", "feature", [(3, 4)])]
        tiny = Tiny()
        with pytest.MonkeyPatch.context() as less:
            less.setattr(workloads, "matrix", lambda rows, columns: [(10, 6)])
            less.setattr(workloads, "small", lambda count, elements: small(4, 16))
            targets = core.rows(tiny)
        rows = [
            *targets,
            *suites.models(Bench(tiny), cases, runs=1),
            *suites.grid(Bench(tiny), (4, 18), runs=1),
            *suites.scaling(Bench(tiny), 1, 2**10, (8, 6), runs=1),
        ]
        out = tmp_path_factory.mktemp("bench")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two that wait for each other on a busy machine take milliseconds a step
        try:
            options = table.arguments("bench", None, 2, 60).parse_args(["--out", str(out)])
            environment = tiny.environment()
            assert table.run(rows, "cpu-any", environment, options)
        finally:
            torch.set_num_threads(threads)
    return out


def test_files(report):
    results = {r["row"]: r for r in json.loads((report / "cpu-any.json").read_text())["results"]}
    assert not any("error" in r for r in results.values())
    assert all(r["runs"] == (2 if r["suite"] == "core" else 1) for r in results.values())
    model = results["small feature, all contenders"]
    assert model["compiled_error"] == "ValueError: no compiler" and model["bytes"] == 36 * 20
    assert set(model["contenders"]) >= {"copy", "fused_sgd", "foreach", "for_loop", "eager", "vectorised"}
    of = {name: c.get("ops") for name, c in model["contenders"].items()}
    assert 0 < of["prox_sgd"] < of["vectorised"] < of["eager"] and of["copy"] is None
    assert "counts" not in model and (model["suite"], model["cache"]) == ("models", "cold")
    exact = results["filter 18x18 bf16 exact"]
    assert exact["bytes"] == 18 * 18 * 10 and exact["mode"] == "exact"
    assert table.percent_of_copy(exact) > 0 and 0 < exact["percent_nonzero_prox_sgd"] < 100
    found = json.loads((report / "cpu-any.json").read_text())
    assert found["environment"]["torch"] == torch.__version__
    assert {"commit", "date", "cpu", "threads", "last_cache_bytes"} < set(found["environment"])
    assert results["500 tensors of 16, host"]["cache"] == "warm"
    ours = model["contenders"]["prox_sgd"]
    assert ours["ms_low"] <= ours["ms"] <= ours["ms_high"]


def test_contenders_are_counted_where_the_pages_tell_of_it(report):
    results = json.loads((report / "cpu-any.json").read_text())["results"]
    assert {r["suite"] for r in results} == {"core", "grid", "models", "scaling"}
    for r in results:
        for name, of in r["contenders"].items():
            expected = set() if name in ("copy", "one_thread") else {"host_us", "extra_bytes", "ops"}
            found = expected & set(of)
            assert found == (expected if r["suite"] in ("core", "models") else set()), (r["row"], name)
            assert {"ms", "ms_low", "ms_high", "ratio", "ratio_low", "ratio_high", "to_copy"} <= set(of)
            same = {"copy": "to_copy", "fused_sgd": "to_fused_sgd"}.get(name)
            assert same is None or of[same] == 1
            assert name != "one_thread"  # it has gone into the baseline


def test_ratios_are_to_those_of_the_same_turns_or_of_the_same_run():
    first = {"fused_sgd": [1.0, 2.0, 4.0], "copy": [2.0, 2.0, 2.0], "a": [2.0, 4.0, 8.0]}
    second = {"fused_sgd": [2.0, 2.0, 2.0], "b": [6.0, 6.0, 6.0]}
    found = timing.summarise([[first, second]], "a")
    assert found["a"]["to_fused_sgd"] == 2 and found["a"]["to_copy"] == 2 and found["a"]["ratio"] == 1
    assert found["b"]["to_fused_sgd"] == 3 and found["b"]["to_copy"] == 3
    assert found["b"]["ratio"] == pytest.approx(6 / 4)


def test_plots(report):
    drawn = {f"cpu-any-{suite}.svg" for suite in plots.PICTURES}
    assert drawn == {path.name for path in report.iterdir()} - {"cpu-any.json"}
    before = {path.name: path.read_bytes() for path in report.glob("*.svg")}
    plots.draw(json.loads((report / "cpu-any.json").read_text())["results"], "cpu-any", report)
    assert before == {path.name: path.read_bytes() for path in report.glob("*.svg")}
    assert plots.draw([], "cpu", report) == []


def test_the_page_shows_contenders_and_plots(report):
    cpus, _, _ = pages.reports()
    measured = json.loads((report / "cpu-any.json").read_text())["results"]
    measured = [r for r in measured if r["suite"] != "core"]
    core_rows = table.of_suite(cpus[0]["results"], "core", failed=True)
    whole = {**cpus[0], "name": "cpu-any", "results": core_rows + measured}
    text = "\n\n".join(pages.cpu_part([whole], core.rows(Tiny())))
    assert "| ms per step | small | m | operations, small | extra memory, small | host time, small |" in text
    assert "small feature: torch.compile failed (ValueError: no compiler)." in text
    assert "](../bench/results/cpu-any-grid.svg)" in text and "cpu-any-scaling.svg)" in text
    assert "| feature 4x4 fp32" not in text  # the table with targets holds no other rows
    none = {**cpus[0], "results": core_rows}
    assert pages.models(none, table.of_suite(core_rows, "models")) == "" and pages.pictures(none) == []


def result_of(row, ratio, target):
    numbers = {"ms": 2.0, "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio}
    of = {"suite": "core", "row": row, "baseline": "fused_sgd", "contender": "prox_sgd", "runs": 5}
    return {**of, "target": target, "met": ratio <= target, "contenders": {"prox_sgd": numbers}}


def test_machines_stand_side_by_side_beside_targets_of_today():
    env = {"threads": 2, "l2_bytes": 2**20, "torch": "2", "capability": "AVX2", "commit": "c", "runs": 5}
    older, newer = (
        {
            "environment": {**env, "cpu": cpu, "date": date},
            "results": results,
        }
        for cpu, date, results in [
            ("AMD EPYC", "2026-01-01", [result_of("gone", 1, 1), result_of("both", 1.3, 1.4)]),
            (
                "Intel(R) Xeon(R) Processor",
                "2026-01-02",
                [result_of("both", 1.1, 1.2), result_of("new", 1, 1)],
            ),
        ]
    )
    rows = [table.Row(name, "fused_sgd", "prox_sgd", t, list) for name, t in [("both", 1.2), ("new", 1.0)]]
    text = "\n".join(pages.cpu_part([{"name": "a", **older}, {"name": "b", **newer}], rows))
    sgd = "torch's fused SGD"
    both = f"| both | {sgd} | 1.20 | 2.000 | 1.30 [1.30, 1.30] (missed) | 2.000 | 1.10 [1.10, 1.10] |"
    new = f"| new | {sgd} | 1.00 |  |  | 2.000 | 1.00 [1.00, 1.00] |"
    assert both in text and new in text and "gone" not in text
    assert (
        "AMD EPYC, ms" in text
        and "| Intel Xeon, ms" in text
        and "1 row at commit c (2026-01-01, 5 runs)" in text
    )


def test_kinds_of_machines():
    names = {
        **{"AMD EPYC 9B14": "epyc", "Intel(R) Xeon(R) Processor": "xeon", "AMD Ryzen 9 5950X": "ryzen"},
        **{"12th Gen Intel(R) Core(TM) i7-8650U": "core", "Apple M2": "unknown", "x86_64": "unknown"},
    }
    assert {model: lab.cpu_kind(model) for model in names} == names
    assert lab.Cpu().name() == f"cpu-{lab.cpu_kind(lab.cpu_model())}"


def test_every_row_has_a_name_of_its_own_and_is_measured():
    rows = run.all_rows(Tiny(), 4)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    said = [row.note for row in rows if "mode" in row.note]
    for key, values in {
        "group_by": suites.SPECS,
        "dtype": suites.DTYPES,
        "mode": ("sequential", "exact"),
    }.items():
        assert {note[key] for note in said} == set(values)
    assert {row.note["along"] for row in rows if "along" in row.note} == {*plots.ALONG, "huge"}
    assert [row.note["x"] for row in rows if row.note.get("along") == "threads"] == [1, 2, 4]
    assert not any("transformer of 1.02e9" in name for name in names)
    assert {row.name for row in rows if row.target} >= {"feature 4096x4128", "ResNet-50 feature"}


def test_rows_take_part_in_as_many_runs_as_they_say():
    times = lambda: [{"fused_sgd": [1.0], "prox_sgd": [2.0]}]  # noqa: E731
    rows = [table.Row(f"{n}", "fused_sgd", "prox_sgd", None, times, runs=n) for n in (1, 2, None)]
    assert [r["runs"] for r in table.measure(rows, 3)] == [1, 2, 3]


def test_spread_and_speed_of_contenders():
    runs = [[{"copy": [s], "a": [2 * s]}] for s in (1e-3, 2e-3, 4e-3)]
    row = table.Row("r", "copy", "a", None, list, {"counts": {"a": {"ops": 3}}})
    found = table.result(row, runs)
    ours = found["contenders"]["a"]
    assert (ours["ms_low"], ours["ms"], ours["ms_high"]) == (2.0, 4.0, 8.0)
    assert table.percent_of_copy(found) == 50
    assert ours["ops"] == 3 and "ops" not in found["contenders"]["copy"]


def test_the_cpu_knows_its_cache_and_whether_tensors_stay_in_it(monkeypatch):
    cpu = lab.Cpu()
    assert cpu.cache_bytes == lab.last_cache_bytes() >= 2**18
    for cache_bytes, said in ((2**26, "cold"), (2**28, "warm")):
        cpu.cache_bytes = cache_bytes
        assert Bench(cpu).sgd("a", [(2, 2)]).note["cache"] == said
    assert Bench(cpu).sgd("a", workloads.matrix(2**13, 2**12)).note["cache"] == "cold"
    assert cpu.sets([(2, 2)], torch.float32) == 1  # the copy in every turn clears the caches


def test_thread_counts_are_put_back():
    seen = []

    def make(shapes, dtype, device):
        return baselines.Contender(lambda: seen.append(torch.get_num_threads()), [])

    before = torch.get_num_threads()
    for threads in (1, 3):
        makers = {"fused_sgd": make, "prox_sgd": make}
        Bench(Tiny()).row("a", [(2,)], makers, suite="scaling", threads=threads).measure()
        assert set(seen) == {threads} and torch.get_num_threads() == before
        seen.clear()


def test_the_baseline_takes_the_better_number_of_threads_turn_by_turn():
    times = {"one_thread": [1.0, 4.0], "fused_sgd": [2.0, 3.0], "prox_sgd": [1.0, 1.0]}
    assert core.faster_baseline(times) == {"fused_sgd": [1.0, 3.0], "prox_sgd": [1.0, 1.0]}
