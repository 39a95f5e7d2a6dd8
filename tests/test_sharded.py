"""Parameters that are sharded over ranks: every case of sharded_worker.py, in processes that torchrun starts.

A launch takes seconds, so there is one per number of ranks, for all the cases that are to run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs a torch with gloo", allow_module_level=True)

from sharded_worker import CASES, QUICK, matrix

WORKER = Path(__file__).with_name("sharded_worker.py")
LIMIT = 170  # seconds for a launch; a collective that hangs gives up earlier


def every_case():
    for world, cases in CASES.items():
        for name, run in cases.items():
            is_slow = world > 2 or (getattr(run, "func", None) is matrix and name not in QUICK)
            marks = [pytest.mark.xdist_group(f"torchrun {world}"), *[pytest.mark.slow] * is_slow]
            yield pytest.param((world, name), marks=marks, id=f"{world}-{name}")


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """By number of ranks: what went wrong on each rank, by case, and what the launch printed."""
    done = {}

    def launch(world):
        if world not in done:
            wanted = [
                item.callspec.params["case"][1]
                for item in request.session.items
                if item.path == request.path and item.callspec.params["case"][0] == world
            ]
            directory = tmp_path_factory.mktemp(f"ranks{world}")
            command = f"-m torch.distributed.run --standalone --nproc_per_node {world}".split()
            env = {**os.environ, "PYTHONPATH": str(WORKER.parents[1]), "OMP_NUM_THREADS": "1"}
            try:
                run = subprocess.run(
                    [sys.executable, *command, str(WORKER), str(directory), *wanted],
                    **dict(capture_output=True, text=True, timeout=LIMIT, env=env),
                )
                printed = run.stdout[-3000:] + run.stderr[-3000:]
            except subprocess.TimeoutExpired as error:
                printed = f"{error}\n{error.stderr}"
            files = [directory / f"rank{rank}.json" for rank in range(world)]
            done[world] = [json.loads(f.read_text()) if f.exists() else {} for f in files], printed
        return done[world]

    return launch


@pytest.mark.parametrize("case", list(every_case()))
def test_sharded(case, launched):
    world, name = case
    ranks, printed = launched(world)
    for rank, outcomes in enumerate(ranks):
        assert name in outcomes, f"rank {rank} did not get there:\n{printed}"
        assert outcomes[name] is None, f"rank {rank}: {outcomes[name]}"
