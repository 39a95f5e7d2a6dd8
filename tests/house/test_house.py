"""The repository's structure: which part may import which, and that C++ and Python agree."""

import ast
import graphlib
import re
import shutil
import subprocess

import pytest
from helpers.programs import ROOT
from helpers.right import INTERPRETED

from cges_kernels.backends.extension import BUILT
from cges_kernels.core.hyperparameters import Hyperparameters, Phase
from cges_kernels.core.rules import RULES, STEP
from cges_kernels.core.shrinkage import MAX_SWEEPS, SORTED

PACKAGE = ROOT / "cges_kernels"
CSRC = ROOT / "csrc"

# Each room, a folder or module of the package, and the other rooms that it may import from.
ROOMS = {
    "core": set(),
    "backends": {"core"},
    "distributed": {"core", "backends"},
    "functional": {"core", "backends"},
    "proximal": {"core", "backends", "distributed"},
    "optimizer": {"core", "proximal"},
    "training": {"core"},
    "reporting": {"core", "training"},
    "compaction": {"core", "reporting"},
}
INCLUDES = {
    "common": set(),
    "cpu": {"common"},
    "cuda": {"common"},
    "plan": {"common", "cpu", "cuda"},
    "bindings.cpp": {"common", "cpu", "cuda", "plan"},
}


def modules():
    """Each module of a room by its dotted name, such as core.groups; a package stands for its __init__.py."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: PACKAGE / path for name, path in names.items() if name.split(".")[0] in ROOMS}


def imports(name, path, known):
    """The modules of this package that a module imports, including imports within functions and for types."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and node.id in ("import_module", "__import__"):
            assert name == "backends.extension", f"{name}: expected an import statement, got {node.id}"
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("cges_kernels") for alias in node.names), f"{name}: absolute"
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level or not (node.module or "").startswith("cges_kernels"), f"{name}: absolute"
        if node.level:
            base = here[: len(here) - node.level + 1] + (node.module or "").split(".")
            base = ".".join(filter(None, base))
            for alias in node.names:
                within = f"{base}.{alias.name}".lstrip(".")
                yield within if within in known else base


def graph(files):
    """{module: the other modules that it imports}."""
    return {name: set(imports(name, path, files)) - {name} for name, path in files.items()}


def test_every_file_of_the_package_is_in_a_room():
    """A new file or folder of the package has to be added to ROOMS, and so to the rules."""
    rest = {path.name for path in PACKAGE.iterdir()} - {f"{room}.py" for room in ROOMS} - set(ROOMS)
    assert rest - {"__pycache__"} == {"__init__.py", "py.typed"}


def test_imports_go_one_way():
    """Each room imports from exactly the rooms in ROOMS: no other, and no permission is left unused."""
    found = {room: set() for room in ROOMS}
    for name, others in graph(modules()).items():
        found[name.split(".")[0]] |= {other.split(".")[0] for other in others}
    assert {room: others - {room} for room, others in found.items()} == ROOMS


def test_nothing_but_tests_imports_examples():
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "bench").rglob("*.py")):
        assert not re.search(r"^ *(from|import) examples\b", path.read_text(), re.MULTILINE), path


def test_imports_have_no_circles():
    """No module imports itself by way of others."""
    found = graph(modules())
    assert found["backends.planner"] >= {"core.checks", "backends.plan", "backends.registry"}
    assert "distributed.sharded" in found["proximal"]  # imported within a function
    tuple(graphlib.TopologicalSorter(found).static_order())


