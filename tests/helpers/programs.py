"""The repository's folder, and Python programs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The PYTHONPATH for a process that imports the package, bench and these helpers, installed or not.
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


def run_python(code, cwd, **env):
    """Runs code in a new process, which must succeed, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
