"""The package installs and imports where a compiler, the extension, Triton or a GPU is missing.

setup.py decides what is built from the environment that it is given, so most tests hand it one that is made
up.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.programs import ROOT, run_python
from torch.utils import cpp_extension


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, with the repository as the working directory, as in a build."""
    monkeypatch.chdir(ROOT)
    # registered here so that monkeypatch undoes what build_options sets
    monkeypatch.setenv("CXX", os.environ.get("CXX", ""))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    for name in ("CUDA_HOME", "_check_cuda_version"):
        monkeypatch.setattr(cpp_extension, name, getattr(cpp_extension, name))
    spec = importlib.util.spec_from_file_location("cges_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_path(tmp_path):
    """A PATH with one executable, called clang++, which must not run."""
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    return str(tmp_path)


def test_no_compiler_means_no_extension_and_one_line(build, tmp_path, capsys):
    """Without a compiler the package is pure Python, and one warning says so."""
    assert build.build_options({"PATH": str(tmp_path), "CXX": "no-such-compiler"}) == {}
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "warning" in warning and "C++" in warning


def test_compiler_choice(build, fake_path):
    """CXX is taken if it exists, with its arguments; otherwise a compiler on PATH."""
    assert build.find_compiler({"PATH": fake_path}) == "clang++"
    assert build.find_compiler({"PATH": fake_path, "CXX": "no-such-compiler"}) == "clang++"
    wrapped = "clang++ --driver-mode=g++"
    assert build.find_compiler({"PATH": fake_path, "CXX": wrapped}) == wrapped


def test_extension_can_be_left_out_silently(build, fake_path, capsys):
    """CGES_EXT=0 leaves the extension out without a warning."""
    assert build.build_options({"PATH": fake_path, "CGES_EXT": "0"}) == {}
    assert capsys.readouterr().err == ""


def test_extension_flags(build, fake_path):
    """The extension is compiled and linked with OpenMP, for any machine, and without fast-math."""
    (extension,) = build.build_options({"PATH": fake_path})["ext_modules"]
    flags = extension.extra_compile_args["cxx"]
    assert extension.name == "cges_kernels.backends._C"
    assert "csrc/bindings.cpp" in extension.sources
    assert "-fopenmp" in flags and "-fopenmp" in extension.extra_link_args
    assert not {"-march=native", "-ffast-math", "-Ofast"} & set(flags)


def fake_toolkit(folder, release):
    """A CUDA toolkit whose nvcc can only tell its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return str(folder)


def test_cuda_is_built_wherever_nvcc_is(build, fake_path, tmp_path):
    """nvcc alone decides whether the CUDA executor is built, not a GPU; CGES_CUDA=0 leaves it out."""
    home = fake_toolkit(tmp_path / "cuda", "13.0")
    (extension,) = build.build_options({"PATH": fake_path, "CUDA_HOME": home})["ext_modules"]
    assert {"csrc/cuda/launch.cu", "csrc/cuda/cut.cpp", "csrc/plan/cuda_executor.cpp"} <= set(
        extension.sources
    )
    assert ("CGES_CUDA", "1") in extension.define_macros
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0 9.0 10.0+PTX"
    assert f"{home}/lib64/libcudart_static.a" in extension.extra_link_args
    (extension,) = build.build_options({"PATH": fake_path, "CUDA_HOME": home, "CGES_CUDA": "0"})[
        "ext_modules"
    ]
    assert not [source for source in extension.sources if "cuda" in source]
    assert ("CGES_CUDA", "0") in extension.define_macros


def test_the_architectures_are_the_users_choice(build, fake_path, tmp_path, monkeypatch):
    """A TORCH_CUDA_ARCH_LIST that the user has set is kept."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build.build_options({"PATH": fake_path, "CUDA_HOME": fake_toolkit(tmp_path / "cuda", "12.8")})
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"


@pytest.mark.parametrize(
    ["torchs", "is_asked"], [(None, True), ("13.2", True), ("12.8", False)], ids=["cpu", "same", "other"]
)
def test_torch_asks_for_its_own_cuda_but_not_where_only_that_would_stop_the_build(
    build, fake_path, tmp_path, monkeypatch, torchs, is_asked
):
    """torch's check of nvcc's version stays where it would not stop the build.

    It is dropped where nvcc has another major version than torch's CUDA.
    """
    monkeypatch.setattr(torch.version, "cuda", torchs)
    asks = cpp_extension._check_cuda_version
    build.build_options({"PATH": fake_path, "CUDA_HOME": fake_toolkit(tmp_path / "cuda", "13.0")})
    assert (cpp_extension._check_cuda_version is asks) == is_asked


def test_cuda_that_is_demanded_and_not_there_is_an_error(build, fake_path, tmp_path, monkeypatch):
    """CGES_CUDA=1 without a recent nvcc stops the build; without the demand CUDA is left out."""
    monkeypatch.setattr(build, "CUDA_FOLDER", str(tmp_path / "nowhere"))
    demanded = {"PATH": fake_path, "CGES_CUDA": "1"}
    with pytest.raises(SystemExit, match=r"expected nvcc >= 12\.8, found none on PATH"):
        build.build_options(demanded)
    old = fake_toolkit(tmp_path / "old", "12.4")
    with pytest.raises(SystemExit, match=r"expected nvcc >= 12\.8, found 12\.4"):
        build.build_options({**demanded, "CUDA_HOME": old})
    (extension,) = build.build_options({"PATH": fake_path, "CUDA_HOME": old})["ext_modules"]
    assert ("CGES_CUDA", "0") in extension.define_macros


def test_build_without_torch_says_what_to_do(build, fake_path, monkeypatch):
    """A build without torch tells how to install without build isolation."""
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    with pytest.raises(SystemExit, match="pip install --no-build-isolation"):
        build.build_options({"PATH": fake_path})


def test_import_is_light():
    """Importing the package loads no optional library and does not initialise CUDA."""
    run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import cges_kernels\n"
        "cges_kernels.available_backends()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'triton', 'sklearn', 'matplotlib', 'cvxpy'}, new\n"
        "assert not torch.cuda.is_initialized()\n",
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ["found", "version"],
    [("return '7.8.9'", "7.8.9"), ("raise metadata.PackageNotFoundError", "0+unknown")],
    ids=["installed", "checkout"],
)
def test_the_version_is_that_of_the_installed_package(found, version):
    """__version__ is the installed package's, or "0+unknown" in a checkout that is not installed.

    That the installed version is pyproject.toml's is shown in test_wheel.py.
    """
    run_python(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "def made_up(name):\n"
        "    if name != 'cges_kernels':\n"
        "        return real(name)\n"
        f"    {found}\n"
        "metadata.version = made_up\n"
        "import cges_kernels\n"
        f"assert cges_kernels.__version__ == {version!r}, cges_kernels.__version__\n",
        cwd=ROOT,
    )


