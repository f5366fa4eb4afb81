"""A service for fuzzers: the real processes over a tiny model of random weights, so that little but the
protocols takes time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pagewire.hub import DEFAULT_MODEL, resolve_model
from tools.service import Service

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_OPTIONS = ("--load-format", "dummy", "--max-model-len", "64", "--max-num-seqs", "16")


def start_service(directory: Path, *options: str, **config: Any) -> Service:
    """Returns when it is ready. `directory` holds the model and the log; the caller stops the service.

    The tokenizer and the template are the default model's, so that text and conversations are served. The
    context is short: a request that asks for as much as there is ends soon. `config` changes its config.json.
    """
    model = directory / "tiny"
    shutil.copytree(resolve_model(DEFAULT_MODEL), model, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((model / "config.json").read_text()) | _SHAPE | config
    (model / "config.json").write_text(json.dumps(config))
    service = Service(directory, model=str(model), options=(*_OPTIONS, *options))
    return service.wait_ready()


def harm(service: Service, before: dict[str, int]) -> list[str]:
    """What the service has suffered since `before` (see `process_ids`): restarts and errors in its log."""
    found = [f"{role} was restarted" for role, pid in process_ids(service).items() if before[role] != pid]
    found += [line for line in service.log.splitlines() if line.startswith(("Traceback", "Fatal"))]
    return found


def process_ids(service: Service) -> dict[str, int]:
    """The ids of the service's processes by their roles."""
    return {role: process.pid for role, process in service.processes().items()}
