"""A server that speaks what pagewire asks of the Hugging Face Hub, of its CDN and of ModelScope."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
# What the hubs keep in their storage of large files.
_LARGE = (".safetensors", ".bin", ".gguf", ".pth")


@dataclass
class FakeHub:
    """What the hub has, and what it was asked.

    Attributes:
        models: files by path, of each model.
        gated: models that take the token.
        renamed: old owner/name -> new.
        failing: whether the hub answers everything with status 501.
        cut_after: bytes of a large file after which the connection is closed; each is used once.
        hold_after: bytes of a large file after which nothing comes until `release` is set.
        held: set when that happened.
        fetched: paths that were sent, with the first byte.
        tokens: the Authorization header of each request to the hub and to the CDN.
    """

    models: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    failing: bool = False
    cut_after: list[int] = field(default_factory=list)
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    fetched: list[tuple[str, int]] = field(default_factory=list)
    hub_tokens: set[str | None] = field(default_factory=set)
    cdn_tokens: set[str | None] = field(default_factory=set)
    url: str = ""
    cdn_url: str = ""

    def started_at(self, name: str) -> list[int]:
        """The first bytes of the answers that sent a file."""
        return [start for path, start in self.fetched if path == name]


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serves it on free ports, until the end."""
    servers = []
    for attribute, kind in (("url", _Hub), ("cdn_url", _Cdn)):
        handler = type(kind.__name__, (kind,), {"hub": hub})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        setattr(hub, attribute, f"http://127.0.0.1:{server.server_address[1]}")
        servers.append(server)
    try:
        yield hub
    finally:
        hub.release.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def is_large(name: str) -> bool:
    return name.endswith(_LARGE)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_json(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), Content_Type="application/json")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


class _Hub(_Handler):
    def answer(self) -> None:
        self.hub.hub_tokens.add(self.headers["Authorization"])
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        if self.hub.failing:  # by a status after which huggingface_hub does not try again
            self.send(501)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", address.path):
            model, kind, revision = match.groups()
            self.describe(model, kind, revision or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", address.path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", address.path):
            self.modelscope(match[1], query, listing=match[2] is not None)
        else:
            self.send(404)

    def found(self, model: str, revision: str) -> bool:
        if model in self.hub.renamed:
            new = self.path.replace(model, self.hub.renamed[model], 1)
            self.send(307, Location=new)
        elif model not in self.hub.models:
            self.send(401, X_Error_Code="RepoNotFound")
        elif revision not in ("main", COMMIT, "v1.0"):
            self.send(404, X_Error_Code="RevisionNotFound")
        else:
            return True
        return False

    def describe(self, model: str, kind: str | None, revision: str) -> None:
        if not self.found(model, revision):
            return
        files = self.hub.models[model]
        if kind == "tree":
            self.send_json([self.tree_entry(name, content) for name, content in files.items()])
            return
        siblings = [self.sibling(name, content) for name, content in files.items()]
        self.send_json({"id": model, "sha": COMMIT, "siblings": siblings})

    def tree_entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
        if is_large(name):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def sibling(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _oid(content)}
        if is_large(name):
            entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def resolve(self, model: str, revision: str, name: str) -> None:
        if not self.found(model, revision):
            return
        content = self.hub.models[model].get(name)
        if model in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send(401, X_Error_Code="GatedRepo")
        elif content is None:
            self.send(404, X_Error_Code="EntryNotFound")
        elif is_large(name):
            self.send(
                302,
                Location=f"{self.hub.cdn_url}/{model}/{name}",
                ETag=f'"{_oid(content)}"',
                X_Linked_Etag=f'"{sha256(content)}"',
                X_Linked_Size=str(len(content)),
                X_Repo_Commit=COMMIT,
            )
        else:
            if self.command == "GET":
                self.hub.fetched.append((name, 0))
            self.send(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=COMMIT)

    def modelscope(self, model: str, query: dict[str, str], *, listing: bool) -> None:
        if model not in self.hub.models or query["Revision"] not in ("master", "v1.0"):
            self.send(404)
        elif model in self.hub.gated and f"m_session_id={TOKEN}" not in (self.headers["Cookie"] or ""):
            self.send(403)
        elif listing:
            files = [
                {"Type": "blob", "Name": name, "Path": name, "Size": len(content), "Sha256": sha256(content)}
                for name, content in self.hub.models[model].items()
            ]
            self.send_json({"Code": 200, "Data": {"Files": [{"Type": "tree", "Path": "folder"}, *files]}})
        elif is_large(query["FilePath"]):
            self.send(302, Location=f"{self.hub.cdn_url}/{model}/{query['FilePath']}")
        else:
            self.hub.fetched.append((query["FilePath"], 0))
            self.send(200, self.hub.models[model][query["FilePath"]])


class _Cdn(_Handler):
    """Sends large files, whole or from a byte on."""

    def answer(self) -> None:
        self.hub.cdn_tokens.add(self.headers["Authorization"])
        _, owner, model, name = self.path.split("/", 3)
        content = self.hub.models[f"{owner}/{model}"][name]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(match[1]) if match else 0
        self.hub.fetched.append((name, start))
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.hub.cut_after:
            self.wfile.write(content[start : start + self.hub.cut_after.pop(0)])
            self.close_connection = True
        elif self.hub.hold_after is not None:
            self.wfile.write(content[start : start + self.hub.hold_after])
            self.wfile.flush()
            self.hub.held.set()
            self.hub.release.wait()
        else:
            self.wfile.write(content[start:])


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
