"""Runs the cases of test_sharded.py under torchrun: every rank runs all cases for its number of ranks.

    torchrun --nproc_per_node N tests/distributed/sharded_worker.py DIRECTORY DEVICE BACKEND [CASE ...]

with tests/ in PYTHONPATH. DEVICE is cpu or cuda; ranks take the GPUs in turn. BACKEND is torch.distributed's.
Each rank writes DIRECTORY/rank<r>.json: for each case what went wrong, or null.
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_cases import adamw, contract, matrix, models, overflow, steps, travel, views  # noqa: F401, they add cases
from sharded_cases.common import CASES, gathered

HANGS_AFTER = timedelta(seconds=45)


def main(directory, device, backend, *names):
    """Runs the named cases, or all, and writes what went wrong after each."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.init()  # otherwise a mesh would choose a device by LOCAL_RANK only
        torch.set_default_device("cuda")
    dist.init_process_group(backend, timeout=HANGS_AFTER)
    torch.set_num_threads(1)
    results, file = {}, Path(directory) / f"rank{dist.get_rank()}.json"
    cases = CASES[dist.get_world_size()]
    for name in names or cases:
        torch.manual_seed(len(name))
        error = None
        try:
            cases[name]()
        except Exception:
            error = traceback.format_exc()
        results[name] = f"not all ranks finished it; here: {error}"
        file.write_text(json.dumps(results))
        results[name] = "\n".join(filter(None, gathered(error))) or None  # fails if ranks are out of step
        file.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