def test_works_without_the_extension():
    """Where the extension cannot be imported, the reference serves."""
    run_python(
        "import sys\n"
        "sys.modules['cges_kernels.backends._C'] = None\n"
        "import torch, cges_kernels\n"
        "backends = cges_kernels.available_backends()\n"
        "assert 'reference' in backends and 'cpu' not in backends, backends\n"
        "w = cges_kernels.prox(torch.tensor([[2.0, -0.25]]), l1=0.5)\n"
        "assert w.tolist() == [[1.5, 0.0]], w\n",
        cwd=ROOT,
    )


@pytest.mark.full("a whole pip install works; the first tier checks only what setup.py would build")
def test_pip_install_without_the_extension(tmp_path):
    """pip installs the package without a compiler, typed and without binaries, and it runs from there."""
    pytest.importorskip("pip")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "cges_kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run(
        [*command, "--target", str(target), str(source)],
        env={**os.environ, "CGES_EXT": "0"},
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert (target / "cges_kernels" / "py.typed").exists()
    assert not list(target.glob("cges_kernels/**/*.so"))
    out = run_python(
        "import cges_kernels\n"
        "assert 'reference' in cges_kernels.available_backends()\n"
        "print(cges_kernels.__file__)\n",
        cwd=tmp_path,
        PYTHONPATH=str(target),
    )
    assert Path(out.strip()).is_relative_to(target)
