"""lm-evaluation-harness over /v1/completions: a task of our own gets transformers' log likelihoods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conformance.reference import reference_model
from tools.service import Service

lm_eval = pytest.importorskip("lm_eval", reason="make test-clients installs it")
pytest.importorskip("datasets", reason="make test-clients installs it")

QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " Berlin", " a river"], "answer": 0},
    {"question": "Water is made of hydrogen and", "choices": [" iron", " oxygen", " sand"], "answer": 1},
    {"question": "Two and two make", "choices": [" five", " four", " nothing at all"], "answer": 1},
]
TASK = """
task: pagewire_questions
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def expected(smollm2_float32_dir: Path) -> list[list[float]]:
    """The log likelihood of every choice after its question, by transformers in float32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_float32_dir)
    model = reference_model(smollm2_float32_dir)

    def likelihood(question: str, choice: str) -> float:
        prompt, whole = tokenizer(question).input_ids, tokenizer(question + choice).input_ids
        with torch.inference_mode():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logprobs[at - 1, whole[at]]) for at in range(len(prompt), len(whole)))

    return [[likelihood(each["question"], choice) for choice in each["choices"]] for each in QUESTIONS]


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_log_likelihoods_of_a_home_made_task_are_transformers(
    float32_server: Service, smollm2_dir: Path, tmp_path: Path, expected: list[list[float]], backend: str
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(data)))
    arguments = {
        "model": float32_server.model,
        "base_url": f"{float32_server.http_url}/v1/completions",
        "tokenizer_backend": backend,
        "num_concurrent": 1,
        "max_retries": 1,
    }
    if backend == "huggingface":
        arguments["tokenizer"] = str(smollm2_dir)
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["pagewire_questions"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(results["samples"]["pagewire_questions"], key=lambda sample: sample["doc_id"])
    for sample, likelihoods in zip(samples, expected, strict=True):
        given = [float(response[0][0]) for response in sample["resps"]]
        assert given == pytest.approx(likelihoods, abs=1e-3)
