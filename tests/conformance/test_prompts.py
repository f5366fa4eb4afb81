"""What becomes of prompts: truncation, the prefix cache, ids and the order of service."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.target import Target
from tests.e2e.prompts import STORY


@pytest.mark.extension
def test_truncation_keeps_the_prompts_end(target: Target) -> None:
    ids = target.tokenize(prompt=STORY)
    answer: Any = target.completion(
        prompt=STORY, truncate_prompt_tokens=7, max_tokens=3, temperature=0, return_token_ids=True
    )
    assert answer.choices[0].prompt_token_ids == ids[-7:]
    assert answer.usage.prompt_tokens == 7
    assert answer.choices[0].text == target.choice(prompt=ids[-7:], max_tokens=3).text


@pytest.mark.extension
def test_special_tokens_are_added_or_not(target: Target) -> None:
    for added in (True, False):
        choice = target.choice(prompt="a b", add_special_tokens=added, max_tokens=1, return_token_ids=True)
        assert choice.prompt_token_ids == target.tokenize(prompt="a b", add_special_tokens=added)


@pytest.mark.extension
def test_ids_are_returned_if_asked_for(target: Target) -> None:
    choice = target.choice(prompt="1, 2, 3,", max_tokens=6, return_token_ids=True)
    assert choice.prompt_token_ids == target.tokenize(prompt="1, 2, 3,")
    assert target.text(choice.token_ids) == choice.text
    assert not hasattr(target.choice(prompt="1, 2, 3,", max_tokens=6), "token_ids")
    chat: Any = target.chat(
        messages=[{"role": "user", "content": "Hi"}], max_tokens=3, temperature=0, return_token_ids=True
    )
    assert chat.prompt_token_ids == target.tokenize(messages=[{"role": "user", "content": "Hi"}])
    assert len(chat.choices[0].token_ids) == chat.usage.completion_tokens


@pytest.mark.extension
def test_prompts_of_other_salts_are_not_shared(target: Target) -> None:
    def cached(**salt: Any) -> int:
        usage = target.completion(prompt="Salt: " + STORY, max_tokens=1, **salt).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    found = [
        cached(**salt) for salt in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"})
    ]
    assert [count > 0 for count in found] == [False, True, False, False, True]


@pytest.mark.extension
def test_an_answer_has_the_id_that_was_asked_for(target: Target) -> None:
    answer = target.completion(prompt="a", max_tokens=1, request_id="mine-1", user="somebody")
    assert "mine-1" in answer.id
    raw = target.client.chat.completions.with_raw_response.create(
        model=target.model,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=1,
        user="somebody",
        extra_headers={"x-request-id": "mine-2"},
    )
    assert raw.headers["x-request-id"] == "mine-2"
    assert "mine-2" in raw.parse().id


@pytest.mark.extension
def test_lower_priorities_go_first(target: Target, model_directory: Path) -> None:
    """Behind a prompt of many steps, the later of two requests overtakes the earlier if its number is lower.
    (Only a slow enough server lets us see it.)"""
    finished: list[str] = []
    salt = str(time.monotonic())

    def ask(name: str, priority: int, length: int) -> None:
        prompt = [1000 + place for place in range(length)]
        target.completion(prompt=prompt, priority=priority, max_tokens=1, cache_salt=name + salt)
        finished.append(name)

    def waiting() -> int:
        return int(target.http.get("/load").json()["num_requests_waiting"])

    threads = []
    for name, priority, length in (("long", 0, 1300), ("patient", 5, 300), ("urgent", -5, 300)):
        threads.append(threading.Thread(target=ask, args=(name, priority, length)))
        threads[-1].start()
        while waiting() < len(threads) - 1:
            assert not finished
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert finished == ["long", "urgent", "patient"]
