"""The example scripts that users copy from, as modules and as commands; and the code that pages show."""

import importlib.util
import os
import re
import subprocess
import sys

from helpers.programs import PATHS, ROOT, run_python
from helpers.vision import torchvision

EXAMPLES = ROOT / "examples"


def script(name):
    """The script as a module, whose main function has not run."""
    torchvision()  # before what imports it
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, *arguments, cwd):
    """The output of ``python examples/NAME.py ARGUMENTS``, after helpers.vision has imported torchvision."""
    argv = [str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    code = (
        "import runpy, sys; from helpers.vision import torchvision; torchvision(); "
        f"sys.argv = {argv!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return run_python(code, cwd, PYTHONPATH=PATHS, OMP_NUM_THREADS="1")


def torchrun(processes, name, *arguments, cwd, limit=170):
    """The output of ``torchrun --nproc_per_node PROCESSES examples/NAME.py ARGUMENTS``."""
    command = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    done = subprocess.run(
        [sys.executable, *command, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def code_blocks(page):
    """The Python code of a page under docs/, apart from the files that it includes."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [block for block in blocks if not block.startswith("--8<--")]
