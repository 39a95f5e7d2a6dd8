"""The CPU suite in miniature: rows, files, plots, the README's part; and what counts its instructions."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers.programs import ROOT

from bench import baselines, core, guard, lab, plots, readme, run, suites, table, timing, workloads
from bench.workloads import Case
from cges_kernels import available_backends
from cges_kernels.backends.extension import BUILT

pytestmark = pytest.mark.xdist_group("bench_suites")


class Tiny(lab.Cpu):
    copy_bytes, seconds = 2**12, 0.0

    def __init__(self):
        self.l2_bytes = 2**11

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
        patch.setattr(run, "peak_extra_memory", lambda threads: {"2x3": 2**20})
        patch.setattr(core, "take_turns", partial(timing.take_turns, seconds=0.0))
        small = workloads.small
        patch.setattr(workloads, "resnet50", lambda: [(6, 3, 2, 2), (6,)])
        cases = [Case("small feature", "feature", [(6, 5), (6,)]), Case("m feature", "feature", [(3, 4)])]
        tiny = Tiny()
        with pytest.MonkeyPatch.context() as less:
            less.setattr(workloads, "matrix", lambda rows, columns: [(10, 6)])
            less.setattr(workloads, "small", lambda count, elements: small(4, 16))
            targets = core.rows()
        rows = [
            *targets,
            *suites.models(tiny, cases, runs=1),
            *suites.grid(tiny, (4, 18), runs=1),
            *suites.scaling(tiny, 1, 2**10, (8, 6), runs=1),
        ]
        out = tmp_path_factory.mktemp("bench")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two that wait for each other on a busy machine take milliseconds a step
        try:
            assert run.run(rows, run.arguments(["--out", str(out), "--runs", "2"]), "cpu-any")
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
    assert 0 < of["prox_sgd"] < of["vectorised"] < of["eager"] and of["copy"] == 1
    assert "counts" not in model
    exact = results["filter 18x18 bf16 exact"]
    assert exact["bytes"] == 18 * 18 * 10 and exact["contenders"]["prox_sgd"]["gb_per_s"] > 0
    assert exact["mode"] == "exact" and exact["percent_of_copy"] > 0
    environment, lines = table.read_csv(report / "cpu-any.csv")
    assert environment["torch"] == torch.__version__ and environment["runs"] == "2"
    assert {"commit", "date", "cpu", "threads", "last_cache_bytes", "peak_extra_memory"} < set(environment)
    ours = next(n for n in lines if n["row"] == model["row"] and n["contender"] == "prox_sgd")
    assert (ours["bytes"], ours["suite"], ours["cache"], ours["target"]) == ("720", "models", "cold", "")
    assert float(ours["ms_low"]) <= float(ours["ms"]) <= float(ours["ms_high"])


def test_every_row_has_every_number(report):
    _, lines = table.read_csv(report / "cpu-any.csv")
    assert {n["suite"] for n in lines} == {"core", "grid", "models", "scaling"}
    for n in lines:
        empty = {key for key in (*table.NUMBERS, *table.COUNTS, *table.FACTS) if n[key] == ""}
        assert empty == table.UNKNOWN.get(n["contender"], set()), n
        same = {"copy": "to_copy", "fused_sgd": "to_fused_sgd"}.get(n["contender"])
        assert same is None or float(n[same]) == 1
        assert float(n["host_us"]) > 0 and float(n["extra_bytes"]) >= 0
    nothing = [n for n in lines if n["contender"] in table.MOVE_NOTHING]
    assert nothing and all(float(n["gb_per_s"]) == float(n["percent_of_copy"]) == 0 for n in nothing)


def test_a_run_that_lacks_a_number_does_not_go_well(report, capsys):
    results = json.loads((report / "cpu-any.json").read_text())["results"]
    assert table.tell(results) and table.holes(results) == []
    for key in (*table.NUMBERS, *table.COUNTS):
        kept = results[0]["contenders"]["prox_sgd"].pop(key)
        lacking = [f"{results[0]['row']:34s} lacks {key} of prox_sgd"]
        assert table.holes(results) == lacking
        results[0]["contenders"]["prox_sgd"][key] = kept
    for key in table.FACTS:
        kept = results[1].pop(key)
        assert len(table.holes(results)) == 1 and f"lacks {key}" in table.holes(results)[0]
        results[1][key] = kept
    del results[1]["bytes"]
    assert not table.tell(results) and "lacks bytes" in capsys.readouterr().out


def test_files_without_an_environment_are_read_too(tmp_path):
    (tmp_path / "old.csv").write_bytes(b"row,contender,ms\r\na b,copy,1.5\r\n")
    assert table.read_csv(tmp_path / "old.csv") == ({}, [{"row": "a b", "contender": "copy", "ms": "1.5"}])


def test_ratios_are_to_those_of_the_same_turns_or_of_the_same_run():
    first = {"fused_sgd": [1.0, 2.0, 4.0], "copy": [2.0, 2.0, 2.0], "a": [2.0, 4.0, 8.0]}
    second = {"fused_sgd": [2.0, 2.0, 2.0], "b": [6.0, 6.0, 6.0]}
    found = timing.summarise([[first, second]], "a")
    assert found["a"]["to_fused_sgd"] == 2 and found["a"]["to_copy"] == 2 and found["a"]["ratio"] == 1
    assert found["b"]["to_fused_sgd"] == 3 and found["b"]["to_copy"] == 3
    assert found["b"]["ratio"] == pytest.approx(6 / 4)


def test_plots(report):
    drawn = {f"cpu-any-{suite}.{form}" for suite in plots.PICTURES for form in plots.FORMATS}
    assert drawn == {path.name for path in report.iterdir()} - {"cpu-any.json", "cpu-any.csv"}
    before = {path.name: path.read_bytes() for path in report.glob("*.svg")}
    plots.draw(json.loads((report / "cpu-any.json").read_text())["results"], "cpu-any", report)
    assert before == {path.name: path.read_bytes() for path in report.glob("*.svg")}
    assert plots.draw([], "cpu", report) == []


def test_the_readme_shows_contenders_and_plots(report):
    cpus, gpus, _ = readme.reports()
    measured = json.loads((report / "cpu-any.json").read_text())["results"]
    measured = [r for r in measured if r["suite"] != "core"]
    core = table.of_suite(cpus[0]["results"], "core")
    cpus = [{**cpus[0], "name": "cpu-any", "results": core + measured}]
    whole = (ROOT / "README.md").read_text()
    text = readme.with_tables(whole, cpus, gpus)
    assert "| ms per step | small | m | operations, small | extra memory, small | host time, small |" in text
    assert "host time what it costs on one thread" in text
    assert "small feature: torch.compile failed (ValueError: no compiler)." in text
    assert "](bench/results/cpu-any-grid.svg)" in text and "](bench/results/cpu-any-scaling.svg)" in text
    assert "| feature 4x4 fp32" not in text  # the table with targets holds no other rows
    assert readme.with_tables(text, cpus, gpus) == text
    assert readme.cpu_models({"results": core}) == readme.pictures(core, "cpu") == ""


def result_of(row, ratio, target):
    numbers = {"ms": 2.0, "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio}
    of = {"suite": "core", "row": row, "baseline": "fused_sgd", "contender": "prox_sgd", "target": target}
    return {**of, "met": ratio <= target, "contenders": {"prox_sgd": numbers}}


def test_machines_stand_side_by_side_beside_targets_of_today():
    env = {"threads": 2, "l2_bytes": 2**20, "torch": "2", "capability": "AVX2", "commit": "c", "runs": 5}
    older, newer = (
        {
            "environment": {**env, "cpu": cpu, "date": date},
            "peak_extra_memory": {"a": 2**20},
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
    text = readme.cpu_table([older, newer], rows)
    sgd = "torch's fused SGD"
    both = f"| both | {sgd} | 1.20 | 2.000 | 1.30 [1.30, 1.30] (missed) | 2.000 | 1.10 [1.10, 1.10] |"
    new = f"| new | {sgd} | 1.00 |  |  | 2.000 | 1.00 [1.00, 1.00] |"
    assert both in text and new in text and "gone" not in text
    assert "AMD EPYC, ms" in text and "| Intel Xeon, ms" in text and "at commit c" in text


def test_kinds_of_machines():
    names = {
        **{"AMD EPYC 9B14": "epyc", "Intel(R) Xeon(R) Processor": "xeon", "AMD Ryzen 9 5950X": "ryzen"},
        **{"12th Gen Intel(R) Core(TM) i7-8650U": "core", "Apple M2": "unknown", "x86_64": "unknown"},
    }
    assert {model: timing.cpu_kind(model) for model in names} == names
    assert lab.Cpu().name() == f"cpu-{timing.cpu_kind(timing.cpu_model())}"


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
    assert {row.note["along"] for row in rows if "along" in row.note} == {*plots.UNITS, "huge"}
    assert [row.note["x"] for row in rows if row.note.get("along") == "threads"] == [1, 2, 4]
    assert not any("transformer of 1.02e9" in name for name in names)
    assert {row.name for row in rows if row.target} >= {"feature 4096x4128", "ResNet-50 feature"}


def test_rows_take_part_in_as_many_runs_as_they_say():
    times = lambda: [{"fused_sgd": [1.0], "prox_sgd": [2.0]}]  # noqa: E731
    rows = [table.Row(f"{n}", "fused_sgd", "prox_sgd", None, times, runs=n) for n in (1, 2, None)]
    assert [r["runs"] for r in table.measure(rows, 3)] == [1, 2, 3]


def test_spread_and_speed_of_contenders():
    runs = [[{"copy": [s], "a": [2 * s]}] for s in (1e-3, 2e-3, 4e-3)]
    row = table.Row("r", "copy", "a", None, list, {"bytes": 10**6, "counts": {"a": {"ops": 3}}})
    found = table.result(row, runs)["contenders"]
    assert (found["a"]["ms_low"], found["a"]["ms"], found["a"]["ms_high"]) == (2.0, 4.0, 8.0)
    assert found["a"]["gb_per_s"] == pytest.approx(0.25) and found["a"]["percent_of_copy"] == 50
    assert found["a"]["ops"] == 3 and "ops" not in found["copy"]


def test_the_cpu_rotates_a_few_sets_and_knows_its_cache():
    made = []
    cpu = lab.Cpu()
    assert cpu.l2_bytes == timing.last_cache_bytes() >= 2**18

    def make(shapes, dtype, device):
        made.append(shapes)
        return baselines.Contender(lambda: None, [], lambda: None)

    cpu.contender(make, [(2, 2)])
    cpu.contender(make, workloads.matrix(2**14, cpu.l2_bytes >> 14))
    assert len(made) == cpu.most_sets + 1
    assert cpu.cache([(2, 2)], torch.float32) == "warm"
    assert cpu.cache(workloads.matrix(2**14, cpu.l2_bytes >> 14), torch.float32) == "cold"


def test_budgets():
    text, good = guard.report([("a case", 4.5, 5.0), ("another", 5.5, 5.0)])
    assert not good and text.count("OVER") == 1 and "another" in text.splitlines()[2]
    assert guard.report([("a case", 5.0, 5.0)])[1]
    assert guard.Case("a", "bf16", "exact", 8, 8, 3).name() == "a 3 of 8x8 bf16 exact"
    assert guard.collected("==1== Collected : 1234\n") == 1234
    for said in ("valgrind: no such file", "==1== Collected : 0\n"):
        with pytest.raises(SystemExit, match="expected callgrind's count"):
            guard.collected(said)
    assert all(len(most) == len(guard.INSTRUCTION_SETS) for most in guard.BUDGETS.values())


@pytest.mark.full("a program of its own, compiled against the executor's object files")
def test_what_the_guard_counts_steps():
    if "cpu" not in BUILT or not list((guard.ROOT / "build").glob("temp.*/csrc/cpu/rows.o")):
        pytest.skip("the extension was not built here")
    for case in (guard.Case("feature", dtype, "exact", 300, 250) for dtype in ("fp32", "bf16", "fp16")):
        told = [str(guard.driver()), *map(str, case), "64"]
        said = subprocess.run(told, capture_output=True, text=True, check=True).stdout
        assert 0.5 < float(said.split()[0]) < 0.9


def test_the_guard_says_that_valgrind_is_absent(tmp_path):
    command = [sys.executable, "-m", "bench.guard"]
    ended = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "bench.guard: expected valgrind on the PATH, found none\n"


def test_thread_counts_are_put_back(monkeypatch):
    seen = []
    monkeypatch.setattr(suites, "beside", lambda *a, **o: lambda: seen.append(torch.get_num_threads()) or [])
    before = torch.get_num_threads()
    rows = suites.scaling(Tiny(), 2, 2**10, (8, 6))
    for row in rows:
        if row.note["along"] == "threads":
            row.measure()
    assert seen == [1, 2] and torch.get_num_threads() == before
