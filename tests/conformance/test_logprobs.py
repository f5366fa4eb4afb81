"""Log probabilities of answers and of prompts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.conformance.reference import Reference
from tests.conformance.target import Target
from tests.e2e.prompts import STORY

TALE = "Once upon a time, in a small village by the sea,"
UNICODE = "Größe, 東京 🙂 and café:"


def test_what_is_told_of_a_completion_is_a_distribution(target: Target) -> None:
    columns = (
        target.completion(prompt=TALE, max_tokens=8, seed=2, temperature=1.2, logprobs=5).choices[0].logprobs
    )
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs) == 8
    assert len({*columns.text_offset}) == 8
    for token, chosen, top in zip(columns.tokens, columns.token_logprobs, columns.top_logprobs, strict=True):
        assert 5 <= len(top) <= 6  # the chosen token may be besides the likeliest
        assert list(top.values())[:5] == sorted(top.values(), reverse=True)[:5]
        assert 0 < sum(map(math.exp, top.values())) <= 1 + 1e-5
        assert top[token] == pytest.approx(chosen, abs=1e-6)


def test_the_likeliest_twenty_are_most_of_it(target: Target) -> None:
    for top in target.choice(prompt=TALE, max_tokens=6, logprobs=20).logprobs.top_logprobs:
        assert 0.3 < sum(map(math.exp, top.values())) <= 1 + 1e-5


def test_what_is_told_of_a_chat_is_a_distribution(target: Target) -> None:
    messages = [{"role": "user", "content": "Name the capital of France."}]
    completion = target.chat(messages=messages, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3)
    content = completion.choices[0].logprobs.content
    assert len(content) == completion.usage.completion_tokens
    for position in content:
        logprobs = [each.logprob for each in position.top_logprobs]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(map(math.exp, logprobs)) <= 1 + 1e-5
        assert (position.token, position.logprob) == (position.top_logprobs[0].token, logprobs[0])  # greedy
        assert bytes(position.bytes).decode() == position.token
    assert "".join(each.token for each in content) == completion.choices[0].message.content


def test_log_probabilities_are_the_models_own(target: Target) -> None:
    """Before temperature, bias and penalties: whatever is asked for, the first position's are the same."""
    plain = target.choice(prompt=TALE, max_tokens=1, logprobs=5).logprobs.top_logprobs[0]
    for bent in ({"temperature": 2, "seed": 1}, {"logit_bias": {"42": 5}}, {"top_p": 0.1}):
        top = target.choice(prompt=TALE, max_tokens=1, logprobs=5, **bent).logprobs.top_logprobs[0]
        assert {token: top[token] for token in plain} == pytest.approx(plain, abs=1e-4)


@pytest.mark.extension
def test_an_answer_is_as_likely_as_a_prompt(target: Target) -> None:
    """Tokens have the same log probabilities whether the model wrote them or is made to read them."""
    [choice] = target.completion(
        prompt=TALE, max_tokens=10, temperature=1, seed=9, logprobs=0, return_token_ids=True
    ).choices
    ids = [*choice.prompt_token_ids, *choice.token_ids]
    [read] = target.completion(prompt=ids, max_tokens=1, prompt_logprobs=0).choices
    told = [
        entry[str(token)]["logprob"] for token, entry in zip(ids[1:], read.prompt_logprobs[1:], strict=True)
    ]
    assert told[-10:] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)


@pytest.mark.extension
def test_prompt_logprobs_are_those_of_a_forward_pass(float32_target: Target, reference: Reference) -> None:
    text = STORY * 3
    ids = reference.tokenizer(text).input_ids
    expected = reference.logprobs(ids)
    for _ in range(2):  # the second time the prompt is cached, and is read again all the same
        choice = float32_target.choice(prompt=text, max_tokens=1, prompt_logprobs=2, return_token_ids=True)
        assert choice.prompt_token_ids == ids
        first, *rest = choice.prompt_logprobs
        assert first is None
        for place, (token_id, entry) in enumerate(zip(ids[1:], rest, strict=True)):
            assert entry[str(token_id)]["logprob"] == pytest.approx(
                float(expected[place, token_id]), abs=1e-3
            )
            values, likeliest = (each.tolist() for each in expected[place].topk(2))
            top = {int(key): each["logprob"] for key, each in entry.items() if each["rank"] in (1, 2)}
            assert top == pytest.approx(dict(zip(likeliest, values, strict=True)), abs=1e-3)


@pytest.mark.extension
def test_chats_tell_of_their_prompts(target: Target) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    completion: Any = target.chat(messages=messages, max_tokens=1, prompt_logprobs=0, return_token_ids=True)
    assert completion.prompt_token_ids == target.tokenize(messages=messages)
    for token, entry in zip(completion.prompt_token_ids[1:], completion.prompt_logprobs[1:], strict=True):
        assert entry[str(token)]["logprob"] <= 0


@pytest.mark.extension
def test_echo_scores_a_prompt(float32_target: Target, reference: Reference) -> None:
    """max_tokens: 0 is vLLM's; the log probabilities are a forward pass's."""
    scored = float32_target.choice(prompt=UNICODE, echo=True, max_tokens=0, logprobs=1)
    assert (scored.text, scored.finish_reason) == (UNICODE, "length")
    ids = reference.tokenizer(UNICODE).input_ids
    expected = reference.logprobs(ids)
    first, *rest = scored.logprobs.token_logprobs
    assert first is None
    assert rest == [pytest.approx(float(expected[i, token]), abs=1e-3) for i, token in enumerate(ids[1:])]


def test_echo_puts_the_prompt_first(target: Target) -> None:
    plain = target.choice(prompt=UNICODE, max_tokens=6, logprobs=1)
    echoed = target.choice(prompt=UNICODE, max_tokens=6, logprobs=1, echo=True)
    assert echoed.text == UNICODE + plain.text
    columns = echoed.logprobs
    assert columns.tokens[-6:] == plain.logprobs.tokens
    assert columns.token_logprobs[-6:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
    assert columns.token_logprobs[0] is None
    assert all(each <= 0 for each in columns.token_logprobs[1:])
    for token, offset in zip(columns.tokens, columns.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert echoed.text[offset : offset + len(token)] == token
