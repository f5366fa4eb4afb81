"""Whatever MODEL is: a GGUF file by path, or no more than a config.json with dummy weights."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tools.service import Service

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
}


def complete(service: Service, prompt: object) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{service.http_url}/v1/completions", json=body, timeout=60)


def test_dummy_weights_from_a_config_alone_serve_token_ids_without_text(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY))
    with Service(tmp_path, model=str(model), options=("--load-format", "dummy")) as service:
        answer = complete(service, [1, 2, 3]).json()
        assert answer["model"] == "tiny"
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["text"] == ""
        refused = complete(service, "some text")
        assert refused.status_code == 400
        assert "no tokenizer" in refused.json()["error"]["message"]
        too_large = complete(service, [1000])
        assert too_large.status_code == 400


def test_a_gguf_file_by_path(tmp_path: Path, smollm2_gguf: Path) -> None:
    with Service(tmp_path, model=str(smollm2_gguf), options=("--load-format", "gguf")) as service:
        answer = complete(service, "The capital of France is").json()
        assert answer["model"] == smollm2_gguf.stem
        assert "Paris" in answer["choices"][0]["text"]
