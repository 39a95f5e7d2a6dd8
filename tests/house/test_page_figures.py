"""The figures of the pages: docs/figures.py draws all that pages use, and pages use all that it draws."""

import os
import re
import subprocess
import sys

import pytest
from helpers.programs import ROOT

DOCS = ROOT / "docs"


def figures_used():
    """The figures under docs that some page shows."""
    found = set()
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for link in re.findall(r"[(\"]([^(\"\s]+\.svg)[)\"]", page.read_text()):
            figure = (page.parent / link).resolve()
            if figure.is_relative_to(DOCS):
                found.add(str(figure.relative_to(DOCS)))
    return found


@pytest.mark.full("draws all figures, for one of which small networks are trained")
def test_every_figure_is_drawn_and_used(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    command = [sys.executable, "docs/figures.py", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    drawn, kept = (
        {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.svg")}
        for folder in (tmp_path, DOCS)
    )
    assert drawn.keys() == kept.keys() == figures_used()
    for name, text in drawn.items():
        assert text.count("<path") + text.count("<image") > 5, name
        assert len(text) == pytest.approx(len(kept[name]), rel=0.2), f"{name}: run `python docs/figures.py`"
