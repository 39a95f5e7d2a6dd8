"""The thesis's experiments: every one in small, errors, and the page of the results."""

import csv
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from cges_kernels import ProxSGD, penalty
from examples.common import networks, results
from examples.common.data import Dataset
from examples.common.methods import METHODS
from examples.common.training import Repetition, Settings
from examples.thesis import cli, files, page, sections
from examples.thesis.experiments import EXPERIMENTS, FIG3, fit_subgradient, jobs, on_layers, pretrain, work

TINY = ["--epochs", "1", "--seeds", "2", "--lambdas", "1", "--workers", "1"]
FILES = ("-runs.csv", ".csv", "-settings.csv", ".svg")

pytestmark = pytest.mark.xdist_group("thesis")


def small_dataset(n=60, size=8, channels=1, classes=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, channels, size, size)).astype(np.float32)
    return Dataset(x, np.arange(n) % classes, classes, tested=n // 3)


def test_layers_keep_their_mu():
    model = networks.build("lenet", torch.zeros(1, 8, 8), 10)
    both, conv = (
        ProxSGD(make(model, 0.1), lr=0.1)
        for make in (METHODS["cges"].param_groups, on_layers(lambda w: w.dim() > 2))
    )
    of = {name: g for opt in (both,) for g in opt.param_groups for name in g["param_names"]}
    for group in conv.param_groups:
        for name in group["param_names"]:
            for key in ("group_lasso", "exclusive_lasso"):
                assert group[key] == (of[name][key] if "conv" in name else 0)


def test_the_authors_factors():
    """Group weights .8, .6, .4, .2 and exclusive weights .2, .4, .6, .8, each times its layer's factor."""
    model = networks.build("lenet", torch.zeros(1, 8, 8), 10)
    groups = ProxSGD(FIG3["cges_authors"].param_groups(model, 6e-5), lr=0.1).param_groups
    found = {name: (g["group_lasso"], g["exclusive_lasso"]) for g in groups for name in g["param_names"]}
    pairs = [(0.8, 0.2), (0.6, 0.4 * 0.5), (0.4 / 15, 0.6 * 15), (0.2 / 144, 0.8 * 144)]
    assert FIG3["cges_authors"].lambdas(1) == [6e-4]
    assert Settings(momentum=0).coefficient(FIG3["cges_authors"], 6e-4) == pytest.approx(6e-5)
    for name, (group_lasso, exclusive_lasso) in zip(("conv1", "conv2", "fc1", "fc2"), pairs):
        assert found[f"{name}.weight"] == pytest.approx((6e-5 * group_lasso, 6e-5 * exclusive_lasso))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment(name, tmp_path):
    settings = Settings(data="random", epochs=1, batch=16)
    experiment = EXPERIMENTS[name]
    rows = [row for job in jobs(name, settings, 2, 1) for row in work(name, small_dataset(), settings, job)]
    assert {row["arm"] for row in rows} == set(experiment.labels)
    assert all(0 <= row[key] <= 100 for row in rows for key in ("accuracy", *results.COSTS) if key in row)
    found = results.Results(rows, experiment.labels, strength=7)
    files.write_results(name, found, Settings(strength=7), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}{part}" for part in FILES}
    read = results.read_runs(tmp_path / f"{name}-runs.csv")
    assert [row["arm"] for row in read] == [row["arm"] for row in rows]
    with (tmp_path / f"{name}.csv").open() as file:
        summary = list(csv.DictReader(file))
    first = [row["accuracy"] for row in rows if all(row[k] == rows[0][k] for k in results.KEYS if k in row)]
    assert float(summary[0]["accuracy"]) == pytest.approx(np.mean(first), rel=1e-4)
    half = 12.7062 * np.std(first, ddof=1) / 2**0.5
    assert float(summary[0]["accuracy_ci"]) == pytest.approx(half, rel=1e-3)
    said = page.measured(tmp_path, tmp_path, [name])
    assert "random, network lenet, 1 epochs, 2 seeds, every λ times 7" in said and said.count("|") > 10
    verdicts = sections.SECTIONS[name](files.read_results(name, tmp_path)).claims.values()
    assert all(
        re.search("holds|does not hold|undecided|no common|gets there", verdict) for verdict in verdicts
    )
    if name == "fig4c":  # equal numbers, equal bytes
        before = (tmp_path / f"{name}.svg").read_bytes()
        files.write_results(name, found, Settings(strength=7), tmp_path)
        assert (tmp_path / f"{name}.svg").read_bytes() == before


def test_arms_that_a_network_cannot_have():
    for settings, expected in (
        (Settings(), {"cges_authors", "cges_norm", "slimming"}),
        (Settings(net="lenet_bn"), {"cges_authors", "slimming"}),
        (Settings(net="wrn-16-10", pretrain_epochs=1), {"slimming"}),
        (Settings(pretrain_epochs=1), {"cges_authors"}),
        (Settings(net="mnist"), {"cges_authors"}),
    ):
        assert {job.arm for job in jobs("fig3", settings, 1, 1)} - set(METHODS) == expected, settings


def test_fine_tuning_starts_from_the_same_network(tmp_path):
    settings = Settings(epochs=1, batch=16, pretrain_epochs=1, pretrained=tmp_path)
    pretrain(small_dataset(), settings, 1)
    repetition = Repetition(small_dataset(), settings, 1)
    (kept,) = tmp_path.iterdir()
    state = torch.load(kept, weights_only=True)
    for key, value in repetition.network().state_dict().items():
        assert torch.equal(value, state[key])
    when = kept.stat().st_mtime_ns
    repetition.pretrain()
    assert kept.stat().st_mtime_ns == when


def test_the_command(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert cli.main(["fig4c", *TINY, "--pretrain", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "fig4c-runs.csv" in said and "2 of 5 repetitions" in said
    assert "- mu rising over the layers is better than constant, at equal nonzero weights: against" in said
    kept = {f"l2-digits-lenet-1-{seed}.pt" for seed in (0, 1)}
    assert {path.name for path in out.iterdir()} == {f"fig4c{part}" for part in FILES} | kept
    before = page.PAGE.read_bytes()
    assert cli.main(["page", "--out", str(out)]) == 0
    again = capsys.readouterr().out
    assert said.partition("\n\n")[0].strip() in again and again.endswith(f"\n\nwrote {out / 'claims.md'}\n")
    assert "![Figure 4 c: mu increasing or constant](fig4c.svg)" in (out / "claims.md").read_text("utf-8")
    assert page.PAGE.read_bytes() == before


def test_the_subgradient_method_has_the_same_objective():
    """Its first step, with momentum, is a gradient step on loss + (1 - momentum) * Omega."""
    settings = Settings(epochs=1, batch=100, warmup=0)
    repetition = Repetition(small_dataset(), settings, 0)
    without, stepped, start = (repetition.network() for _ in range(3))
    for model, lam in ((without, 0.0), (stepped, 0.5)):
        torch.manual_seed(1)  # for dropout
        fit_subgradient(repetition, model, METHODS["cges"], lam)
    groups = ProxSGD(METHODS["cges"].param_groups(start, 0.5), lr=0.1).param_groups
    keys = ("group_lasso", "exclusive_lasso", "group_by")
    sum(penalty(p, **{key: g[key] for key in keys}) for g in groups for p in g["params"]).backward()
    for a, b, p in zip(without.parameters(), stepped.parameters(), start.parameters()):
        expected = 0 * p if p.grad is None else settings.lr * 0.1 * p.grad  # biases have no penalty
        torch.testing.assert_close(a - b, expected, atol=1e-6, rtol=1e-4)


def test_arguments_that_do_not_apply(tmp_path, capsys):
    for arguments, expected in (
        (["fig9"], "invalid choice: 'fig9'"),
        (["page", "--data", "mnist", "--seeds", "2"], "page takes --out only, got --data, --seeds"),
        (
            ["page", "--out", str(tmp_path)],
            f"{tmp_path}: expected results, such as fig3-runs.csv; found none",
        ),
        (["fig4a", "--lambdas", "2"], "argument --lambdas: fig4a has one lambda per arm"),
        (["fig4c", "--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'"),
        (["fig4c", "--pretrain", "-1"], "expected a whole number of at least 0, got '-1'"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code != 0
        assert expected in capsys.readouterr().err


def test_noise_is_not_as_good_as_dense():
    """No worse is what loses less than a point by the whole interval, not what is too noisy to tell."""

    def group(lam, *accuracies, nonzero=50.0):
        rows = [{"seed": i, "accuracy": x, "nonzero": nonzero} for i, x in enumerate(accuracies)]
        return results.Group("any", lam, 0.0, rows)

    dense = group(0.1, 95.0, 95.0, 95.0)
    steady, noisy = group(0.2, 94.4, 94.5, 94.6), group(0.3, 20.0, 95.0, 96.0, nonzero=3.0)
    assert (
        sections.fewest([group(0.1, 95.0, 95.0, 95.0, nonzero=90.0), steady, noisy], dense)
        == "50.0 ± 0.0%, λ 0.2"
    )
    assert sections.fewest([steady, noisy], dense) == "50.0 ± 0.0%, λ 0.2, its weakest"
    assert sections.fewest([noisy, group(0.4, 93.9, 94.0, 94.1)], dense) == "none"


@pytest.mark.full("the programme on the page runs; it takes seconds")
def test_the_programme_of_the_page(monkeypatch, capsys):
    (programme,) = re.findall("```python\n(.*?)```", page.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr("examples.common.data.load", lambda data, path: small_dataset(size=28, classes=10))
    exec(programme, {})
    said = capsys.readouterr().out
    assert "% of the test images" in said and "fc2.weight    10x1024" in said


def test_the_page_is_that_of_the_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_measured(text) == text, (
        "run `python -m examples.thesis page --out examples/thesis/results`"
    )
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert len(links) >= len(EXPERIMENTS)
    assert [link for link in links if not (page.PAGE.parent / link).exists()] == []
