"""What MkDocs does for our site besides its own: mkdocs.yml names this file as a hook.

The pages in docs/ are read in the repository too, where they link to files outside docs/. Such files become
part of the site: the documents of the repository's root as pages, others, such as records of benchmarks, as
they are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "operations/security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the site by what they are in the repository."""

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_MARK = re.compile(r"^<!-- .* -->\n(?=```)", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the repository's root, and every file outside docs/ that a page links to."""
    for name, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text()))
    pages = [file for file in files if file.is_documentation_page()]
    for page in pages:
        for _, target, _ in _LINK.findall(page.content_string):
            path = _in_repository(target, page.src_uri)
            if path is None or path.startswith("docs/") or path in ROOT_PAGES:
                continue
            uri = f"repository/{path}"
            if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Has links lead to where their targets are in the site, and leaves out the marks that say how snippets
    are tested (tests/e2e/snippets.py)."""

    def rewrite(link: re.Match[str]) -> str:
        path = _in_repository(link[2], page.file.src_uri)
        if path is None:
            return link[0]
        if path.startswith("docs/"):
            uri = path.removeprefix("docs/")
        else:
            uri = ROOT_PAGES.get(path, f"repository/{path}")
        return link[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + link[3]

    return _LINK.sub(rewrite, _MARK.sub("", markdown))


def _in_repository(target: str, page: str) -> str | None:
    """The path in the repository that a link of a page leads to; None if it leads elsewhere."""
    if ":" in target or target.startswith("/"):
        return None
    at_root = {uri: name for name, uri in ROOT_PAGES.items()}
    source = at_root.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
