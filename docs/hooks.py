"""What mkdocs does beside its plugins: pages and pictures from outside docs/, and links to the sources.

The same Markdown is read in the repository and on the site. In the repository links lead to files anywhere in
it; the site has only its own pages, so here a link to another file becomes its text, and a picture from
elsewhere is copied. A link to nothing stays as it is, and mkdocs refuses it.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import cges_kernels

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {  # of the site, that the repository keeps elsewhere
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "notes.md": "bench/NOTES.md",
}
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCED = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """Refuse to build where a public name has no docstring or is missing from the API reference."""
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: cges_kernels\.(\w+)$", reference, re.MULTILINE))
    if unlisted := set(cges_kernels.__all__) ^ listed:
        raise PluginError(f"docs/api.md: expected each public name once, not so: {sorted(unlisted)}")
    if silent := [name for name, value in public_names() if not inspect.getdoc(value)]:
        raise PluginError(f"expected a docstring for every public name, found none for {silent}")


def public_names() -> Iterator[tuple[str, Any]]:
    """The names of cges_kernels.__all__, and the public members that their classes have from this package."""
    for name in cges_kernels.__all__:
        value = getattr(cges_kernels, name)
        yield name, value
        for owner in value.__mro__ if isinstance(value, type) else ():
            if owner.__module__.startswith("cges_kernels"):
                for member, of in vars(owner).items():
                    if not member.startswith("_") and (callable(of) or isinstance(of, property)):
                        yield f"{name}.{member}", of


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links as they are in the repository into the site's; code is left alone."""
    if re.search(r"<(?:a|img)\b[^>]*\b(?:href|src)=", FENCED.sub("", markdown)):
        raise PluginError(f"{page.file.src_uri}: expected links in Markdown, which are checked, got HTML's")
    source = ROOT / PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {ROOT / repository: site for site, repository in PAGES.items()}

    def to_site(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link["target"]))
        if "://" in link["target"] or not target.exists():
            return link[0]
        uri = pages.get(target) or os.path.relpath(target, DOCS)
        if link["picture"] and uri.startswith(".."):
            uri = f"pictures/{target.relative_to(ROOT).as_posix().replace('/', '-')}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
        found = files.get_file_from_path(uri)
        if found is None or found.inclusion.is_excluded():
            return link["text"]
        here = Path(page.file.src_uri).parent
        return f"{link['picture']}[{link['text']}]({os.path.relpath(uri, here)}{link['anchor'] or ''})"

    parts: list[Any] = []
    end = 0
    for code in FENCED.finditer(markdown):
        parts += [LINK.sub(to_site, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(to_site, markdown[end:])])
