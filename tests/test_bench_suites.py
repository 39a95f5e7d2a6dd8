"""The CPU suite in miniature: rows, files, plots, the README's part; and what counts its instructions."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import guard, lab, plots, readme, run, suites, table, timing, workloads
from bench.guard import Budget
from bench.workloads import Case
from cges_kernels import available_backends

ROOT = Path(__file__).parent.parent
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
        patch.setattr(run, "peak_extra_memory", lambda: {"threads": 2, "bytes": 2**21})
        cases = [Case("small feature", "feature", [(6, 5), (6,)]), Case("m feature", "feature", [(3, 4)])]
        tiny = Tiny()
        rows = [
            *suites.models(tiny, cases, runs=1),
            *suites.grid(tiny, (4, 18), runs=1),
            *suites.scaling(tiny, 1, 2**10, (8, 6), runs=1),
        ]
        out = tmp_path_factory.mktemp("bench")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two that wait for each other on a busy machine take milliseconds a step
        try:
            assert run.run(rows, run.arguments(["--out", str(out), "--runs", "2"]))
        finally:
            torch.set_num_threads(threads)
    return out


def test_files(report):
    results = {r["row"]: r for r in json.loads((report / "cpu.json").read_text())["results"]}
    assert not any("error" in r for r in results.values()) and all(r["runs"] == 1 for r in results.values())
    model = results["small feature, all contenders"]
    assert model["compiled_error"] == "ValueError: no compiler" and model["bytes"] == 36 * 20
    assert set(model["contenders"]) >= {"copy", "fused_sgd", "foreach", "for_loop", "eager", "vectorised"}
    of = {name: c.get("ops") for name, c in model["contenders"].items()}
    assert 0 < of["prox_sgd"] < of["vectorised"] < of["eager"] and of["copy"] is None
    assert "counts" not in model
    exact = results["filter 18x18 bf16 exact"]
    assert exact["bytes"] == 18 * 18 * 10 and exact["contenders"]["prox_sgd"]["gb_per_s"] > 0
    assert exact["mode"] == "exact" and exact["percent_of_copy"] > 0
    with open(report / "cpu.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["row"] == "small feature, all contenders"]
    ours = next(line for line in lines if line["contender"] == "prox_sgd")
    assert (ours["bytes"], ours["suite"], ours["cache"], ours["target"]) == ("720", "models", "cold", "")
    assert float(ours["ms_low"]) <= float(ours["ms"]) <= float(ours["ms_high"])


def test_plots(report):
    drawn = {f"cpu-{suite}.{form}" for suite in plots.PICTURES for form in plots.FORMATS}
    assert drawn == {path.name for path in report.iterdir()} - {"cpu.json", "cpu.csv"}
    before = {path.name: path.read_bytes() for path in report.glob("*.svg")}
    plots.draw(json.loads((report / "cpu.json").read_text())["results"], "cpu", report)
    assert before == {path.name: path.read_bytes() for path in report.glob("*.svg")}
    assert plots.draw([], "cpu", report) == []


def test_the_readme_shows_contenders_and_plots(report):
    cpu, gpus = readme.reports()
    measured = json.loads((report / "cpu.json").read_text())["results"]
    core = [r for r in cpu["results"] if "suite" not in r]
    whole = (ROOT / "README.md").read_text()
    text = readme.with_tables(whole, {**cpu, "results": core + measured}, gpus)
    assert "| ms per step | small | m | operations, small | extra memory, small |" in text
    assert "small feature: torch.compile failed (ValueError: no compiler)." in text
    assert "](bench/results/cpu-grid.svg)" in text and "](bench/results/cpu-scaling.svg)" in text
    assert "| feature 4x4 fp32" not in text  # the table with targets holds no other rows
    assert readme.with_tables(text, {**cpu, "results": core + measured}, gpus) == text
    assert readme.cpu_models({"results": core}) == readme.pictures({"results": core}, "cpu") == ""


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
        return suites.Contender(lambda: None, [])

    cpu.contender(make, [(2, 2)])
    cpu.contender(make, workloads.matrix(2**14, cpu.l2_bytes >> 14))
    assert len(made) == cpu.MOST_SETS + 1


def test_budgets():
    kept, over = (
        Budget("none", "fp32", "sequential", 8, 8, 1, 5.0),
        Budget("a", "bf16", "exact", 8, 8, 3, 5.0),
    )
    text, good = guard.report([(kept, 4.5), (over, 5.5)])
    assert not good and text.count("OVER") == 1 and "a 3 of 8x8 bf16 exact" in text.splitlines()[2]
    assert guard.report([(kept, 5.0)])[1]
    assert guard.collected("==1== Collected : 1234\n") == 1234
    with pytest.raises(SystemExit, match="expected callgrind's count"):
        guard.collected("valgrind: no such file")
    assert len({b.name() for b in guard.BUDGETS}) == len(guard.BUDGETS)


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
