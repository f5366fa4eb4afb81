"""Models from the Hugging Face Hub, or from a server that speaks its API (HF_ENDPOINT).

huggingface_hub asks the hub, and keeps the cache in its own layout, which other programs read too:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache. The bytes of large files are fetched by
transfer.py, because huggingface_hub 2 begins a file anew after it was interrupted.
"""

from __future__ import annotations

import glob
import http.client
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pagewire.base.errors import ConfigError
from pagewire.hub.fetch.transfer import HubRefused, HubUnreachable, RemoteFile, bytes_to_fetch, fetch_files
from pagewire.hub.names.reference import HUB_TITLES, HUGGINGFACE
from pagewire.hub.progress import Advance

_SHA256 = re.compile("[0-9a-f]{64}")


class HuggingFaceRepository:
    """A Repository on the Hugging Face Hub."""

    hub_title = HUB_TITLES[HUGGINGFACE]

    def __init__(self, name: str, revision: str | None, cache: Path) -> None:
        """Where another program has fetched something of the model into Hugging Face's own cache, that is
        used.

        Args:
            cache: of ours, in the layout of Hugging Face's.
        """
        from huggingface_hub.constants import HF_HUB_CACHE  # slow to import, and most models are local

        self.name = name
        self._revision = revision or "main"
        folder = f"models--{name.replace('/', '--')}"
        theirs = Path(HF_HUB_CACHE)
        self._cache = cache if (cache / folder).is_dir() or not (theirs / folder).is_dir() else theirs
        self.directory = self._cache / folder
        self._snapshot = self.directory
        self._sizes: Mapping[str, int] = {}
        self._large: Mapping[str, RemoteFile] = {}

    def list_files(self) -> Mapping[str, int]:
        from huggingface_hub import HfApi

        with _as_our_errors(self.name, self._revision):
            info = HfApi().model_info(self.name, revision=self._revision, files_metadata=True)
        self._snapshot = self.directory / "snapshots" / (info.sha or "")
        siblings = info.siblings or ()
        self._sizes = {file.rfilename: file.size or 0 for file in siblings}
        self._large = {
            file.rfilename: self._remote_file(file.rfilename, info.sha, file.lfs.size, file.lfs.sha256)
            for file in siblings
            if file.lfs is not None
        }
        return self._sizes

    def missing_bytes(self, names: Collection[str]) -> int:
        missing = self._missing(names)
        large = [self._large[name] for name in missing if name in self._large]
        return bytes_to_fetch(large) + sum(self._sizes[name] for name in missing if name not in self._large)

    def fetch(self, names: Collection[str], advance: Advance) -> Path:
        from huggingface_hub import snapshot_download

        large = [self._large[name] for name in self._missing(names) if name in self._large]
        try:
            fetch_files(large, advance)
        except HubRefused as error:
            if error.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
                raise _gated(self.name) from error
            raise
        with _as_our_errors(self.name, self._revision), _no_bars():
            # The user says which model; `names` are weights and settings, never code.
            snapshot = snapshot_download(
                self.name,
                revision=self._revision,
                cache_dir=self._cache,
                allow_patterns=[glob.escape(name) for name in names],
            )
        return Path(snapshot)

    def cached(self) -> Path | None:
        reference = self.directory / "refs" / self._revision
        commit = reference.read_text().strip() if reference.is_file() else self._revision
        snapshot = self.directory / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None

    def _missing(self, names: Collection[str]) -> list[str]:
        return [name for name in names if not (self._snapshot / name).exists()]

    def _remote_file(self, name: str, commit: str | None, size: int, sha256: str) -> RemoteFile:
        """A file in the hub's storage of large files. It goes to where huggingface_hub will look for it: the
        blob that has the file's ETag for a name, which is the hash of its content."""
        from huggingface_hub import get_token, hf_hub_url

        if not _SHA256.fullmatch(sha256):
            raise ConfigError(f"{self.name}: the hub says that the sha256 of {name!r} is {sha256!r}")
        token = get_token()
        return RemoteFile(
            url=hf_hub_url(self.name, name, revision=commit),
            target=self.directory / "blobs" / sha256,
            size=size,
            sha256=sha256,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )


@contextmanager
def _as_our_errors(model: str, revision: str) -> Iterator[None]:
    """Around calls of huggingface_hub. Which library's network errors it lets through depends on its
    version."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise _gated(model) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{model}: no such model on the Hugging Face Hub, or it is private: for those set HF_TOKEN to "
            "the token of an account that may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{model}: has no branch, tag or commit {revision!r}") from error
    except OfflineModeIsEnabled as error:
        raise HubUnreachable("HF_HUB_OFFLINE forbids it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if 400 <= status < 500:
            raise ConfigError(
                f"{model}: the Hugging Face Hub refuses with status {status}: {error}"
            ) from error
        raise HubUnreachable(str(error)) from error
    except Exception as error:
        if (
            isinstance(error, OSError)
            and error.errno
            and not isinstance(error, ConnectionError | TimeoutError)
        ):
            raise  # of the disk
        raise HubUnreachable(f"{type(error).__name__}: {error}") from error


def _gated(model: str) -> ConfigError:
    from huggingface_hub import get_token

    how = "with the account of your token" if get_token() else "and set HF_TOKEN to a token of that account"
    return ConfigError(f"{model}: a gated model; accept its terms at https://huggingface.co/{model} {how}")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hides huggingface_hub's bars: the progress is shown already."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
