"""Starting on a GPU: what was compiled ahead is all that is ever launched. Needs one: `make test-gpu`."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pagewire import LLM, SamplingParams
from tests.unit.engine.tiny_model import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 2000}
SAMPLING = [
    SamplingParams(temperature=0, max_tokens=8),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=1, max_tokens=8),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, max_tokens=8),
    SamplingParams(logit_bias={5: 1.0}, max_tokens=8),
    SamplingParams(logprobs=3, max_tokens=8),
    SamplingParams(prompt_logprobs=3, max_tokens=8),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of kernels."""
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"deterministic": True},
        {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    ],
    ids=str,
)
def test_no_request_waits_for_the_compiler(tmp_path: Path, home: Path, options: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", **SIZES)
    prompts = [[(7 * i + length) % 2000 for i in range(length)] for length in (1, 2, 3, 17, 60, 150)]
    with LLM(str(model), device="cuda", dtype="bfloat16", **options) as llm:
        for params in SAMPLING:
            llm.generate(prompts, params)
            llm.generate(prompts[:1], params)
    [stamp] = home.glob("triton/*/complete/*.json")
    ahead = sorted(kernel["name"] for kernel in json.loads(stamp.read_text()))
    assert sorted(path.stem for path in home.glob("triton/*/*/*.cubin")) == ahead


def worker_log(model: Path, socket: Path) -> Iterator[str]:
    """What an engine-worker writes until it listens; then it is stopped."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pagewire", "engine-worker", str(model), "--socket", str(socket)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stderr is not None
        for line in worker.stderr:
            logging.info(line.rstrip())
            yield line
            if "started in" in line:
                worker.send_signal(signal.SIGTERM)
    assert worker.returncode == 0


@pytest.mark.usefixtures("home")
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shards=2, **SIZES)
    cold = "".join(worker_log(model, tmp_path / "worker.sock"))
    assert re.search(r"compiled \d+ kernels in", cold)
    assert "when it was launched" not in cold
    assert re.search(r"read 0\.\d\d GB in .* GB/s", cold)
    assert re.search(r"started in .*: Python .*, imports .*, CUDA .*, weights .*, kernels .*, graphs ", cold)
    warm = "".join(worker_log(model, tmp_path / "worker.sock"))
    assert "kernels are in" in warm
    assert "compiling" not in warm
    assert "compiled" not in warm
