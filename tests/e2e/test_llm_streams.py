"""`LLM.stream`, `infer` and `embed`, and what an LLM leaves behind; the tokens may be any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from pagewire import LLM, SamplingParams
from pagewire.base.errors import InvalidRequest
from pagewire.wire.sampling_params import BeamSearch

PROMPTS = ["Once upon a time", "The capital of France is", "One, two,"]
SAMPLING = SamplingParams(max_tokens=12, seed=3)
LONG = SamplingParams(max_tokens=1000, seed=3)
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llm(smollm2_dir: Path) -> Iterator[LLM]:
    with LLM(engine="null") as llm:
        yield llm


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        SamplingParams(max_tokens=12, seed=3, n=3),
        SamplingParams(max_tokens=12, seed=3, n=2, best_of=3),
        SamplingParams(max_tokens=5, n=2, beam_search=BeamSearch(width=2)),
    ],
    ids=["one", "several", "best", "beams"],
)
def test_pieces_together_are_what_generate_returns(llm: LLM, sampling: SamplingParams) -> None:
    whole = llm.generate(PROMPTS, sampling)
    texts = [[""] * sampling.n for _ in PROMPTS]
    ids: list[list[list[int]]] = [[[] for _ in range(sampling.n)] for _ in PROMPTS]
    finished, outputs = [], {}
    for piece in llm.stream(PROMPTS, sampling):
        texts[piece.prompt_index][piece.index] += piece.text
        ids[piece.prompt_index][piece.index] += piece.token_ids
        if piece.finish_reason is not None:
            finished.append((piece.prompt_index, piece.index))
        if piece.output is not None:
            outputs[piece.prompt_index] = piece.output
    assert texts == [[each.text for each in output.outputs] for output in whole]
    assert ids == [[each.token_ids for each in output.outputs] for output in whole]
    assert sorted(finished) == [(prompt, index) for prompt in range(3) for index in range(sampling.n)]
    assert [outputs[place].outputs for place in range(3)] == [output.outputs for output in whole]


def test_all_prompts_come_at_once(llm: LLM) -> None:
    places = [piece.prompt_index for piece in llm.stream(PROMPTS, SAMPLING)]
    assert places[:6] == [0, 1, 2, 0, 1, 2]


def test_a_stop_string_never_comes_and_ends_its_own_prompt_alone(llm: LLM) -> None:
    [whole] = llm.generate(PROMPTS[0], SAMPLING)
    word = whole.outputs[0].text.split()[5]
    stopping = SamplingParams(max_tokens=12, seed=3, stop=[word])
    texts, reasons = ["", ""], ["", ""]
    for piece in llm.stream([PROMPTS[0]] * 2, [stopping, SAMPLING]):
        texts[piece.prompt_index] += piece.text
        reasons[piece.prompt_index] = piece.finish_reason or ""
    assert texts == [whole.outputs[0].text.partition(word)[0], whole.outputs[0].text]
    assert reasons == ["stop", "length"]


def test_a_stream_that_is_closed_ends_its_requests_and_frees_the_llm(llm: LLM) -> None:
    with closing(llm.stream(messages=[QUESTION, QUESTION], sampling_params=LONG)) as pieces:
        assert next(pieces).token_ids
        with pytest.raises(InvalidRequest, match="has a stream open"):
            llm.generate("x", SAMPLING)
    assert llm._engine is not None
    assert not llm._engine.core.running
    assert len(llm.generate("x", SAMPLING)[0].outputs[0].token_ids) == 12


def test_what_is_wrong_is_said_before_anything_is_read(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="give either prompts or messages"):
        llm.stream()
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        llm.stream(["x", ""], SAMPLING)
    with pytest.raises(InvalidRequest, match=r"request_list\[1\] has no query"):
        llm.infer([{"query": "x"}, {"history": []}], SAMPLING)  # type: ignore[typeddict-item]
    with pytest.raises(InvalidRequest, match="history is not a list"):
        llm.infer([{"query": "x", "history": [["x"]]}], SAMPLING)


def test_infer_takes_history_and_gives_it_back_with_the_new_turn(llm: LLM) -> None:
    requests = [
        {"query": "Hi"},
        {"query": "And?", "history": [("Hi", "Hello.")], "system": "Short."},
    ]
    turns = [
        QUESTION,
        [
            {"role": "system", "content": "Short."},
            *QUESTION,
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And?"},
        ],
    ]
    expected = [output.outputs[0].text for output in llm.chat(turns, SAMPLING)]
    answers = llm.infer(requests, SAMPLING)
    assert [answer["response"] for answer in answers] == expected
    assert answers[0]["history"] == [["Hi", expected[0]]]
    assert answers[1]["history"] == [["Hi", "Hello."], ["And?", expected[1]]]
    first, *_, last = llm.infer(requests, SAMPLING, stream=True)
    assert last == answers
    assert all(
        whole["response"].startswith(part["response"]) for whole, part in zip(answers, first, strict=True)
    )


def test_embed_gives_an_array_in_the_order_of_the_texts(llm: LLM) -> None:
    vectors = llm.embed(["one", [1, 2, 3], "three"], pooling="mean")  # type: ignore[list-item]
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, 576))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    assert llm.embed("one", pooling="last", dimensions=7, normalize=False).shape == (1, 7)
    with pytest.raises(InvalidRequest, match="not made for embeddings; ask for a pooling"):
        llm.embed("one")
    with pytest.raises(InvalidRequest, match="dimensions is 577; this model's vectors have 576"):
        llm.embed("one", pooling="last", dimensions=577)


def test_an_llm_frees_everything_and_the_program_may_open_another(smollm2_dir: Path) -> None:
    def held() -> tuple[set[int], set[str], int]:
        children = {child.pid for child in psutil.Process().children(recursive=True)}
        return children, {thread.name for thread in threading.enumerate()}, psutil.Process().num_fds()

    states = []
    for _ in range(2):
        with LLM(engine="null") as llm:
            pieces = llm.stream(messages=QUESTION, sampling_params=LONG)
            next(pieces)
        with pytest.raises(InvalidRequest, match="closed"):
            for _ in pieces:
                pass
        states.append(held())
    assert states[0] == states[1]
    with pytest.raises(InvalidRequest, match="closed"):
        llm.embed("x", pooling="last")
