"""lm-eval's `local-completions`, with this server's tokenizer, finds the log likelihoods of transformers.

Skipped where lm-eval is not installed. `pip install --no-deps lm-eval tenacity` is enough for this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.reference import Reference
from tools.service import Service

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")
pytestmark = pytest.mark.slow

QUESTIONS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a banana"),
    ("2 + 2 =", " 4"),
    ("", "Hello there"),  # after the beginning of a text
]


@pytest.fixture(scope="module")
def evaluated(float32_server: Service) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{float32_server.http_url}/v1/completions",
        model=float32_server.model,
        tokenizer_backend="remote",
        max_length=512,
        batch_size=2,
        max_retries=1,
    )


def test_log_likelihoods_are_those_of_transformers(evaluated: Any, smollm2_float32_dir: Path) -> None:
    from lm_eval.api.instance import Instance

    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=question, idx=index)
        for index, question in enumerate(QUESTIONS)
    ]
    reference = Reference(smollm2_float32_dir)
    tokenizer = reference.tokenizer
    for (context, text), (found, is_greedy) in zip(QUESTIONS, evaluated.loglikelihood(asked), strict=True):
        start = len(tokenizer(context).input_ids)
        ids = tokenizer(context + text).input_ids
        if not start:
            ids, start = [tokenizer.bos_token_id, *ids], 1
        logprobs = reference.logprobs(ids)[start - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(logprobs, ids[start:], strict=True))
        assert found == pytest.approx(expected, abs=1e-3)
        assert is_greedy == (logprobs.argmax(-1).tolist() == ids[start:])


def test_it_generates_until_a_stop_string(evaluated: Any) -> None:
    from lm_eval.api.instance import Instance

    arguments = ("The capital of France is", {"until": ["\n"], "max_gen_toks": 8})
    asked = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
    [answer] = evaluated.generate_until([asked])
    assert answer.startswith(" Paris")
