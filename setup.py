"""Build of the C++ extension `cges_kernels.backends._C`; all other metadata is in pyproject.toml.

The package also works without the extension, so a machine without a C++ compiler gets a one-line warning.
A compiler that exists but fails is an error. CGES_EXT=0 leaves the extension out.

The extension contains the CUDA executor wherever nvcc is found, even if the installed torch is for the CPU
alone. Whether the executor can run is found out when it is used. CGES_CUDA=0 leaves it out, CGES_CUDA=1
demands it. TORCH_CUDA_ARCH_LIST names the GPUs to build for, as for torch's own extensions.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup

COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",  # torch 2.11's build would take C++17, later ones take this
    "-fopenmp",  # at compile and at link time: without it at::parallel_for silently runs on one thread
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
LINK_FLAGS = ["-fopenmp"]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-lineinfo",
    "--threads=2",
    "-Xcompiler=-fvisibility=hidden",
    # torch's build disables these operators and conversions of the 16-bit types, which the kernels use
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]
ARCHITECTURES = "8.0 9.0 10.0+PTX"  # A100, H100 and H200, B200, and later GPUs through PTX
CUDA_FOLDER = "/usr/local/cuda"  # the usual folder of the toolkit
CUDA_NEEDED = (12, 8)  # the first nvcc for all ARCHITECTURES; kernel arguments of 32 KB came with 12.1

NO_COMPILER = "cges_kernels: warning: no C++ compiler on PATH: installing without the C++ executor"
NO_TORCH = """\
cges_kernels: error: torch cannot be imported; the extension is compiled against the torch it will run with.
Install torch >= 2.11 first, then build in the same environment: pip install --no-build-isolation .
(CGES_EXT=0 installs without the C++ executor.)"""


def find_compiler(env):
    """The C++ compiler command to use, as a string, or None."""
    for command in (env.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0], path=env.get("PATH", "")):
            return command
    return None


def find_cuda(env):
    """The CUDA toolkit's folder, or None: where nvcc is too old or absent, or CGES_CUDA=0."""
    wish = env.get("CGES_CUDA", "")
    if wish == "0":
        return None
    homes = [env.get("CUDA_HOME", ""), env.get("CUDA_PATH", ""), CUDA_FOLDER]
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    if nvcc:  # it may be a script that calls another nvcc, so it is asked for the toolkit's folder
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes[:0] = re.findall(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    found = f"none on PATH, in CUDA_HOME or in {CUDA_FOLDER}"
    for home in filter(None, homes):
        if not os.path.exists(os.path.join(home, "bin", "nvcc")) or cuda_runtime(home) is None:
            continue
        version = nvcc_version(home)
        if version >= CUDA_NEEDED:
            return os.path.realpath(home)
        found = ".".join(map(str, version))
    if wish == "1":
        needed = ".".join(map(str, CUDA_NEEDED))
        raise SystemExit(f"cges_kernels: error: CGES_CUDA=1: expected nvcc >= {needed}, found {found}")
    return None


def nvcc_version(home):
    """The version of a toolkit's nvcc, as (major, minor)."""
    nvcc = os.path.join(home, "bin", "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return tuple(map(int, re.findall(r"release (\d+)\.(\d+)", said)[0]))


def cuda_runtime(home):
    """The path of a toolkit's static runtime library, or None.

    It is linked statically because torch need not have installed the shared one.
    """
    folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    paths = (os.path.join(home, folder, "libcudart_static.a") for folder in folders)
    return next(filter(os.path.exists, paths), None)


def cuda_options(home):
    """(sources, flags for nvcc, libraries to link) that the CUDA executor adds to the extension."""
    import torch
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home  # torch looks for it only where it was itself built with CUDA
    # For every extension with a .cu file, BuildExtension demands the CUDA version that torch was built with.
    # That does not matter here, because the kernels include no header of torch. No option turns it off.
    if torch.version.cuda and int(torch.version.cuda.split(".")[0]) != nvcc_version(home)[0]:
        cpp_extension._check_cuda_version = lambda *_: None
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    drop_stale_objects()
    return glob.glob("csrc/cuda/*.cu"), NVCC_FLAGS, [cuda_runtime(home), "-ldl", "-lrt", "-lpthread"]


def drop_stale_objects():
    """Remove the object files that nvcc made from older headers.

    With a torch for the CPU alone the build records no headers as dependencies of a .cu file.
    """
    newest = max(os.path.getmtime(path) for path in glob.glob("csrc/c*/*.*"))
    for source in glob.glob("csrc/cuda/*.cu"):
        for built in glob.glob(f"build/temp*/{os.path.splitext(source)[0]}.o"):
            if os.path.getmtime(built) < newest:
                os.remove(built)


def build_options(env=os.environ):
    """The keyword arguments of `setup` that concern the extension; {} if none is built."""
    if env.get("CGES_EXT", "1") == "0":
        return {}
    compiler = find_compiler(env)
    if compiler is None:
        print(NO_COMPILER, file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError as error:
        raise SystemExit(f"{NO_TORCH}\nThe import said: {error}") from None
    os.environ["CXX"] = compiler  # torch's build takes $CXX or "c++"

    cuda_home = find_cuda(env)
    sources = {path for path in glob.glob("csrc/**/*.cpp", recursive=True) if cuda_home or "cuda" not in path}
    cuda_sources, nvcc_flags, libraries = cuda_options(cuda_home) if cuda_home else ([], [], [])

    # Included as system headers, torch's and Python's headers give no warnings.
    system_headers = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    extension = CppExtension(
        "cges_kernels.backends._C",
        sorted(sources) + cuda_sources,
        include_dirs=[os.path.abspath("csrc")],
        depends=["setup.py", *sorted(glob.glob("csrc/**/*.*", recursive=True))],
        define_macros=[("CGES_CUDA", str(int(bool(cuda_home))))],
        extra_compile_args={"cxx": COMPILE_FLAGS + system_headers, "nvcc": nvcc_flags},
        extra_link_args=LINK_FLAGS + libraries,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    setup(**build_options())
