"""The effect of every way to ask for completions, through the service: n, best_of, beams, echo, prompt log
probabilities, bad words and the rest. What they are compared with is transformers in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from tests.e2e.prompts import STORY
from tests.e2e.service import Service

TEXTS = ["The capital of France is", "Once upon a time, in a small village by the sea,", "1, 1, 2, 3, 5, 8,"]


class Reference:
    """transformers' model and tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    @torch.inference_mode()
    def beams(self, text: str, width: int, **settings: Any) -> list[tuple[list[int], float]]:
        """Every beam's tokens, up to the end of sequence, and its score."""
        ids = self.tokenizer(text, return_tensors="pt")
        output = self.model.generate(
            **ids,
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        eos = self.model.generation_config.eos_token_id
        found = []
        for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
            tokens = sequence[ids.input_ids.shape[1] :].tolist()
            found.append((tokens[: tokens.index(eos) + 1] if eos in tokens else tokens, float(score)))
        return found

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Log probabilities of every next token after every prefix, [len(ids), vocabulary]."""
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> Iterator[Reference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Reference(smollm2_dir)
    torch.set_num_threads(threads)


def complete(server: Service, path: str = "completions", **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.http_url}/v1/{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: Service, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
    """The chunks."""
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.http_url}/v1/{path}", json=body, timeout=120) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(
    ("width", "length_penalty", "early_stopping"), [(2, 1.0, False), (3, 0.5, False), (4, 2.0, True)]
)
def test_beams_are_those_of_transformers(server, reference, width, length_penalty, early_stopping) -> None:
    """Several prompts in one request, each with its own search; the last can end early."""
    texts = [*TEXTS, "<|im_start|>user\nSay yes or no.<|im_end|>\n<|im_start|>assistant\n"]
    answer = complete(
        server,
        prompt=texts,
        use_beam_search=True,
        n=width,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_tokens=7,
        return_token_ids=True,
    )
    found = [choice["token_ids"] for choice in answer["choices"]]
    for number, text in enumerate(texts):
        expected = reference.beams(
            text, width, max_new_tokens=7, length_penalty=length_penalty, early_stopping=early_stopping
        )
        assert found[number * width : (number + 1) * width] == [tokens for tokens, _ in expected]
    assert answer["usage"]["completion_tokens"] == sum(map(len, found))


def test_beams_have_their_scores_over_grpc(server, reference) -> None:
    request = pb.GenerateRequest(
        text=TEXTS[0],
        sampling=pb.SamplingParams(n=2, max_tokens=8, beam_search=pb.BeamSearch(width=3, length_penalty=0.5)),
    )
    with grpc.insecure_channel(server.grpc_target) as channel:
        whole = inference_pb2_grpc.InferenceServiceStub(channel).GenerateOnce(request, timeout=60)
    expected = reference.beams(TEXTS[0], 3, max_new_tokens=8, length_penalty=0.5)[:2]
    assert [list(choice.token_ids) for choice in whole.choices] == [tokens for tokens, _ in expected]
    assert [choice.score for choice in whole.choices] == pytest.approx(
        [score for _, score in expected], abs=1e-4
    )


def test_samples_differ_by_seed_and_share_the_prompts_blocks(server) -> None:
    request = pb.GenerateRequest(
        text=STORY, sampling=pb.SamplingParams(n=4, seed=11, temperature=1, max_tokens=12)
    )
    cached: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    with grpc.insecure_channel(server.grpc_target) as channel:
        for event in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60):
            if event.HasField("delta"):
                cached[event.delta.index] = event.delta.usage.cached_tokens
                tokens.setdefault(event.delta.index, []).extend(event.delta.token_ids)
                num_prompt_tokens = event.delta.usage.prompt_tokens
            usage = event.finished.usage
    assert len({tuple(each) for each in tokens.values()}) == 4
    assert [cached[index] for index in (1, 2, 3)] == [(num_prompt_tokens - 1) // 16 * 16] * 3
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt_tokens, 48)
    for index in (0, 2):  # each is what its own seed gives alone
        alone = complete(
            server, prompt=STORY, seed=11 + index, temperature=1, max_tokens=12, return_token_ids=True
        )
        assert alone["choices"][0]["token_ids"] == tokens[index]


def test_salted_requests_share_no_blocks_with_others(server) -> None:
    prompt = "Salt: " + STORY
    cached = [
        complete(server, prompt=prompt, max_tokens=1, **salt)["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        for salt in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"})
    ]
    assert [count > 0 for count in cached] == [False, True, False, False, True]


def test_best_of_returns_what_has_the_highest_mean_log_probability(server) -> None:
    asked = {"prompt": TEXTS[1], "temperature": 1.2, "seed": 5, "max_tokens": 8, "logprobs": 0}
    every = complete(server, n=5, **asked)["choices"]
    best = complete(server, n=2, best_of=5, **asked)
    assert best["usage"]["completion_tokens"] == 40

    def mean(choice: dict[str, Any]) -> float:
        logprobs: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    ranked = sorted(every, key=mean, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]


def test_prompt_logprobs_are_those_of_a_forward_pass(server, reference) -> None:
    text = STORY * 3
    ids = reference.tokenizer(text).input_ids
    expected = reference.logprobs(ids)
    for _ in range(2):  # the second time the prompt is cached, and is read again all the same
        answer = complete(server, prompt=text, max_tokens=1, prompt_logprobs=2, return_token_ids=True)
        choice = answer["choices"][0]
        assert choice["prompt_token_ids"] == ids
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        for place, (token_id, entry) in enumerate(zip(ids[1:], rest, strict=True)):
            assert entry[str(token_id)]["logprob"] == pytest.approx(
                float(expected[place, token_id]), abs=1e-3
            )
            top = {int(key): each["logprob"] for key, each in entry.items() if each["rank"] in (1, 2)}
            values, likeliest = expected[place].topk(2)
            assert top == {
                each: pytest.approx(value, abs=1e-3)
                for each, value in zip(likeliest.tolist(), values.tolist(), strict=True)
            }


def test_echo_scores_a_prompt_and_its_offsets_are_places_in_the_text(server, reference) -> None:
    text = "Größe, 東京 🙂 and café:"
    scored = complete(server, prompt=text, echo=True, max_tokens=0, logprobs=1)["choices"][0]
    went_on = complete(server, prompt=text, echo=True, max_tokens=6, logprobs=1, temperature=0)["choices"][0]
    assert scored["text"] == text
    assert went_on["text"].startswith(text)
    assert scored["finish_reason"] == "length"
    ids = reference.tokenizer(text).input_ids
    expected = reference.logprobs(ids)
    assert scored["logprobs"]["token_logprobs"] == [
        None,
        *(pytest.approx(float(expected[place, token]), abs=1e-3) for place, token in enumerate(ids[1:])),
    ]
    for name, column in scored["logprobs"].items():
        assert went_on["logprobs"][name][: len(column)] == [
            pytest.approx(each, abs=1e-4) if name != "tokens" else each for each in column
        ]
    columns = went_on["logprobs"]
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert went_on["text"][offset : offset + len(token)] == token


def test_log_probabilities_of_a_position_sum_to_at_most_one(server) -> None:
    answer = complete(server, prompt=TEXTS[1], max_tokens=6, temperature=0, logprobs=20)
    for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
        assert 0.3 < sum(map(math.exp, top.values())) <= 1 + 1e-5


def test_tokens_are_forced_forbidden_and_allowed(server, reference) -> None:
    asked = {"prompt": TEXTS[0], "temperature": 0, "max_tokens": 4, "return_token_ids": True}
    [paris] = reference.tokenizer(" Paris").input_ids
    [london] = reference.tokenizer(" London").input_ids
    plain = complete(server, **asked)["choices"][0]
    assert plain["token_ids"][0] == paris
    biased = complete(server, **asked, logit_bias={str(london): 100})["choices"][0]
    assert biased["token_ids"] == [london] * 4
    allowed = complete(server, **asked, allowed_token_ids=[london, 30])["choices"][0]
    assert set(allowed["token_ids"]) <= {london, 30}
    without = complete(server, **asked, bad_words=["Paris"])["choices"][0]
    assert "Paris" not in without["text"]
    sentence = plain["text"].strip()
    cut = complete(server, **asked, bad_words=[sentence])["choices"][0]
    assert cut["token_ids"][0] == paris  # only the token that would complete the words is forbidden
    assert cut["text"].strip() != sentence


def test_min_tokens_delays_the_end_and_ignore_eos_goes_past_it(server) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"messages": messages, "temperature": 0, "return_token_ids": True}
    plain = complete(server, "chat/completions", **asked)["choices"][0]
    assert plain["finish_reason"] == "stop"
    length = len(plain["token_ids"])
    later = complete(server, "chat/completions", **asked, min_tokens=length + 3, max_tokens=length + 20)
    assert len(later["choices"][0]["token_ids"]) >= length + 3
    assert plain["token_ids"][-1] not in later["choices"][0]["token_ids"][: length + 2]
    past = complete(server, "chat/completions", **asked, ignore_eos=True, max_tokens=length + 4)
    assert past["choices"][0]["token_ids"][:length] == plain["token_ids"]
    assert past["choices"][0]["finish_reason"] == "length"


def test_truncation_keeps_the_prompts_end(server, reference) -> None:
    answer = complete(
        server, prompt=STORY, truncate_prompt_tokens=7, max_tokens=3, temperature=0, return_token_ids=True
    )
    assert answer["choices"][0]["prompt_token_ids"] == reference.tokenizer(STORY).input_ids[-7:]
    assert answer["usage"]["prompt_tokens"] == 7


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"echo": True, "prompt_logprobs": 1},
        {"stop": [" in"], "include_stop_str_in_output": True},
        {"best_of": 3},
        {"use_beam_search": True},
    ],
)
def test_streamed_completions_are_the_whole_ones(server, extra) -> None:
    asked: dict[str, Any] = {
        "prompt": TEXTS[:2],
        "n": 2,
        "seed": 3,
        "max_tokens": 6,
        "logprobs": 2,
        "return_token_ids": True,
        **extra,
    }
    complete(server, **asked)  # from here on the prompts are cached, for the one as for the other
    whole = complete(server, **asked)
    *chunks, last = stream(server, **asked)
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        token_ids = [token_id for part in parts for token_id in part.get("token_ids", ())]
        assert token_ids == choice["token_ids"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
        assert [part[name] for part in parts for name in ("prompt_logprobs",) if name in part] == [
            choice[name] for name in ("prompt_logprobs",) if name in choice
        ]
        for name, column in choice["logprobs"].items():
            streamed = [each for part in parts if part["logprobs"] for each in part["logprobs"][name]]
            assert streamed == column


def test_streamed_chats_are_the_whole_ones(server) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Name a colour."}],
        "n": 3,
        "seed": 4,
        "temperature": 1.5,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 2,
    }
    complete(server, "chat/completions", **asked)
    whole = complete(server, "chat/completions", **asked)
    *chunks, last = stream(server, "chat/completions", **asked)
    assert last["usage"] == whole["usage"]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) > 1
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        content = "".join(part["delta"].get("content") or "" for part in parts)
        assert content == choice["message"]["content"]
        assert parts[0]["delta"]["role"] == "assistant"
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        logprobs = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
