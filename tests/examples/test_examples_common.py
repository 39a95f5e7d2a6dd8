"""The code that the examples share: settings, trainings in processes, verdicts, options, and files."""

import copy
import math
from functools import partial

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from matplotlib.figure import Figure

from cges_kernels import ProxAdamW, ProxSGD, compact
from examples.common import cli, networks
from examples.common.data import load
from examples.common.jobs import jobs_of, run_jobs
from examples.common.methods import LABELS, METHODS
from examples.common.results import Interval, Results
from examples.common.training import SETTINGS, Repetition, Settings, fit, without_scaled
from examples.demo.cli import train

PARSED = cli.parser_of("prog", "what it does", "prog_out")


def row(arm, lam, seed, accuracy, cost=50.0, **more):
    facts = {"data": "none", "net": "none", "epochs": 1, "arm": arm, "lambda": lam, "seed": seed}
    costs = dict.fromkeys(("nonzero", "flops_nonzero", "weights_compacted", "flops_compacted"), cost)
    return {**facts, "accuracy": accuracy, **costs, **more}


def invented(gain):
    """Accuracy falls by one point as the cost halves; CGES has about ``gain`` points more than all others."""
    rows = []
    for job in jobs_of(METHODS, 5, 3):
        i = METHODS[job.arm].lambdas(5).index(job.lam)
        cost = 100.0 if job.arm == "l2" else 100 / 2**i
        more = gain * (job.arm == "cges") * (1 + 0.1 * (job.seed - 1))
        rows.append(row(*job, 95 + math.log2(cost / 100) + more, cost))
    return Results(rows, LABELS)


def test_margin_at_equal_cost():
    found = invented(2.0).margin("cges", "l1", "nonzero")
    assert found.levels == (90, 80, 70, 60, 50, 40, 30, 20, 15, 10, 7)  # the curves end at 6.25%
    assert found.interval.mean == pytest.approx(2)
    assert found.interval.half == pytest.approx(4.30265 * 0.2 / math.sqrt(3), rel=1e-5)
    assert str(found) == "+2.00 ± 0.50 (90% to 7%): holds"
    assert str(invented(2.0).margin("cges", "l2", "nonzero")) == "no common level"  # l2 is at 100% only
    gone = [row | dict(nonzero=0.0) if row["seed"] == 2 else row for row in invented(2.0).rows]
    some = [a if a["arm"] == "l1" else b for a, b in zip(gone, invented(2.0).rows)]
    assert Results(some, LABELS).margin("cges", "l1", "nonzero").levels == ()  # nothing is left in a seed


def test_collapsed_networks_are_not_compared():
    """Curves end before a lambda whose mean accuracy is below 90% of the greatest, which is 97% here."""

    def levels(arm, accuracy, *seeds):
        rows = invented(2.0).rows
        weak = [row for row in rows if row["arm"] == arm and row["nonzero"] < 20 and row["seed"] in seeds]
        rows = [row | dict(accuracy=accuracy) if row in weak else row for row in rows]
        return Results(rows, LABELS).margin("cges", "l1", "nonzero").levels

    for arm in ("cges", "l1"):
        assert levels(arm, 50.0, 0, 1, 2) == (90, 80, 70, 60, 50, 40, 30)
        assert levels(arm, 88.0, 0, 1, 2)[-1] == 7
    assert levels("l1", 50.0, 2)[-1] == 30  # the mean is 78%
    assert levels("l1", 80.0, 2)[-1] == 7  # the mean is 88%
    assert levels("es", 50.0, 0, 1, 2)[-1] == 7
    rest = [row | dict(accuracy=50.0) if row["arm"] in ("l1", "es") else row for row in invented(2.0).rows]
    for arm in ("cges", "es"):
        assert str(Results(rest, LABELS).margin(arm, "l1", "nonzero")) == "no common level"


def test_the_interval_decides():
    """Two standard errors, 2.3 here, would decide more: of three values Student's t takes 4.3."""
    assert Interval.of([3.0]).verdict == "undecided (one repetition decides nothing)"
    assert (str(Interval.of([3.0])), Interval.of([3.0]).signed) == ("3.0", "+3.00")
    assert Interval.of([3.0, 3.1, 3.2]).verdict == "holds"
    assert Interval.of([-3.0, -3.1, -3.2]).verdict == "does not hold"
    assert Interval.of([1.0, 3.0, 5.0]).verdict == "undecided"
    assert Interval.of([0.5, 3.0, 5.5]) == pytest.approx((3.0, 4.30265 * 2.5 / math.sqrt(3)), rel=1e-5)


def test_groups_and_their_csv():
    def of(arm, lam, *accuracies):
        return [row(arm, lam, seed, accuracy) for seed, accuracy in enumerate(accuracies)]

    rows = [*of("es", 0.1, 90.0, 92.0, 94.0), *of("l1", 0.2, 80.0, 83.0, 83.0), *of("es", 0.05, 91.0)]
    found = Results(rows, LABELS)
    assert [(group.arm, group.lam) for group in found.groups] == [("l1", 0.2), ("es", 0.05), ("es", 0.1)]
    assert found.best("es").lam == 0.1
    assert found.best("es").gain(found.best("l1")).mean == 10
    assert found.over("l1", "es") == "+10.00 ± 2.48 (50% of the weights): holds"
    header, *lines = found.summary_csv().splitlines()
    assert found.caution == ["3 of 5 repetitions (--seeds): take the verdicts as hints."]
    assert header.startswith("data,net,epochs,seeds,arm,lambda,accuracy,accuracy_ci,nonzero,nonzero_ci")
    assert lines[2].startswith("none,none,1,3,es,0.1,92,4.96828,50,0")


