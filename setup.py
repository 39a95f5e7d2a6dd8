"""Build of the C++ extension `cges_kernels._C`; all other metadata is in pyproject.toml.

The package also works without the extension, so a machine without a C++ compiler gets a one-line warning.
A compiler that is there and fails is an error. CGES_EXT=0 leaves the extension out.
"""

import glob
import os
import shlex
import shutil
import sys
import sysconfig

from setuptools import setup

COMPILE_FLAGS = [
    "-O3",
    "-fopenmp",  # at compile and at link time: without it at::parallel_for silently runs on one thread
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
LINK_FLAGS = ["-fopenmp"]

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


def build_options(env=os.environ):
    """Keyword arguments of `setup` that concern the extension; {} where there is none to build."""
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

    # As system headers, torch's and Python's own warnings stay out of sight.
    # The language standard is left to BuildExtension, which passes the one torch's headers need.
    system_headers = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    extension = CppExtension(
        "cges_kernels._C",
        sorted(glob.glob("csrc/*.cpp")),
        include_dirs=[os.path.abspath("csrc")],
        depends=["setup.py", *sorted(glob.glob("csrc/*"))],
        extra_compile_args={"cxx": COMPILE_FLAGS + system_headers},
        extra_link_args=LINK_FLAGS,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    setup(**build_options())
