"""tools/install.py tells uv what pip is configured to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import install


def test_pips_settings_become_uvs() -> None:
    listed = [
        ":env:.find-links='/opt/wheels'",
        "global.find-links='/usr/share/wheels'",
        "global.index-url='https://packages.example/simple'",
        "global.extra-index-url='file:///one https://two.example/simple'",
        "global.cert='/etc/ssl/ca.pem'",
        "install.constraint='/etc/constraints.txt'",
        "global.no-color='true'",
    ]
    assert install.settings(listed) == {
        "UV_FIND_LINKS": "/opt/wheels",
        "UV_DEFAULT_INDEX": "https://packages.example/simple",
        "UV_INDEX": "file:///one https://two.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/etc/ssl/ca.pem",
        "UV_CONSTRAINT": "/etc/constraints.txt",
    }
    assert install.settings([]) == {}


@pytest.mark.parametrize("works", [False, True])
def test_pip_installs_where_uv_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    calls = tmp_path / "calls"
    pip = f"echo pip $@ >> {calls}; case $@ in *uv*) exit {0 if works else 1};; esac"
    monkeypatch.setattr(install, "PIP", ["sh", "-c", pip, "pip"])
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho python $@ >> {calls}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["install.py", "-e", "."])
    assert install.main() == 0
    last = calls.read_text().splitlines()[-1]
    expected = f"python -m uv pip install --python {python} -e ." if works else "pip install -e ."
    assert last == expected
