"""Models from ModelScope, by the two requests of its HTTP API that this takes: list files, get a file.

Its own library is not used: it draws bars that cannot be turned off, and asks where in which cloud it runs.
Its cache is: a model that modelscope or ms-swift has fetched is served from there.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

from pagewire.base.errors import ConfigError
from pagewire.hub.fetch.transfer import (
    HubRefused,
    HubUnreachable,
    RemoteFile,
    bytes_to_fetch,
    fetch_files,
    open_url,
)
from pagewire.hub.names.reference import HUB_TITLES, MODELSCOPE
from pagewire.hub.progress import Advance

_ENDPOINT = "https://modelscope.cn"
_MAX_LISTING_BYTES = 32 * 1024**2
# As many entries as a listing has at most; more are left out silently.
_MAX_ENTRIES = 3000
# Of smaller files the content is compared with the hub's, of larger ones the size.
_SMALL = 1024**2


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file in a listing."""

    size: int
    sha256: str | None


class ModelScopeRepository:
    """A Repository on ModelScope."""

    hub_title = HUB_TITLES[MODELSCOPE]

    def __init__(self, name: str, revision: str | None, cache: Path) -> None:
        """
        Args:
            cache: of ours, in the layout of modelscope's.
        """
        self.name = name
        self._revision = revision or "master"
        self.directory = cache / "models" / name.replace("/", "--")
        self._snapshot = self.directory / "snapshots" / self._revision.replace("/", "--")
        self._entries: dict[str, _Entry] = {}

    def list_files(self) -> Mapping[str, int]:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise HubUnreachable("HF_HUB_OFFLINE forbids it")
        files = self._ask_for_files()
        if len(files) >= _MAX_ENTRIES:
            raise ConfigError(f"{self.name}: has more files than ModelScope lists")
        self._entries = {path: entry for path, entry in map(_entry, files) if path}
        return {path: entry.size for path, entry in self._entries.items()}

    def missing_bytes(self, names: Collection[str]) -> int:
        stale = sum(self._entries[name].size for name in self._stale(names))
        return stale + bytes_to_fetch(self._remote_files(names))

    def fetch(self, names: Collection[str], advance: Advance) -> Path:
        for name in self._stale(names):
            (self._snapshot / name).unlink()
        try:
            fetch_files(self._remote_files(names), advance)
        except HubRefused as error:
            raise self._refusal(error) from error
        return self._snapshot

    def cached(self) -> Path | None:
        return self._snapshot if self._snapshot.is_dir() else None

    def _ask_for_files(self) -> list[Any]:
        query = urlencode({"Revision": self._revision, "Recursive": "true"})
        url = f"{_endpoint()}/api/v1/models/{quote(self.name)}/repo/files?{query}"
        try:
            with open_url(url, _authorization()) as response:
                answer = json.loads(response.read(_MAX_LISTING_BYTES))
                files = answer["Data"]["Files"]
        except HubRefused as error:
            if error.status >= http.client.INTERNAL_SERVER_ERROR:
                raise HubUnreachable(str(error)) from error
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise HubUnreachable(str(error)) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{url}: the answer is no list of files: {error!r}") from error
        if not isinstance(files, list):
            raise ConfigError(f"{url}: the answer is no list of files")
        return files

    def _refusal(self, error: HubRefused) -> ConfigError:
        if error.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
            return ConfigError(
                f"{self.name}: may not be read (status {error.status}); accept its terms on ModelScope if it "
                "has some, and set MODELSCOPE_API_TOKEN to the token of an account that may read it"
            )
        if error.status == http.client.NOT_FOUND:
            return ConfigError(
                f"{self.name}: no such model on ModelScope, or it has no revision {self._revision!r}"
            )
        return ConfigError(f"{self.name}: ModelScope refuses: {error}")

    def _remote_files(self, names: Collection[str]) -> list[RemoteFile]:
        return [self._remote_file(name, self._entries[name]) for name in names]

    def _remote_file(self, name: str, entry: _Entry) -> RemoteFile:
        query = urlencode({"Revision": self._revision, "FilePath": name})
        return RemoteFile(
            url=f"{_endpoint()}/api/v1/models/{quote(self.name)}/repo?{query}",
            target=self._snapshot / name,
            size=entry.size,
            sha256=entry.sha256,
            headers=_authorization(),
        )

    def _stale(self, names: Collection[str]) -> list[str]:
        """Those whose content on disk is not the hub's any more: a branch may have moved on."""
        on_disk = [name for name in names if (self._snapshot / name).is_file()]
        return [name for name in on_disk if not _is_same(self._snapshot / name, self._entries[name])]


def cached_by_modelscope(name: str, revision: str | None) -> Path | None:
    """The directory into which modelscope's library, in any of its versions, has fetched a model.

    Versions before 1.38 write "___" for a dot in the name and keep one revision.
    """
    owner, _, own_name = name.partition("/")
    base = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
    folders = [base / "models" / f"{owner}--{own_name}" / "snapshots" / (revision or "master")]
    if revision is None:
        old = Path(owner, own_name.replace(".", "___"))
        folders += [base / parent / old for parent in ("models", "hub/models", "hub", "")]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _entry(file: Any) -> tuple[str, _Entry]:
    """A file's path and what is said of it; an empty path for anything else.

    Raises:
        ConfigError: it would lie outside the model's directory.
    """
    if not isinstance(file, dict) or file.get("Type") == "tree" or not isinstance(file.get("Path"), str):
        return "", _Entry(0, None)
    path, size, sha256 = file["Path"], file.get("Size"), file.get("Sha256")
    parts = PurePosixPath(path).parts
    if PurePosixPath(path).is_absolute() or ".." in parts or "\0" in path:
        raise ConfigError(f"ModelScope lists {path!r}, which would lie outside the model's directory")
    return path, _Entry(
        size if isinstance(size, int) else 0, sha256 if isinstance(sha256, str) and sha256 else None
    )


def _is_same(path: Path, entry: _Entry) -> bool:
    if path.stat().st_size != entry.size:
        return False
    if entry.sha256 is None or entry.size > _SMALL:
        return True
    return hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256.lower()


def _endpoint() -> str:
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or _ENDPOINT
    return (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")


def _authorization() -> dict[str, str]:
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
