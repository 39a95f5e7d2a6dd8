"""Results of the GPU benchmarks, of made-up numbers: files, the README's part, runs that are cut or quick."""

import contextlib
import json

import pytest
from helpers.cpu_lab import CpuLab, steady
from helpers.programs import ROOT

from bench import gpu, pages, table
from bench.table import Row


def made_up_rows():
    def known(workload, dtype="fp32"):
        return {"backend": "triton", "dtype": dtype, "workload": workload}

    def fails():
        raise RuntimeError("out of luck\nand more")

    model = {"copy": 3.0, "fused_sgd": 4.0, "prox_sgd": 6.0, "eager": 40.0, "foreach": 8.0}
    return [
        Row("a fp32", "copy", "prox_sgd", 100 / 90, steady(copy=1, prox_sgd=1.25), known("a")),
        Row(
            *("a bf16", "copy", "prox_sgd", 100 / 90, steady(copy=1, prox_sgd=1.0)),
            *(known("a", "bf16"), lambda: {"launches": 2.0}),
        ),
        Row(
            *("m fp32", "fused_sgd", "prox_sgd", 1.25, steady(**model)),
            {**known("m"), "suite": "models", "compiled_error": "no compiler"},
        ),
        Row("e fp32", "sequential", "exact", None, steady(sequential=2, exact=3), known("e"), fails),
        Row("f fp32", "copy", "prox_sgd", 1.1, fails, known("f")),
    ]


def test_files_and_pages_of_made_up_numbers(tmp_path):
    saved = []
    results = table.measure(made_up_rows(), runs=2, save=lambda found: saved.append(len(found)))
    assert saved == [5] * (
        5 + 4 + 2
    )  # after each row in each round (one failed in the first), and with facts
    first, second, model, exact, failed = results
    assert first["met"] is False and table.percent_of_copy(first) == pytest.approx(80)
    assert second["met"] is True and second["launches"] == 2.0 and second["runs"] == 2
    assert model["met"] is False and table.percent_of_copy(model) == pytest.approx(50)
    assert exact["met"] is None and exact["target"] is None
    assert exact["facts_error"] == "RuntimeError: out of luck"  # its times are kept
    assert failed["error"] == "RuntimeError: out of luck" and "contenders" not in failed
    assert all(table.line(result).startswith(result["row"]) for result in results)

    env = CpuLab().environment("abc") | {"gpu": "NVIDIA X", "runs": 2}
    report = {"name": "gpu-x", "environment": env, "results": results}
    table.write({"environment": env, "results": results}, tmp_path / "new" / "gpu-x.json")
    assert {"name": "gpu-x", **json.loads((tmp_path / "new" / "gpu-x.json").read_text())} == report
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gpu-x.json"]

    text = "\n\n".join(pages.gpu_part(report))
    assert "NVIDIA X" in text and "| a | a copy | 90% | 1.250 | 80% [80, 80] (missed) |" in text
    assert "| 1.000 | 100% [100, 100] | 2 |  |" in text
    assert (
        "| m | torch's fused SGD | 1.25 | 6.000 | 1.50 [1.50, 1.50], 50% (missed) |  |  |  | 10.0 |" in text
    )
    assert "failed: RuntimeError: out of luck" in text
    assert "| reference, eager | 40 |" in text and "m: torch.compile failed (no compiler)." in text
    assert "By triton: 4 rows at commit abc (" in text and ", 2 runs)." in text
    cpu, *_ = pages.reports()
    whole = pages.pages(cpu, [report], [])
    assert text in whole[ROOT / "docs" / "speed.md"] and "| X, Triton (abc) |" in whole[ROOT / "README.md"]
    again = pages.between_markers(whole[ROOT / "README.md"], pages.short_part(cpu, [report]))
    assert again == whole[ROOT / "README.md"]


def test_a_cpu_table_with_and_without_the_rows_of_today():
    (cpu, *_), *_ = pages.reports()
    row = Row("a", "sequential", "exact", None, steady(sequential=4, exact=1))
    new, later = (Row(name, "sequential", "exact", 1.0, list) for name in ("new", "later"))
    sides = {"baseline": "sequential", "contender": "exact"}
    failed = {"row": "new", "suite": "core", **sides, "error": "no luck"}
    report = {**cpu, "results": [*table.measure([row], 1), failed]}
    text, *_ = pages.cpu_part([report], [row, new, later])
    assert "| a | sequential mode | - | 1.000 | 0.25 [0.25, 0.25] |" in text
    assert "| new | sequential mode | 1.00 |  | failed: no luck |" in text
    assert "| later | sequential mode | 1.00 |  |  |" in text


def test_no_row_begins_when_time_is_up():
    results = table.measure(made_up_rows(), runs=2, minutes=0.0)
    assert [result["error"] for result in results] == ["no time was left"] * 5


def cut():
    raise KeyboardInterrupt


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path):
    rows = [Row("a", "copy", "a", None, steady(copy=1, a=2)), Row("b", "copy", "b", None, cut)]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(CpuLab(), rows, gpu.arguments(["--out", str(tmp_path), "--commit", "abc"]))
    first, second = json.loads((tmp_path / "gpu-cpu.json").read_text())["results"]
    assert first["contenders"]["a"]["ms"] == pytest.approx(2) and second["error"] == table.NO_TIME
    assert first["commit"] == "abc"


def test_a_quick_run_keeps_other_rows_and_each_says_when_it_was_measured(tmp_path):
    def row(name, ms, backend="cuda"):
        note = {"backend": backend, "dtype": "fp32", "workload": name}
        return Row(name, "copy", "prox_sgd", None, steady(copy=1, prox_sgd=ms) if ms else cut, note)

    def ran(rows, *arguments):
        options = gpu.arguments([*arguments, "--out", str(tmp_path), "--commit", "new"])
        with contextlib.suppress(KeyboardInterrupt):
            gpu.run(CpuLab(), rows, options)
        report = json.loads((tmp_path / "gpu-cpu.json").read_text())
        found = {r["row"]: (r["commit"], r["contenders"]["prox_sgd"]["ms"]) for r in report["results"]}
        return report, {name: (commit, pytest.approx(ms)) for name, (commit, ms) in found.items()}

    old = table.measure([row("a", 4), row("b", 4), row("t", 4, "triton")], 3)  # no row says when
    environment = CpuLab().environment("old") | {"date": "2020-01-02"}
    table.write({"environment": environment, "results": old}, tmp_path / "gpu-cpu.json")
    report, found = ran([row("a", 2), row("c", 2)], "--quick")
    assert found == {"a": ("new", 2), "b": ("old", 4), "t": ("old", 4), "c": ("new", 2)}
    assert list(found) == ["a", "b", "t", "c"]
    assert {r["row"]: r["date"] for r in report["results"]}["t"] == "2020-01-02"
    text = "\n".join(pages.gpu_part({"name": "gpu-cpu", **report}))
    today = report["environment"]["date"]
    both = f"2 rows at commit new ({today}, 1 run), 1 row at commit old (2020-01-02, 3 runs)."
    assert f"By cuda: {both}" in text
    assert "By triton: 1 row at commit old (2020-01-02, 3 runs)." in text
    _, found = ran([row("c", 3), row("b", None)], "--quick")
    assert found == {"a": ("new", 2), "b": ("old", 4), "t": ("old", 4), "c": ("new", 3)}
    _, found = ran([row("a", 2), row("c", 2)], "--runs", "1")  # a whole run replaces everything
    assert found == {"a": ("new", 2), "c": ("new", 2)}
