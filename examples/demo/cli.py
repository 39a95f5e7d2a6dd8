"""The command: train under every method, make a network smaller, write a summary, figures and CSV."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import matplotlib
from torch import nn

from cges_kernels import sparsity_report

from ..common.cli import WHOLE, parser_of, prepared, write
from ..common.data import Dataset
from ..common.figures import RC
from ..common.jobs import Job, jobs_of, row_of, run_jobs
from ..common.methods import LABELS, METHODS
from ..common.results import Results, Row
from ..common.training import Repetition, Settings
from .figures import draw, last_layer
from .report import claims, dense_to_small, nearest, table

DESCRIPTION = """\
Train a small LeNet with ProxSGD or ProxAdamW under the six methods of the CGES thesis: l2, l1, group sparsity
by filter and by feature, exclusive sparsity, and CGES, each at several strengths. Print what each leaves of
the network and which of the thesis's claims hold here, make one of the networks smaller with compact(), and
write figures and CSV. Takes under 3 minutes on two cores."""
# A penalty works against the gradients under SGD, but under AdamW against the ratio of a gradient's mean to
# its root mean square (docs/adamw.md). With this lr and strength AdamW's ranges also go from nearly dense to
# where accuracy suffers.
ADAMW_LR, ADAMW_STRENGTH = 5e-3, 8.0


def train(dataset: Dataset, settings: Settings, job: Job) -> tuple[Row, nn.Module]:
    """Train a network; a row says how accurate and how sparse it is, in percent."""
    repetition = Repetition(dataset, settings, job.seed)
    model = repetition.train(METHODS[job.arm], job.lam)
    row = row_of(settings, job, dict(repetition.measure(model)))
    total = sparsity_report(model).total
    last = last_layer(model)
    readers = (last != 0).sum(0)  # the number of classes that read each feature
    row["dead_groups"] = 100 * total.dead_groups / total.groups
    row["dead_units"] = 100 * total.dead_outputs / total.outputs
    row["last_nonzero"] = 100 * int(readers.sum()) / last.numel()
    row["classes_per_feature"] = int(readers.sum()) / max(int((readers > 0).sum()), 1)
    return row, model.cpu()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; ``argv`` as on the command line, without the program's name."""
    parser = parser_of("python -m examples.demo", DESCRIPTION, "demo_out")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="(default: sgd)")
    parser.add_argument("--lambdas", default=4, help="strengths per method (default: 4)", **WHOLE)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    dataset, settings, out = prepared(parser, args)
    settings = replace(settings, pretrain_epochs=0)
    if args.optimizer == "adamw":
        strength = args.strength or ADAMW_STRENGTH
        settings = replace(settings, optimizer="adamw", lr=ADAMW_LR, strength=strength)
    jobs = jobs_of(METHODS, args.lambdas, args.seeds)
    found = run_jobs(partial(train, dataset, settings), jobs, args.workers, args.device, "training")
    rows, models = [row for row, _ in found], [model for _, model in found]
    results = Results(rows, LABELS, settings.strength)
    shown = nearest(results, models)
    small = dense_to_small(*shown["cges"], Repetition(dataset, settings, 0))
    title = f"{args.optimizer}: {results.told}"
    text = "\n\n".join([title, table(results), claims(results), small])
    with matplotlib.rc_context(RC):
        figures, texts = draw(results, shown)
        texts |= {"summary.txt": f"{text}\n", "runs.csv": results.runs_csv()}
        write(out, texts, figures)
    print(f"\n{text}\n\nFigures and CSV: {out}/ ({time.perf_counter() - start:.0f} s)")
    return 0
