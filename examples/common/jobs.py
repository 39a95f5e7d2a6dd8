"""Many trainings in worker processes, with a progress bar."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from .methods import Arm
from .results import Row
from .training import Settings

J = TypeVar("J")
R = TypeVar("R")


class Job(NamedTuple):
    """One training: the key of an arm, its lambda, and the repetition."""

    arm: str
    lam: float
    seed: int


def jobs_of(arms: Mapping[str, Arm], lambdas: int, seeds: int) -> list[Job]:
    """Every arm at each of its lambdas, repetition by repetition."""
    return [
        Job(key, lam, seed)
        for seed in range(seeds)
        for key, arm in arms.items()
        for lam in arm.lambdas(lambdas)
    ]


def row_of(settings: Settings, job: Job, measured: Row) -> Row:
    """One result row: the run's settings first, then its measurements."""
    facts = {"data": settings.data, "net": settings.net, "epochs": settings.epochs}
    return {**facts, "arm": job.arm, "lambda": job.lam, "seed": job.seed, **measured}


def progress(items: Iterable[R], label: str, unit: str, total: int) -> Iterable[R]:
    """Passes the items on, and shows a bar with the number of those that are done."""
    seconds = 0.1 if sys.stderr.isatty() else 20  # a log wants few lines
    return tqdm(items, desc=label, unit=unit, total=total, mininterval=seconds)


def run_jobs(work: Callable[[J], R], jobs: Sequence[J], workers: int, device: str, label: str) -> list[R]:
    """``work(job)`` of every job in their order, from ``workers`` processes of one thread each.

    One worker is this process itself. The results do not depend on the number of workers.
    """
    parallel = Parallel(min(workers, max(len(jobs), 1)), return_as="generator")
    found = parallel(delayed(_alone)(work, job, device) for job in jobs)
    return list(progress(found, label, "run", len(jobs)))


def _alone(work: Callable[[J], R], job: J, device: str) -> R:
    if device != "cpu":  # so that the same command gives the same table on a GPU too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with one_thread():
        return work(job)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch compute with one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
