"""Options made from configuration classes, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from engine.config import WorkerConfig
from frontend.config import FrontendConfig
from pagewire.base.command_line import arguments, environment, read
from pagewire.base.errors import ConfigError
from pagewire.base.options import build, with_options
from scheduler.config import SchedulerConfig

WORKER = WorkerConfig(
    model="/models/m",
    socket=Path("/run/w.sock"),
    device="cuda:1",
    dtype="bfloat16",
    load_format="dummy",
    max_model_len=100,
    max_num_seqs=3,
    max_num_batched_tokens=33,
    block_size=8,
    num_blocks=77,
    gpu_memory_utilization=0.5,
    kv_cache_memory=10**9,
    seed=4,
)
SCHEDULER = SchedulerConfig(
    listen=("unix:/run/s.sock", "127.0.0.1:7000"),
    worker_socket=Path("/run/w.sock"),
    max_num_seqs=3,
    max_num_batched_tokens=33,
    max_num_waiting=5,
    enable_prefix_caching=False,
)
FRONTEND = FrontendConfig(
    model="/models/m",
    scheduler="unix:/run/s.sock",
    served_model_names=("one", "two"),
    host="127.0.0.1",
    port=1,
    grpc_port=2,
    api_keys=("secret", "other"),
    chat_template=__file__,
    trust_request_chat_template=True,
    tool_call_parser="hermes",
    tool_parser_plugin=Path(__file__),
    reasoning_parser="none",
    max_body_bytes=9,
    reuse_port=False,
    drain_timeout=1.5,
)


def parsed(config: type, command_line: list[str], env: dict[str, str] | None = None) -> Any:
    """The configuration that a command with these options builds from a command line."""
    built = []
    app = typer.Typer()
    app.command()(with_options(config)(lambda **values: built.append(build(config, values))))
    result = CliRunner().invoke(app, command_line, env=env)
    assert result.exit_code == 0, result.output
    return built[0]


@pytest.mark.parametrize("config", [WORKER, SCHEDULER, FRONTEND], ids=lambda c: type(c).__name__)
def test_arguments_and_environment_reproduce_a_configuration(config: Any) -> None:
    assert parsed(type(config), arguments(config), environment(config)) == config


@pytest.mark.parametrize("config", [WORKER, SCHEDULER, FRONTEND], ids=lambda c: type(c).__name__)
def test_a_started_process_reads_the_same_configuration(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(config).items():
        monkeypatch.setenv(name, value)
    assert read(type(config), arguments(config)) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--listen", "unix:/s"], "missing"),
        (["--listen", "unix:/s", "--worker-socket"], "--worker-socket"),
        (["--listen", "unix:/s", "--worker-socket", "/w", "--max-num-seqs", "many"], "--max-num-seqs"),
        (["--listen", "unix:/s", "--worker-socket", "/w", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--listen", "unix:/s", "--worker-socket", "/w", "--color", "red"], "--color"),
    ],
)
def test_a_started_process_refuses_what_nobody_wrote_for_it(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(SchedulerConfig, words)


def test_defaults_need_no_arguments() -> None:
    config = FrontendConfig(model="m", scheduler="unix:/s")
    assert arguments(config) == ["m", "--scheduler", "unix:/s"]
    assert parsed(FrontendConfig, ["m", "--scheduler", "unix:/s"]) == config


def test_a_process_without_keys_does_not_inherit_them() -> None:
    config = FrontendConfig(model="m", scheduler="unix:/s")
    inherited = {"PAGEWIRE_API_KEY": "secret", **environment(config)}
    assert parsed(FrontendConfig, arguments(config), inherited) == config


def test_keys_do_not_appear_in_lists_of_processes() -> None:
    assert "secret" not in " ".join(arguments(FRONTEND))


def test_options_are_explained_by_the_docstring_of_their_class() -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(with_options(FrontendConfig, WorkerConfig, without=["socket"])(lambda **values: None))
    text = " ".join(CliRunner().invoke(app, ["--help"], terminal_width=200).output.split())
    assert "Seconds that open streams get to finish after SIGTERM. [default: 30.0]" in text
    assert "Share of the GPU's memory that weights, activations and KV pool may take." in text
    assert "--socket" not in text


def test_a_commands_own_parameter_takes_the_place_of_a_field() -> None:
    seen = {}

    def command(model: str = "fallback", **values: Any) -> None:
        seen.update(values, model=model)

    app = typer.Typer()
    app.command()(
        with_options(SchedulerConfig, WorkerConfig, without=["listen", "worker_socket", "socket"])(command)
    )
    assert CliRunner().invoke(app, ["--model", "chosen", "--max-num-seqs", "7"]).exit_code == 0
    assert seen["model"] == "chosen"
    assert seen["max_num_seqs"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
        ({"device": "cpu:1"}, "device is 'cpu:1'"),
        ({"device": "cuda:"}, "device is 'cuda:'"),
        ({"dtype": "int4"}, "it must be one of auto, float32, bfloat16, float16"),
        ({"load_format": "pt"}, "it must be one of auto, safetensors, gguf, dummy"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1; it must be at least 1"),
        ({"gpu_memory_utilization": float("nan")}, "greater than 0 and at most 1"),
    ],
)
def test_a_worker_refuses_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerConfig(model="m", socket=Path("s"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 65536}, "port is 65536; it must be between 0 and 65535"),
        ({"port": 80, "grpc_port": 80}, "grpc_port is 80; it must be another port than port"),
        ({"api_keys": ("a b",)}, "keys without white space"),
        ({"api_keys": ("",)}, "keys without white space"),
        ({"served_model_names": ("",)}, "at least one character"),
        ({"drain_timeout": -1.0}, "at least 0"),
        (
            {"chat_template": "/nowhere.jinja"},
            "chat_template is '/nowhere.jinja'; it must be a file that exists",
        ),
    ],
)
def test_a_frontend_refuses_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrontendConfig(model="m", scheduler="unix:/s", **changes)


def test_both_ports_may_be_left_to_the_system() -> None:
    assert FrontendConfig(model="m", scheduler="unix:/s", port=0, grpc_port=0).port == 0