def test_lambdas_keep_their_effect_without_momentum():
    l1, l2 = METHODS["l1"], METHODS["l2"]
    assert Settings(momentum=0.9).coefficient(l1, 0.5) == pytest.approx(0.5)
    assert Settings(momentum=0.0, strength=2).coefficient(l1, 0.5) == pytest.approx(0.1)
    assert Settings(momentum=0.0, strength=2).coefficient(l2, 0.5) == 1  # weight decay needs no change
    assert METHODS["l1"].lambdas(3) == [0.003, 0.0122, 0.05] and METHODS["l1"].lambdas(1) == [0.0122]
    assert SETTINGS["mnist"].epochs * 60000 // SETTINGS["mnist"].batch == 30000  # the thesis's


def test_the_training_loop():
    """For each batch it makes a step on loss and penalty, steps the schedulers, and calls after_step."""
    model, steps = torch.nn.Linear(3, 2), []
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    batches = [(torch.randn(4, 5, 3), torch.randint(2, (4, 5))) for _ in range(2)]
    fit(model.eval(), optimizer, [schedule], batches, lambda: model.weight.sum(), steps.append)
    assert steps == [1, 2] and model.training
    x, y = batches[0]  # the second step has no learning rate
    (torch.nn.functional.cross_entropy(before(x.view(20, 3)), y.view(20)) + before.weight.sum()).backward()
    for a, b in zip(model.parameters(), before.parameters()):
        torch.testing.assert_close(a, b - 0.5 * b.grad)


def test_either_optimizer():
    for name, kind, momentum in (("sgd", ProxSGD, 0.9), ("adamw", ProxAdamW, 0.0)):
        settings = Settings(optimizer=name, momentum=momentum, strength=2)
        repetition = Repetition(load("digits"), settings, 0)
        optimizer = repetition.optimizer(repetition.network(), METHODS["l1"], 0.1)
        assert type(optimizer) is kind
        assert {group["l1"] for group in optimizer.param_groups} == {0.0, 0.2}


@pytest.mark.parametrize("net", ["lenet_bn", "wrn"])
def test_slimming_counts_what_compact_removes(net):
    torch.manual_seed(0)
    model = (
        networks.build("lenet_bn", torch.zeros(1, 8, 8), 3)
        if net == "lenet_bn"
        else networks.WideResNet(1, 3, 1, 1)
    )
    for _, norm in networks.scaled(model):
        norm.bias.data.fill_(-0.5)  # behind relu nothing, so that padding does not matter
        norm.weight.data[::2] = 0
    x = torch.randn(3, 1, 8, 8)
    before = [p.clone() for p in model.parameters()]
    slim = without_scaled(model.eval())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    torch.testing.assert_close(slim(x), model(x))
    small = compact(slim, x)
    assert small.parameters[1] < small.parameters[0]


@pytest.mark.full("training alone and in two processes gives the same runs")
def test_same_runs_whatever_the_workers():
    jobs = [job for job in jobs_of(METHODS, 2, 2) if job.arm == "cges"]
    work = partial(train, load("digits"), Settings(epochs=1))
    threads = torch.get_num_threads()
    alone, together = (run_jobs(work, jobs, workers, "cpu", "training") for workers in (1, 2))
    assert torch.get_num_threads() == threads
    assert [(row["arm"], row["lambda"], row["seed"]) for row, _ in alone] == jobs
    for (row_a, model_a), (row_b, model_b) in zip(alone, together):
        assert row_a == row_b
        for a, b in zip(model_a.parameters(), model_b.parameters()):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--size", "9"], "argument --size: only --data folder takes it"),
        (["--device", "teapot"], "argument --device: expected one of this machine, got 'teapot'"),
        (["--device", "meta"], "argument --device: expected one of this machine, got 'meta'"),
        (["--device", "cuda:99"], "argument --device: expected one of this machine, got 'cuda:99'"),
        (["--strength", "-1"], "argument --strength: expected a number above 0, got '-1'"),
        (["--out", __file__], "argument --out: expected a folder to write to"),
        (["--path", "x"], "prog: --path: the digits come with scikit-learn"),
    ],
)
def test_bad_arguments(arguments, expected, tmp_path, capsys):
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cli.prepared(PARSED, PARSED.parse_args([*arguments, *out]))
    assert stop.value.code != 0
    assert expected in capsys.readouterr().err


def test_what_is_prepared(tmp_path):
    args = PARSED.parse_args(["--epochs", "3", "--net", "lenet_bn", "--out", str(tmp_path / "new" / "out")])
    dataset, settings, out = cli.prepared(PARSED, args)
    assert out.is_dir() and len(dataset.x) == 1797
    assert (settings.epochs, settings.net, settings.strength) == (3, "lenet_bn", SETTINGS["digits"].strength)


def test_a_failure_leaves_the_old_files(tmp_path):
    (tmp_path / "a.csv").write_text("good")
    with pytest.raises(ValueError, match="not supported"):
        cli.write(tmp_path, {"a.csv": "new"}, {"b.none": Figure()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "good"
    cli.write(tmp_path, {"a.csv": "new"}, {"b.svg": Figure()})
    assert (tmp_path / "a.csv").read_text() == "new" and (tmp_path / "b.svg").exists()
