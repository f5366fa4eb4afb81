"""What `pagewire serve` starts: ports, sockets, names and command lines."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.cli.ports import ReservedPort
from pagewire.cli.report import QuietReport
from pagewire.cli.service import ServiceConfig, running_service
from pagewire.hub.names.model_name import default_model_name

LOCAL = "127.0.0.1"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Near the root: the paths of sockets have at most 107 bytes, and `tmp_path` may take most of them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def test_a_reserved_port_is_shared_with_frontends_and_with_nobody_else() -> None:
    reserved = ReservedPort(LOCAL, 0, "port")
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind((LOCAL, reserved.port))
    with socket.socket() as frontend, socket.socket() as second, socket.socket() as client:
        for each in (frontend, second):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind((LOCAL, reserved.port))
        frontend.listen()
        client.connect((LOCAL, reserved.port))
        accepted, _ = frontend.accept()
        accepted.close()
    reserved.release()
    ReservedPort(LOCAL, reserved.port, "port").release()


def test_a_port_in_use_is_refused_by_name() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((LOCAL, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"grpc-port {port} on 127.0.0.1 is in use .*; choose another --grpc-port"
        ):
            ReservedPort(LOCAL, port, "grpc-port")


@pytest.mark.parametrize("host", ["no such host", "203.0.113.1"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        ReservedPort(host, 0, "port")


def test_a_model_is_served_under_the_name_it_was_given_by(model: Path) -> None:
    assert default_model_name("smollm2-135m") == "smollm2-135m"
    assert default_model_name("owner/name") == "owner/name"
    assert default_model_name(str(model)) == "tiny"
    assert default_model_name(f"{model}/") == "tiny"
    assert default_model_name("/models/Tiny.Q4_1.gguf") == "Tiny.Q4_1"


def test_every_process_gets_its_part_of_the_options(model: Path, runtime_dir: Path) -> None:
    values = {
        "max_num_seqs": 4,
        "dtype": "float32",
        "host": LOCAL,
        "max_num_waiting": 9,
        "drain_timeout": 3.0,
    }
    config = ServiceConfig.resolve(str(model), values, frontends=2).placed(runtime_dir, 8001, 8002)
    stages = config.stages()
    assert [[spec.name for spec in stage] for stage in stages] == [
        ["frontend-0", "frontend-1"],
        ["scheduler"],
        ["engine-worker"],
    ]
    frontend, scheduler, worker = (" ".join(stage[0].command) for stage in stages)
    assert f"-m frontend {model} --scheduler unix:{runtime_dir}/scheduler.sock" in frontend
    assert "--served-model-name tiny --host 127.0.0.1 --port 8001 --grpc-port 8002" in frontend
    assert (
        f"--listen unix:{runtime_dir}/scheduler.sock --worker-socket {runtime_dir}/worker.sock" in scheduler
    )
    assert scheduler.endswith("--max-num-seqs 4 --max-num-waiting 9")
    assert f"-m engine {model} --socket {runtime_dir}/worker.sock" in worker
    assert worker.endswith("--dtype float32 --max-num-seqs 4")
    assert stages[0][0].stop_timeout > 3.0


def test_too_long_a_runtime_directory_is_refused(model: Path) -> None:
    config = ServiceConfig.resolve(str(model), {})
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR to a shorter one"):
        config.placed(Path("/" + "x" * 100), 1, 2)


async def test_the_runtime_directory_is_private_and_removed(
    model: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setattr(ServiceConfig, "stages", lambda self: [])
    config = ServiceConfig.resolve(str(model), {"host": LOCAL, "port": 0, "grpc_port": 0})
    async with running_service(config, QuietReport()) as service:
        [directory] = runtime_dir.glob("pagewire-*")
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        assert service.http_address != service.grpc_address
        assert service.http_address.startswith("127.0.0.1:")
        assert not service.http_address.endswith(":0")
    assert list(runtime_dir.glob("pagewire-*")) == []


def test_at_least_one_frontend(model: Path) -> None:
    with pytest.raises(ConfigError, match="frontends is 0; it must be at least 1"):
        ServiceConfig.resolve(str(model), {}, frontends=0)
