"""Two frontends on one host and replicas on two others, by mTLS; one of these is cut off and comes back.

Hosts are network namespaces with addresses of their own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import trustme

from pagewire.base.own_packages import python_command, python_path

T = TypeVar("T")
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2", "front": "10.77.0.3"}
PORT, HTTP_PORT = 50052, 8000
NULL = ("--engine", "null", "--null-step-ms", "25")


class Hosts:
    """Three namespaces; `front` has a bridge to which the two others are connected."""

    def __init__(self) -> None:
        self._names = {host: f"pagewire-{os.getpid()}-{host}" for host in ADDRESSES}
        for name in self._names.values():
            _run("ip", "netns", "add", name)
        self.ip("front", "link", "add", "bridge0", "type", "bridge")
        for host in ("a", "b"):
            self.ip("front", "link", "add", f"to-{host}", "type", "veth", "peer", "name", "eth0")
            self.ip("front", "link", "set", "eth0", "netns", self._names[host])
            self.ip("front", "link", "set", f"to-{host}", "master", "bridge0", "up")
        for host, device in (("a", "eth0"), ("b", "eth0"), ("front", "bridge0")):
            self.ip(host, "address", "add", f"{ADDRESSES[host]}/24", "dev", device)
            self.ip(host, "link", "set", device, "up")
            self.ip(host, "link", "set", "lo", "up")

    def ip(self, host: str, *words: str) -> None:
        """Runs `ip` on a host."""
        _run("ip", "-n", self._names[host], *words)

    def start(self, host: str, log: Path, *words: str) -> subprocess.Popen[bytes]:
        """Starts `pagewire` on a host."""
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._names[host], *python_command("pagewire"), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **python_path(), "OMP_NUM_THREADS": "1"},
            )

    def on(self, host: str, work: Callable[[], T]) -> T:
        """Does something in a thread that is on a host."""
        results: list[T] = []

        def run() -> None:
            with Path(f"/run/netns/{self._names[host]}").open("rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            results.append(work())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results[0]

    def close(self) -> None:
        """Removes the namespaces, and the devices with them."""
        for name in self._names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _namespaces_can_be_made() -> bool:
    if shutil.which("ip") is None:
        return False
    name = f"pagewire-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=False)
    return made


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not _namespaces_can_be_made():
        pytest.skip("needs iproute2 and the right to make network namespaces")
    hosts = Hosts()
    yield hosts
    hosts.close()


def write_certificates(directory: Path) -> dict[str, Path]:
    """One authority, and one certificate for the hosts with replicas, which the frontends show too."""
    authority = trustme.CA()
    issued = authority.issue_cert(ADDRESSES["a"], ADDRESSES["b"])
    files = {name: directory / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    issued.private_key_pem.write_to_path(str(files["key"]))
    files["cert"].write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    return files


def ask(number: int, max_tokens: int) -> list[int]:
    """The tokens of an answer that never changes."""
    body = {
        "prompt": [300 + number, 400, 500],
        "max_tokens": max_tokens,
        "seed": number,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = httpx.post(f"http://127.0.0.1:{HTTP_PORT}/v1/completions", json=body, timeout=90)
    assert response.status_code == 200, response.text
    token_ids: list[int] = response.json()["choices"][0]["token_ids"]
    return token_ids


def healthy() -> int:
    """How many replicas one of the frontends sees; -1 if it does not listen yet."""
    try:
        answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{HTTP_PORT}/health", timeout=5).json()
    except httpx.TransportError:
        return -1
    return int(answer["healthy"])


def until_healthy(hosts: Hosts, count: int, logs: list[Path]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if all(hosts.on("front", healthy) == count for _ in range(6)):
            return
        time.sleep(0.2)
    raise AssertionError("\n".join(log.read_text(errors="replace")[-2000:] for log in logs))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_host_that_is_cut_off_loses_no_token_and_takes_part_again(
    hosts: Hosts, tmp_path: Path, smollm2_dir: Path
) -> None:
    files = write_certificates(tmp_path)
    tls = [
        f"--ssl-certfile={files['cert']}",
        f"--ssl-keyfile={files['key']}",
        f"--ssl-ca-certs={files['ca']}",
    ]
    logs = [tmp_path / f"{name}.log" for name in ("a", "b", "front-0", "front-1")]
    processes = []
    try:
        for host, log in zip("ab", logs, strict=False):
            listen = f"{ADDRESSES[host]}:{PORT}"
            words = ("serve", "smollm2-135m", "--frontends", "0", "--scheduler-listen", listen, *NULL, *tls)
            processes.append(hosts.start(host, log, *words))
        schedulers = ",".join(f"{ADDRESSES[host]}:{PORT}" for host in "ab")
        shown = [word.replace("--ssl", "--scheduler-ssl") for word in tls]
        for log in logs[2:]:
            words = ("frontend", "smollm2-135m", "--schedulers", schedulers, "--host", "127.0.0.1", *shown)
            processes.append(hosts.start("front", log, *words))
        until_healthy(hosts, 2, logs)
        with ThreadPoolExecutor(12) as pool:
            expected = list(pool.map(lambda number: hosts.on("front", lambda: ask(number, 120)), range(12)))
            asking = [
                pool.submit(lambda n: hosts.on("front", lambda: ask(n, 120)), number) for number in range(12)
            ]
            time.sleep(1.0)
            hosts.ip("front", "link", "set", "to-b", "down")
            assert [each.result() for each in asking] == expected
        until_healthy(hosts, 1, logs)
        assert hosts.on("front", lambda: ask(0, 8)) == expected[0][:8]
        hosts.ip("front", "link", "set", "to-b", "up")
        until_healthy(hosts, 2, logs)
        moved = [log for log in logs[2:] if "requests go on elsewhere" in log.read_text()]
        assert moved, "no request was on the host that was cut off"
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
