"""Installs packages as `pip install` does, by uv where it can be had: pip alone takes three times as long.

python tools/install.py REQUIREMENT...

uv is told where pip's configuration says that packages are. Where uv itself cannot be installed, or fails,
pip installs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
UV = "uv>=0.5"
# What pip calls a setting, and the variable from which uv reads it. Several stand between spaces, of uv's
# directories between commas.
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}


def settings(listed: Iterable[str]) -> dict[str, str]:
    """uv's variables for the lines of `pip config list`, such as `global.index-url='https://...'`. Of a
    setting that stands there twice the one from the environment holds, as for pip."""
    found: dict[str, str] = {}
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        variable = VARIABLES.get(name.rpartition(".")[2])
        if variable:
            words = value.strip().strip("'\"").replace("\\n", " ").split()
            found[variable] = (",".join if variable == "UV_FIND_LINKS" else " ".join)(words)
    if "UV_INDEX" in found:
        # pip takes the best of all indexes, uv by itself that of the first.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def by_uv(arguments: list[str]) -> bool:
    """Whether uv has installed them."""
    if subprocess.run([*PIP, "install", "--quiet", UV], check=False).returncode:
        return False
    listed = subprocess.run([*PIP, "config", "list"], check=True, capture_output=True, text=True).stdout
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, *arguments]
    return (
        subprocess.run(command, env={**settings(listed.splitlines()), **os.environ}, check=False).returncode
        == 0
    )


def main() -> int:
    """Runs the command line."""
    arguments = sys.argv[1:]
    if by_uv(arguments):
        return 0
    print("uv could not install: pip does", file=sys.stderr)
    return subprocess.run([*PIP, "install", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
