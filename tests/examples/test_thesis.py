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
from examples.thesis import cli, page
from examples.thesis.experiments import EXPERIMENTS, fit_subgradient, jobs, on_layers, pretrain, work

TINY = ["--epochs", "1", "--seeds", "2", "--lambdas", "1", "--workers", "1"]
FILES = ("-runs.csv", ".csv", ".svg")

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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment(name, tmp_path):
    settings = Settings(data="random", epochs=1, batch=16)
    experiment = EXPERIMENTS[name]
    rows = [row for job in jobs(name, settings, 2, 1) for row in work(name, small_dataset(), settings, job)]
    assert {row["arm"] for row in rows} == set(experiment.labels)
    assert all(0 <= row[key] <= 100 for row in rows for key in ("accuracy", *results.COSTS) if key in row)
    cli.write_results(name, results.Results(rows, experiment.labels), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}{part}" for part in FILES}
    read = results.read_runs(tmp_path / f"{name}-runs.csv")
    assert [row["arm"] for row in read] == [row["arm"] for row in rows]
    with (tmp_path / f"{name}.csv").open() as file:
        summary = list(csv.DictReader(file))
    first = [row["accuracy"] for row in rows if all(row[k] == rows[0][k] for k in results.KEYS if k in row)]
    assert float(summary[0]["accuracy"]) == pytest.approx(np.mean(first), rel=1e-4)
    half = 12.7062 * np.std(first, ddof=1) / 2**0.5
    assert float(summary[0]["accuracy_ci"]) == pytest.approx(half, rel=1e-3)
    said = page.measured(tmp_path, [name])
    assert "random, network lenet, 1 epochs, 2 seeds" in said and said.count("|") > 10
    if name == "fig4c":  # equal numbers, equal bytes
        before = (tmp_path / f"{name}.svg").read_bytes()
        cli.write_results(name, results.Results(rows, experiment.labels), tmp_path)
        assert (tmp_path / f"{name}.svg").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), {"cges_norm", "slimming"}),
        (Settings(net="lenet_bn"), {"slimming"}),
        (Settings(net="wrn-16-10", pretrain_epochs=1), {"slimming"}),
        (Settings(pretrain_epochs=1), set()),
        (Settings(net="mnist"), set()),
    ],
)
def test_slimming_needs_batch_norm(settings, expected):
    assert {job.arm for job in jobs("fig3", settings, 1, 1)} - set(METHODS) == expected


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
    assert "fig4c.csv" in capsys.readouterr().out
    kept = {f"l2-digits-lenet-1-{seed}.pt" for seed in (0, 1)}
    assert {path.name for path in out.iterdir()} == {f"fig4c{part}" for part in FILES} | kept


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


def test_an_unknown_experiment(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fig9"])
    assert "invalid choice: 'fig9'" in capsys.readouterr().err


def test_the_page_is_that_of_the_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_measured(text) == text, "run `python -m examples.thesis page`"
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert len(links) >= len(EXPERIMENTS)
    assert [link for link in links if not (page.PAGE.parent / link).exists()] == []
