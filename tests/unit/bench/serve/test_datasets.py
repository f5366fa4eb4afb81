"""What is asked: lengths from the seed, contents that are new, prefixes that are shared as told."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.base.errors import ConfigError
from pagewire.bench.serve.dataset_files import TRACE_BLOCK, Trace, read_conversations, read_trace
from pagewire.bench.serve.datasets import (
    SHAREGPT_INPUT,
    SHAREGPT_OUTPUT,
    Dataset,
    RandomDataset,
    ShareGptLike,
)
from pagewire.bench.serve.prompts import PromptMaker
from pagewire.bench.serve.tokenizer_file import find_tokenizer
from pagewire.bench.workloads import Lengths

IDS = PromptMaker(vocab_size=500)
WORDS = PromptMaker("text")
RANDOM = RandomDataset(maker=IDS, input=Lengths(5, 40), output=Lengths(2, 9))


def lengths(dataset: Dataset, run: str = "a", count: int = 50) -> list[tuple[int, int]]:
    asks = [dataset.ask(run, index) for index in range(count)]
    return [(ask.prompt_len, ask.output_len) for ask in asks]


@given(index=st.integers(0, 10**6), run=st.text(max_size=5))
def test_a_random_request_has_its_lengths_and_is_the_same_whoever_asks(index: int, run: str) -> None:
    ask = RANDOM.ask(run, index)
    assert len(ask.prompt) == ask.prompt_len
    assert 5 <= ask.prompt_len <= 40
    assert 2 <= ask.output_len <= 9
    assert all(0 <= token_id < 500 for token_id in ask.prompt if isinstance(token_id, int))
    assert replace(RANDOM).ask(run, index) == ask


@pytest.mark.parametrize("dataset", [RANDOM, ShareGptLike(maker=IDS), replace(RANDOM, prefix_len=8)])
def test_lengths_are_the_seeds_and_contents_are_new_for_every_run_and_measurement(dataset: Dataset) -> None:
    asks = [dataset.ask(run, 3) for run in ("run 0", "run 1")]
    asks.append(replace(dataset, contents="another").ask("run 0", 3))
    assert len({ask.prompt_len for ask in asks}) == 1
    assert len({str(ask.prompt[:5]) for ask in asks}) == 3
    assert lengths(dataset, "a") == lengths(replace(dataset, contents="x"), "b")
    assert lengths(dataset) != lengths(replace(dataset, seed=1))


def test_prefixes_are_shared_by_groups() -> None:
    dataset = replace(RANDOM, prefix_len=16, num_prefixes=3)
    asks = [dataset.ask("a", index) for index in range(60)]
    assert len({str(ask.prompt[:16]) for ask in asks}) == 3
    assert len({str(ask.prompt[16:]) for ask in asks}) == 60
    assert all(21 <= ask.prompt_len == len(ask.prompt) <= 56 for ask in asks)


def test_lengths_like_sharegpts() -> None:
    found = lengths(ShareGptLike(maker=IDS), count=4000)
    for values, law in zip(zip(*found, strict=True), (SHAREGPT_INPUT, SHAREGPT_OUTPUT), strict=True):
        assert min(values) >= 1
        assert max(values) <= law.longest
        # the longest are drawn again, which takes a little off the mean
        assert 0.75 * law.mean < statistics.mean(values) < law.mean
        assert statistics.median(values) < statistics.mean(values)


def test_words_stand_for_tokens_where_there_is_no_tokenizer() -> None:
    ask = replace(RANDOM, maker=WORDS, prefix_len=4).ask("a", 1)
    assert isinstance(ask.prompt, str)
    assert len(ask.prompt.split()) == ask.prompt_len
    assert WORDS.count("x" * 40) == 10


def test_text_has_as_many_tokens_as_its_tokenizer_counts(smollm2_dir: Path) -> None:
    maker = PromptMaker("text", tokenizer_file=find_tokenizer(str(smollm2_dir)))
    exact = 0
    for seed in range(20):
        text = maker.prompt(maker.token_ids(random.Random(seed), 100))
        assert isinstance(text, str)
        assert text.isascii()
        assert abs(maker.count(text) - 100) <= 2
        exact += maker.count(text) == 100
    assert exact >= 15


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read"):
        PromptMaker("text", tokenizer_file=find_tokenizer(str(tmp_path / "tokenizer.json"))).count("x")
    with pytest.raises(ConfigError, match=r"it must be a tokenizer\.json"):
        find_tokenizer(str(tmp_path / "missing"))


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def row(timestamp: float, input_length: int, output_length: int = 5, *hash_ids: int) -> dict[str, object]:
    fields = {"timestamp": timestamp, "input_length": input_length, "output_length": output_length}
    return {**fields, **({"hash_ids": list(hash_ids)} if hash_ids else {})}


def test_a_trace_is_replayed_at_its_times_with_its_shared_blocks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl", row(3000, 600, 7, 1, 2), row(1000, 1100, 5, 1, 3, 4), row(1500, 20), row(9, 0)
    )
    trace = read_trace(path, IDS, 0, speed=2.0)
    assert isinstance(trace, Trace)
    assert [trace.offset(index) for index in range(3)] == [0.0, 0.25, 1.0]
    first, second, third = (trace.ask("a", index).prompt for index in range(3))
    assert [len(first), len(second), len(third)] == [1100, 20, 600]
    assert first[:TRACE_BLOCK] == third[:TRACE_BLOCK]
    assert first[TRACE_BLOCK:] != third[TRACE_BLOCK:]
    assert trace.ask("a", 2).output_len == 7
    assert trace.ask("b", 0).prompt[:9] != first[:9]


def test_a_trace_with_too_few_blocks_is_filled(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.jsonl", row(0, 700, 5, 1), row(0, 700, 6, 1)), IDS, 0, 1.0)
    first, second = (trace.ask("a", index).prompt for index in range(2))
    assert len(first) == len(second) == 700
    assert first[:TRACE_BLOCK] == second[:TRACE_BLOCK]
    assert first[TRACE_BLOCK:] != second[TRACE_BLOCK:]


def test_azures_traces(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = read_trace(path, IDS, 0, 1.0)
    assert lengths(trace, count=2) == [(374, 44), (396, 109)]
    assert trace.offset(1) == pytest.approx(4.314579, abs=1e-5)


def talk(*values: str) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": value} for value in values]}


def test_conversations_give_their_first_question_and_the_length_of_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    short, long = talk("hi", "x" * 80), talk("q" * 8000, "x" * 80)
    path.write_text(
        json.dumps([talk("q" * 40, "a" * 80, "more"), short, long, talk("alone"), talk("p" * 20, "b" * 40)])
    )
    dataset = read_conversations(path, WORDS, 0)
    assert dataset.size == 2
    found = sorted(
        (ask.prompt, ask.prompt_len, ask.output_len) for ask in (dataset.ask("a", i) for i in range(2))
    )
    assert found == [("p" * 20, 5, 10), ("q" * 40, 10, 20)]
    assert dataset.ask("a", 2) == dataset.ask("b", 0)


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"conversations": 3}]', "{}", '[{"x": []}]'])
def test_files_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"file\.json: "):
        read_conversations(path, WORDS, 0)
    with pytest.raises(ConfigError, match=r"file\.json: "):
        read_trace(path, IDS, 0, 1.0)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "missing", IDS, 0, 1.0)
