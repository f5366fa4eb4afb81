"""The documentation site is built without a warning, and fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.snippets import ROOT

pytest.importorskip("mkdocs", reason="the site's builder is in the extra `docs`")


def test_the_site_is_whole(tmp_path: Path) -> None:
    """In mkdocs.yml `strict` makes errors of links, anchors and pages that the navigation leaves out."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for source in (ROOT / "docs").glob("**/*.md"):
        page = (tmp_path / source.relative_to(ROOT / "docs")).with_suffix(".html").read_text()
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]*)", page)
        assert fetched == []
        assert "<!-- " not in page.partition("<article")[2].partition("</article")[0]
