"""`make wheel`: what the sdist and the wheel hold, and that wheels work where they are installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.programs import ROOT

VERSION = "7.8.9"  # the version given to the copy that is built
PIP_OPTIONS = ("--no-index", "--no-deps", "--disable-pip-version-check")
LEFT_HERE = (".*", "build", "dist", "__pycache__", "*.egg-info", "*.so", "*_out")

pytestmark = [
    pytest.mark.full(
        "the sdist and the wheels hold the right files and work when installed; they take long to build"
    ),
    pytest.mark.xdist_group("wheel"),
]

# Run by the Python of the environment in which the wheel is installed.
PROBE = """\
import json, sys
sys.modules["triton"] = None  # as where it is not installed
import torch, cges_kernels

def stepped(backend):
    w = torch.nn.Parameter(torch.tensor([[3.0, -0.25], [1.0, 0.5]]))
    optimizer = cges_kernels.ProxSGD([w], lr=1.0, l1=0.5, backend=backend)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    return w.tolist()

def answer(backend):
    try:
        return stepped(backend)
    except RuntimeError as error:
        return str(error)

print(json.dumps({
    "file": cges_kernels.__file__,
    "version": cges_kernels.__version__,
    "backends": cges_kernels.available_backends(),
    "answers": {name: answer(name) for name in ("auto", "cpu", "triton", "cuda")},
}))
"""
STEPPED = [[2.5, 0.0], [0.5, 0.0]]


def run(*command, cwd, **env):
    """Runs a command, which must succeed, and returns what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with what `make wheel` built from a copy of the repository, without the extension."""
    # `build` alone may be found as the repository's folder of that name
    pytest.importorskip("build.__main__")
    if shutil.which("make") is None:
        pytest.skip("needs make")
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_HERE))
    pyproject = copy / "pyproject.toml"
    text, count = re.subn(r'^version = ".*"$', f'version = "{VERSION}"', pyproject.read_text(), flags=re.M)
    assert count == 1
    pyproject.write_text(text)
    # Leftovers that a checkout holds after builds and tests.
    for name in (
        "cges_kernels/backends/_C.so",
        "tests/cuda_emulator/plain.so",
        "tests/cuda_emulator/emulator.o",
    ):
        (copy / name).touch()
    (copy / "build" / "emulated").mkdir(parents=True)
    (copy / "build" / "emulated" / "plain.so").touch()
    run("make", "wheel", f"PY={sys.executable}", cwd=copy, CGES_EXT="0", MAKEFLAGS="")
    return copy / "dist"


def probe(wheel, folder):
    """The output of PROBE in a virtual environment with this wheel, which finds torch in the present one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *PIP_OPTIONS, wheel, cwd=folder)
    # A folder named in a .pth file has its own .pth files ignored. That keeps an editable install out.
    (packages,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("-packages")]
    (packages / "here.pth").write_text("\n".join(here))
    found = json.loads(run(python, "-c", PROBE, cwd=folder))
    assert Path(found["file"]).is_relative_to(folder)
    assert found["version"] == VERSION
    return found


@pytest.fixture(scope="module")
def probed(dist, tmp_path_factory):
    """The output of PROBE for the wheel without the extension."""
    (wheel,) = dist.glob("*.whl")
    return probe(wheel, tmp_path_factory.mktemp("installed"))


def names_in(wheel):
    """The names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def test_the_sdist_has_what_a_build_needs_and_nothing_that_was_built(dist):
    """The sdist holds all sources and build files, and no objects or hidden files."""
    (path,) = dist.glob("*.tar.gz")
    assert path.name == f"cges_kernels-{VERSION}.tar.gz"
    with tarfile.open(path) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    sources = {str(source.relative_to(ROOT)) for source in (ROOT / "csrc").rglob("*.*")}
    assert {Path(name).suffix for name in sources} >= {".cpp", ".h", ".inc", ".cu", ".cuh"}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile"}
    needed |= {"mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md", "bench/results/cpu-xeon.json"}
    assert not (sources | needed | {"cges_kernels/py.typed", "examples/demo/cli.py"}) - names
    unwanted = ("build/", "dist/", ".")
    assert not [name for name in names if name.startswith(unwanted) and name != ".clang-format"]
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    """Only the package and its metadata are installed, and all of its modules are."""
    (path,) = dist.glob("*.whl")
    names = names_in(path)
    info = f"cges_kernels-{VERSION}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"cges_kernels", info}
    package = ROOT / "cges_kernels"
    modules = {str(module.relative_to(ROOT)) for module in package.rglob("*.py")}
    assert {name for name in names if not name.startswith(info)} == modules | {"cges_kernels/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_an_installed_wheel_takes_a_step(probed):
    """Without the extension and Triton, the reference serves and steps correctly."""
    assert probed["backends"] == ["reference"]
    assert probed["answers"]["auto"] == STEPPED


def test_a_wheel_with_the_extension_takes_a_step_with_it(dist, tmp_path):
    """A wheel built from the sdist with the extension, for the CPU only, serves and steps correctly."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    (sdist,) = dist.glob("*.tar.gz")
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    options = ("--no-build-isolation", *PIP_OPTIONS, "--wheel-dir", tmp_path)
    env = {"CGES_EXT": "1", "CGES_CUDA": "0", "PATH": here}
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=tmp_path, **env)
    (wheel,) = tmp_path.glob("*.whl")
    (extra,) = (name for name in names_in(wheel) if name.endswith(".so"))
    assert extra.startswith("cges_kernels/backends/_C.")
    found = probe(wheel, tmp_path / "installed")
    assert found["backends"] == ["reference", "cpu"]
    assert found["answers"]["cpu"] == STEPPED


@pytest.mark.parametrize(
    ["missing", "cure"],
    [
        ("cpu", r"install a C\+\+ compiler and reinstall cges_kernels"),
        ("triton", "pip install triton"),
        ("cuda", r"install nvcc \(CUDA >= 12\.8\) and reinstall cges_kernels"),
    ],
)
def test_a_backend_that_a_wheel_lacks_says_how_to_get_it(probed, missing, cure):
    """Asking for a missing executor is an error that says what to install."""
    assert re.fullmatch(f"backend='{missing}' cannot serve: .*{cure}", probed["answers"][missing])
