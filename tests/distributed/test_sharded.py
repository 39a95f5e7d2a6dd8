"""Parameters that are sharded over ranks: every case of sharded_cases/, in processes that torchrun starts.

A launch takes seconds, so there is one for each number of ranks, for all cases that are to run. The first
tier has two: two ranks for all cases but most of the matrix, and four ranks for what fewer cannot show.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.programs import PATHS

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs a torch with gloo", allow_module_level=True)

from sharded_cases.matrix import matrix
from sharded_worker import CASES

WORKER = Path(__file__).with_name("sharded_worker.py")
LIMIT = 170  # seconds for a launch; a collective that hangs gives up earlier


# Cases for GPUs. The last one does not run with gloo, of which only all_reduce is sure to work on a GPU.
ON_GPUS = {
    1: ("rows-feature", "sums-over-one-rank", "a-model-under-fully-shard"),
    2: (
        "rows-feature",
        "rows-filter",
        "frozen-zeros",
        "options-of-sgd-and-freezing",
        "a-model-under-fully-shard",
    ),
}


def why_full(world, name):
    """The reason why a case on the CPU is left out of the first tier, or None."""
    if getattr(CASES[world][name], "func", None) is matrix:
        # Sharded rows run with every spec. Other placements run with filters, which most of them cut.
        if world != 2 or not (name.startswith("rows") or name.endswith("filter")):
            return "the rest of the product of placements and specs"
    elif world == 1:
        return "meshes of one rank; the first tier has those of two and four"
    elif world == 4 and name in CASES[2]:
        return "meshes of two dims; the first tier runs the case on a mesh of one dim"


def every_case():
    """Parameters of test_sharded: ((number of ranks, device, backend), name of the case)."""
    for world, cases in CASES.items():
        for name in cases:
            reason = why_full(world, name)
            marks = [pytest.mark.xdist_group(f"torchrun {world}"), *[pytest.mark.full(reason)] * bool(reason)]
            yield pytest.param((world, "cpu", "gloo"), name, marks=marks, id=f"{world}-{name}")
    for world, backend in ((1, "nccl"), (2, "nccl"), (2, "gloo")):
        for name in ON_GPUS[world][: -1 if backend == "gloo" else None]:
            marks = [pytest.mark.xdist_group(f"torchrun {world} {backend}"), pytest.mark.gpu]
            yield pytest.param((world, "cuda", backend), name, marks=marks, id=f"{backend}-{world}-{name}")


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """A function that returns what went wrong on each rank, by case, and what was printed.

    It launches once for each (number of ranks, device, backend).
    """
    done = {}

    def launch(ranks):
        if ranks not in done:
            world, device, backend = ranks
            params = [item.callspec.params for item in request.session.items if item.path == request.path]
            wanted = [x["name"] for x in params if x["ranks"] == ranks]
            directory = tmp_path_factory.mktemp("-".join(map(str, ranks)))
            command = f"-m torch.distributed.run --standalone --nproc_per_node {world}".split()
            env = {
                **os.environ,
                "PYTHONPATH": PATHS,
                "OMP_NUM_THREADS": "1",
            }
            try:
                run = subprocess.run(
                    [sys.executable, *command, str(WORKER), str(directory), device, backend, *wanted],
                    **dict(capture_output=True, text=True, timeout=LIMIT, env=env),
                )
                printed = run.stdout[-3000:] + run.stderr[-3000:]
            except subprocess.TimeoutExpired as error:
                printed = f"{error}\n{error.stderr}"
            files = [directory / f"rank{rank}.json" for rank in range(world)]
            done[ranks] = [json.loads(f.read_text()) if f.exists() else {} for f in files], printed
        return done[ranks]

    return launch


@pytest.mark.parametrize("ranks, name", list(every_case()))
def test_sharded(ranks, name, launched):
    """The case passed on every rank."""
    world, _, backend = ranks
    if backend == "nccl" and not dist.is_nccl_available():
        pytest.skip("needs a torch with NCCL")
    if backend == "nccl" and world > torch.cuda.device_count():
        pytest.skip(f"NCCL needs a GPU per rank, {world}")
    outcomes, printed = launched(ranks)
    for rank, outcome in enumerate(outcomes):
        assert name in outcome, f"rank {rank} did not get there:\n{printed}"
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"
