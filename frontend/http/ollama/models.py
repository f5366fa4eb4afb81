"""What clients ask about models: /api/tags, /api/show, /api/ps, /api/pull and /api/version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from frontend.generation.pipeline import GenerationPipeline
from frontend.http.body import parse
from frontend.http.ollama.lines import timestamp
from frontend.http.ollama.names import served_name, tagged
from frontend.http.ollama.replies import json_line, json_response
from frontend.http.ollama.schemas.models import OllamaPullBody, OllamaShowBody
from frontend.served_model import ServedModel
from pagewire.base.errors import Unsupported
from pagewire.wire.tasks import EMBED, GENERATE

API_VERSION = "0.12.11"
"""The version of Ollama whose API this is. Clients look for what they need, and read three numbers."""

_NEVER = "9999-12-31T23:59:59Z"

_ARCHITECTURE = {
    # Ollama's names, which are GGUF's, by those of config.json.
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}

_PARAMETERS = {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict"}
"""Ollama's names of parameters that have another one here."""


class OllamaModelHandlers:
    """Endpoints that answer from what is known of the served model."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._pipeline = pipeline

    async def version(self, http_request: web.Request) -> web.Response:
        """GET /api/version."""
        return json_response({"version": API_VERSION})

    async def tags(self, http_request: web.Request) -> web.Response:
        """GET /api/tags: every name of the served model."""
        modified_at = timestamp(self._pipeline.model.checkpoint.modified_at)
        models = [{**each, "modified_at": modified_at} for each in self._listed()]
        return json_response({"models": models})

    async def running(self, http_request: web.Request) -> web.Response:
        """GET /api/ps: the same, once an engine has it."""
        facts = self._pipeline.link.model
        if facts is None or not self._pipeline.link.ready:
            return json_response({"models": []})
        size = self._pipeline.model.checkpoint.size
        more = {
            "expires_at": _NEVER,
            "size_vram": 0 if facts.device == "cpu" else size,
            "context_length": facts.max_model_len,
        }
        return json_response({"models": [{**each, **more} for each in self._listed()]})

    async def show(self, http_request: web.Request) -> web.Response:
        """POST /api/show."""
        body = parse(OllamaShowBody, await http_request.read())
        model = self._pipeline.model
        name = served_name(model, body.asked)
        template = "" if model.template is None else model.template.source
        parameters = [f"{_PARAMETERS.get(key, key):<30} {value}" for key, value in model.defaults.items()]
        modelfile = [f"FROM {tagged(name)}", *(f"PARAMETER {' '.join(line.split())}" for line in parameters)]
        return json_response(
            {
                "modelfile": "\n".join(modelfile) + "\n",
                "parameters": "\n".join(parameters),
                "template": template,
                "details": _details(model),
                "model_info": self._info(name),
                "capabilities": _capabilities(model, self._task()),
                "modified_at": timestamp(model.checkpoint.modified_at),
            }
        )

    async def pull(self, http_request: web.Request) -> web.Response:
        """POST /api/pull: the served model is there; no other is fetched."""
        body = parse(OllamaPullBody, await http_request.read())
        served_name(self._pipeline.model, body.asked)
        success = {"status": "success"}
        if body.stream is False:
            return json_response(success)
        return web.Response(body=json_line(success), content_type="application/x-ndjson")

    async def unserved(self, http_request: web.Request) -> web.Response:
        """What changes the models that there are."""
        raise Unsupported(
            f"{http_request.method} {http_request.path} is not served: this server has the model that it was "
            "started with, and neither makes nor stores others"
        )

    def _task(self) -> str:
        """What the model is for, as far as an engine has told it."""
        facts = self._pipeline.link.model
        return GENERATE if facts is None else facts.task or GENERATE

    def _listed(self) -> list[dict[str, Any]]:
        model = self._pipeline.model
        return [
            {
                "name": tagged(name),
                "model": tagged(name),
                "size": model.checkpoint.size,
                "digest": model.checkpoint.digest,
                "details": _details(model),
            }
            for name in model.all_names
        ]

    def _info(self, name: str) -> Mapping[str, str | int | float | None]:
        """GGUF's keys. The context is as long as the engine has it, which may be less than the model's."""
        checkpoint, facts = self._pipeline.model.checkpoint, self._pipeline.link.model
        family = checkpoint.family or "unknown"
        named = {theirs: checkpoint.number(ours) for ours, theirs in _ARCHITECTURE.items()}
        named["context_length"] = (
            facts.max_model_len if facts else checkpoint.number("max_position_embeddings")
        )
        return {
            "general.architecture": family,
            "general.basename": name,
            "general.parameter_count": checkpoint.num_parameters,
            **{f"{family}.{key}": value for key, value in named.items() if value is not None},
        }


def _details(model: ServedModel) -> dict[str, Any]:
    checkpoint = model.checkpoint
    return {
        "parent_model": "",
        "format": checkpoint.weight_format,
        "family": checkpoint.family,
        "families": [checkpoint.family] if checkpoint.family else [],
        "parameter_size": _human(checkpoint.num_parameters),
        "quantization_level": checkpoint.number_format,
    }


def _capabilities(model: ServedModel, task: str) -> list[str]:
    generates = task == GENERATE
    found = {
        "completion": generates,
        "embedding": task == EMBED or (generates and model.embedding.pooling is not None),
        "tools": generates and model.replies.tools is not None,
        "thinking": generates and model.replies.reasoning is not None,
    }
    return [name for name, has in found.items() if has]


def _human(number: int | None) -> str:
    """A number of parameters as Ollama writes it, "134.52M"; empty if it is not known."""
    if number is None:
        return ""
    for unit, letter, digits in ((10**12, "T", 1), (10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if number >= unit:
            return f"{number / unit:.{digits}f}{letter}"
    return str(number)
