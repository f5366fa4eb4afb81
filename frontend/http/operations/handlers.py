"""Everything but generation: models, tokens, health, metrics and the page about the API."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from aiohttp import web

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.body import parse
from frontend.http.json_text import json_response
from frontend.http.operations.bodies import (
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from frontend.metrics import FrontendMetrics
from frontend.metrics_names import named, triton_gpu_lines
from frontend.scheduler_link import SchedulerLink
from frontend.text.tokenizer_config import SPECIAL_TOKENS
from frontend.triton.metrics import exposition as triton_exposition
from pagewire.base.errors import InvalidRequest, Unavailable
from pagewire.base.version import __version__
from pagewire.wire.tasks import GENERATE

_STATIC = files("frontend.http").joinpath("static")


_ENGINE_FACTS = (
    "model",
    "dtype",
    "device",
    "vocab_size",
    "hidden_size",
    "max_model_len",
    "block_size",
    "num_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
)
_LIMITS = ("max_body_bytes", "max_prompt_tokens", "request_timeout")


def _server(link: SchedulerLink) -> dict[str, Any]:
    """What /health says of a scheduler. Addresses are not told: whoever asks needs no key."""
    return {
        "name": link.name,
        "healthy": link.takes_requests,
        "reason": link.why_no_requests() or None,
        "open_requests": link.num_open,
    }


class OperationHandlers:
    """Endpoints that answer from what is known, or with one call to the scheduler."""

    def __init__(
        self, config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._metrics = metrics
        self._docs = _STATIC.joinpath("docs.html").read_text(encoding="utf-8")

    async def docs(self, request: web.Request) -> web.Response:
        """GET /docs"""
        return web.Response(text=self._docs, content_type="text/html")

    async def health(self, request: web.Request) -> web.Response:
        """GET /health and /ping: the process lives; and how many schedulers behind it take requests."""
        links = self._pipeline.link.links
        num_ready = self._pipeline.link.num_ready
        return web.json_response(
            {
                "status": "ok" if num_ready == len(links) else "degraded",
                "healthy": num_ready,
                "total": len(links),
                "servers": [_server(link) for link in links],
            }
        )

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: a request sent now would be served."""
        if self._pipeline.ready:
            return web.json_response({"status": "ready"})
        raise Unavailable(self._pipeline.why_not_ready())

    async def version(self, request: web.Request) -> web.Response:
        """GET /version"""
        return web.json_response({"version": __version__})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: the scheduler's metrics, as long as it can be reached, and this frontend's own."""
        link = self._pipeline.link
        exposition, load = "", None
        with suppress(Unavailable):  # pagewire:frontend_scheduler_ready tells
            encoded, load = await asyncio.gather(link.get_metrics(), link.get_load())
            exposition = encoded.decode()
        model = self._pipeline.model.names[0]
        triton = triton_exposition(self._metrics, model, load, link.model)
        return web.Response(
            body=b"".join(
                (
                    named(exposition, self._config.metrics_names, model).encode(),
                    self._metrics.exposition(),
                    triton,
                    triton_gpu_lines(exposition).encode(),
                )
            ),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def load(self, request: web.Request) -> web.Response:
        """GET /load"""
        load = await self._pipeline.link.get_load()
        return web.json_response(
            {
                "server_load": load.num_requests_running + load.num_requests_waiting,
                "num_requests_running": load.num_requests_running,
                "num_requests_waiting": load.num_requests_waiting,
                "kv_cache_usage": load.num_used_blocks / load.num_blocks if load.num_blocks else 0.0,
                "max_num_seqs": load.max_num_seqs,
                "max_num_waiting": load.max_num_waiting,
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        """GET /server_info"""
        facts = self._pipeline.link.model
        engine = None if facts is None else {name: getattr(facts, name) for name in _ENGINE_FACTS}
        if engine is not None and facts is not None:
            engine |= {
                "task": facts.task or GENERATE,
                "labels": list(facts.labels),
                "kernels": facts.kernels or None,
                "weights": facts.weights or None,
                "quantization": facts.quantization or None,
                "kv_cache_dtype": facts.kv_cache_dtype,
            }
        return web.json_response(
            {
                "version": __version__,
                "served_model_names": list(self._pipeline.model.names),
                "ready": self._pipeline.ready,
                "pooling": self._pipeline.model.embedding.pooling,
                "engine": engine,
                "limits": {name: getattr(self._config, name) for name in _LIMITS},
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        names = self._pipeline.model.all_names
        data = [self._model(name) for name in names]
        whole = {"has_more": False, "first_id": names[0], "last_id": names[-1]}  # for Anthropic's clients
        return web.json_response({"object": "list", "data": data, **whole})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{model}"""
        name = request.match_info["model"]
        self._pipeline.model.check_name(name)
        return web.json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        facts = self._pipeline.link.model
        model = self._pipeline.model
        adapter = None if name in model.names else model.adapters.get(name)
        created = model.created if adapter is None else adapter.created
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "lifecycle": "active",
            "created": created,
            "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
            "owned_by": "pagewire",
            "root": model.names[0] if adapter is None else adapter.path,
            "parent": None if adapter is None else model.names[0],
            "max_model_len": None if facts is None else facts.max_model_len,
            "quantization": None if facts is None else facts.quantization or None,
        }

    async def load_adapter(self, request: web.Request) -> web.Response:
        """POST /v1/load_lora_adapter"""
        body = parse(LoadAdapterBody, await request.read())
        if body.lora_name in self._pipeline.model.names:
            raise InvalidRequest(
                f"{body.lora_name!r} is the model's own name; an adapter needs another", param="lora_name"
            )
        await self._pipeline.link.load_adapter(body.lora_name, body.lora_path, in_place=body.load_inplace)
        return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_adapter(self, request: web.Request) -> web.Response:
        """POST /v1/unload_lora_adapter"""
        body = parse(UnloadAdapterBody, await request.read())
        await self._pipeline.link.unload_adapter(body.lora_name)
        return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize"""
        body = parse(TokenizeBody, await request.read())
        self._pipeline.model.check_name(body.model or "")
        tokens = await self._pipeline.tokenize(body.to_tokenize())
        facts = self._pipeline.link.model
        entry = self._pipeline.model.tokenizer.vocabulary_entry
        return json_response(
            {
                "tokens": tokens,
                "count": len(tokens),
                "max_model_len": None if facts is None else facts.max_model_len,
                "token_strs": [entry(token_id) for token_id in tokens] if body.return_token_strs else None,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize"""
        body = parse(DetokenizeBody, await request.read())
        self._pipeline.model.check_name(body.model or "")
        text = await self._pipeline.detokenize(body.tokens, skip_special_tokens=body.skip_special_tokens)
        return json_response({"prompt": text})

    async def tokenizer_info(self, request: web.Request) -> web.Response:
        """GET /tokenizer_info"""
        model, engine = self._pipeline.model, self._pipeline.link.model
        facts = model.tokenizer_facts
        return json_response(
            {
                "tokenizer_class": facts.tokenizer_class,
                "vocab_size": model.tokenizer.vocab_size,
                "model_max_length": None if engine is None else engine.max_model_len,
                **{name: facts.special_tokens.get(name) for name in SPECIAL_TOKENS},
                "additional_special_tokens": list(facts.additional_special_tokens),
                "add_bos_token": facts.add_bos_token,
                "add_eos_token": facts.add_eos_token,
                "chat_template": None if model.template is None else model.template.default_source,
            }
        )