def test_test_modules_import_helpers_and_not_each_other():
    """Test modules share code through helpers only, and no two have the same name."""
    paths = list((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in paths if path.stem.startswith("test_")}
    assert len(tests) == sum(
        path.stem.startswith("test_") for path in paths
    )  # pytest tells modules of different folders apart by name alone
    for path in paths:
        found = set(re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        assert not found & tests, path


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU products are of the first tier")
def test_the_first_tier_stays_one_that_people_run(request):
    """The first tier has at most 3000 cases, so that it stays a matter of minutes."""
    if request.config.option.markexpr == "not full":
        assert len(request.session.items) <= 3000


def test_circles_and_wrong_ways_are_seen(tmp_path):
    """The checks above notice a circle, an import in a function, a relative import and import_module."""
    for name, text in (("a", "from .b import x"), ("b", "def f():\n    from . import a")):
        (tmp_path / f"{name}.py").write_text(text)
    files = {f"core.{name}": tmp_path / f"{name}.py" for name in "ab"}
    assert graph(files) == {"core.a": {"core.b"}, "core.b": {"core.a"}}
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(graph(files)).static_order())
    (tmp_path / "a.py").write_text("from ..backends.planner import Planner")
    assert graph(files)["core.a"] == {"backends.planner"}
    (tmp_path / "a.py").write_text("import_module('cges_kernels.backends')")
    with pytest.raises(AssertionError, match="expected an import statement"):
        graph(files)


def test_includes_go_one_way():
    """Each folder of csrc includes from exactly those in INCLUDES, and kernels include no torch."""
    files = [path for path in CSRC.rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".inc")]
    assert len(files) > 20
    found = {room: set() for room in INCLUDES}
    for path in files:
        room = path.relative_to(CSRC).parts[0]
        for quote, name in re.findall(
            r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)', path.read_text(), re.MULTILINE
        ):
            if quote == '"':
                assert (CSRC / name).is_file() and ".." not in name, f"{path}: {name}"
                found[room].add(name.split("/")[0])
            else:
                assert name.split("/")[0] not in INCLUDES, f"{path}: {name}"
            if room in ("common", "cuda"):  # these are compiled by nvcc and by the tests, without torch
                assert not re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", name), f"{path}: {name}"
    assert {room: others - {room} for room, others in found.items()} == INCLUDES


def test_the_design_pages_name_files_that_exist():
    """Every file that a design page names in backquotes is there."""
    pages = list((ROOT / "docs" / "design").glob("*.md"))
    assert len(pages) > 1
    link = r"\[[^\]]*\]\(([^)#:]+)\)"
    folders = (ROOT, CSRC, PACKAGE, CSRC / "cuda", PACKAGE / "backends" / "triton")
    for page in pages:
        text = page.read_text()
        linked = re.findall(link, text)
        assert linked
        for name in linked:
            assert (page.parent / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`([\w/.-]+\.(?:py|h|cuh|cpp|cu|inc|md))`", re.sub(link, "", text)):
            assert any((folder / name).is_file() for folder in folders), f"{page.name}: {name}"


@pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")
def test_c_plus_plus_and_python_say_the_same():
    """Enums, constants, states and options that both languages hold have the same names and values."""
    assert BUILT["cpu"].phases == {phase.name: int(phase) for phase in Phase}
    assert BUILT["cpu"].max_sweeps == MAX_SWEEPS and BUILT["cpu"].sorted == SORTED
    assert BUILT["cpu"].states == {name: list(rule.states) for name, rule in RULES.items()}
    assert BUILT["cpu"].step_name == STEP
    assert BUILT["cpu"].options == {name: list(rule.options) for name, rule in RULES.items()}
    assert tuple(BUILT["cpu"].fields) == Hyperparameters._fields


@pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_extension_has_no_output_streams():
    """No C++ output stream is in the extension.

    Where a toolchain links the C++ library statically, the first use of one crashes; see common/text.h.
    """
    listing = subprocess.run(["nm", "-C", BUILT["cpu"].__file__], capture_output=True, text=True, check=True)
    symbols = listing.stdout.splitlines()
    assert any("cges::StepPlan::gather" in x for x in symbols)
    assert not [x for x in symbols if re.search(r"basic_(o|io)?(string)?stream", x)]
