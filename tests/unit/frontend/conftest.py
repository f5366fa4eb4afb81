"""A frontend in this process over a scripted scheduler, and a model directory whose tokens are bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from frontend.config import FrontendConfig
from frontend.server import Frontend
from tests.unit.frontend.scripted_scheduler import ScriptedScheduler

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte (GPT-2's bytes_to_unicode)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(spare)) for byte in range(256)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bytes-model")
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


class RunningFrontend(Frontend):
    """A frontend on free ports of the loopback."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc.port}"


class FrontendFactory:
    """Starts frontends with settings of the test's choice; all are stopped at its end."""

    def __init__(self, scheduler: ScriptedScheduler, model_dir: Path) -> None:
        self._scheduler = scheduler
        self._model_dir = model_dir
        self.started: list[RunningFrontend] = []

    async def __call__(self, *, wait: bool = True, **settings: object) -> RunningFrontend:
        config = FrontendConfig(
            **{
                "model": str(self._model_dir),
                "scheduler": self._scheduler.target,
                "served_model_names": ("bytes",),
                "host": "127.0.0.1",
                "port": 0,
                "grpc_port": 0,
                "reuse_port": False,
                **settings,
            }
        )
        frontend = RunningFrontend(config)
        await frontend.start()
        self.started.append(frontend)
        if wait:
            await until_ready(frontend)
        return frontend


async def until_ready(frontend: RunningFrontend) -> None:
    ready = asyncio.Event()
    frontend.link.on_change(lambda: ready.set() if frontend.link.ready else None)
    if not frontend.link.ready:
        await asyncio.wait_for(ready.wait(), 10)


@pytest.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[ScriptedScheduler]:
    scheduler = await ScriptedScheduler(str(tmp_path / "scheduler.sock")).start()
    yield scheduler
    await scheduler.stop()


@pytest.fixture
async def start_frontend(scheduler: ScriptedScheduler, model_dir: Path) -> AsyncIterator[FrontendFactory]:
    factory = FrontendFactory(scheduler, model_dir)
    yield factory
    await asyncio.gather(*(each.stop(drain_timeout=0, refuse_grace=0) for each in factory.started))


@pytest.fixture
async def frontend(start_frontend: FrontendFactory) -> RunningFrontend:
    return await start_frontend()
