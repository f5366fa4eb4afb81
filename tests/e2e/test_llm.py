"""`LLM`: the offline API, over the same core, dispatch and worker process as the service."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pagewire import LLM, SamplingParams
from pagewire.base.errors import ConfigError, InvalidRequest, Unavailable
from pagewire.wire.sampling_params import BeamSearch, StructuredOutput, seed_of_completion
from tests.unit.corrupt.samples import write_directory

GREEDY = SamplingParams(temperature=0, max_tokens=16)
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)
QUESTION = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def llm(smollm2_dir: Path) -> Iterator[LLM]:
    with LLM(max_model_len=256, kv_cache_memory=1 << 28) as llm:
        yield llm


def test_texts_and_ids_come_back_in_order_with_everything_about_them(llm: LLM) -> None:
    outputs = llm.generate(["The capital of France is", [504, 3575, 282, 4649, 314]], GREEDY)
    assert outputs[0].prompt == "The capital of France is"
    assert outputs[1].prompt is None
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids == [504, 3575, 282, 4649, 314]
    first, second = outputs[0].outputs[0], outputs[1].outputs[0]
    assert first.text.startswith(" Paris")
    assert (first.text, first.token_ids) == (second.text, second.token_ids)
    assert (first.finish_reason, len(first.token_ids)) == ("length", 16)


def test_chat_renders_the_template_and_ends_at_the_end_of_the_turn(llm: LLM) -> None:
    [one] = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32))
    both = llm.chat([QUESTION, QUESTION], SamplingParams(temperature=0, max_tokens=32))
    assert one.outputs[0].text == "The capital of France is Paris."
    assert (one.outputs[0].finish_reason, one.outputs[0].stop_reason) == ("stop", None)
    assert [output.outputs[0].text for output in both] == [one.outputs[0].text] * 2


def test_stop_strings_and_stop_tokens_end_the_text_and_say_so(llm: LLM) -> None:
    whole = llm.generate("The capital of France is", GREEDY)[0].outputs[0]
    cut = SamplingParams(temperature=0, max_tokens=16, stop=["aris"])
    by_string = llm.generate("The capital of France is", cut)[0].outputs[0]
    assert (by_string.text, by_string.stop_reason, by_string.finish_reason) == (" P", "aris", "stop")
    by_token = llm.generate(
        "The capital of France is",
        SamplingParams(temperature=0, max_tokens=16, stop_token_ids=[whole.token_ids[2]]),
    )[0].outputs[0]
    assert by_token.token_ids == whole.token_ids[:3]
    assert by_token.stop_reason == whole.token_ids[2]


def test_logprobs_have_one_entry_a_token_and_the_greedy_choice_is_the_likeliest(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    completion = llm.generate("One, two,", params)[0].outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 5
    for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(entry.top.items())) == (token_id, pytest.approx(entry.logprob))
        assert len(entry.top) == 3


def test_a_salt_keeps_a_prompt_to_itself(llm: LLM) -> None:
    ids = list(range(1000, 1040))
    llm.generate({"prompt_token_ids": ids, "cache_salt": "mine"}, GREEDY)
    params = [GREEDY, GREEDY, GREEDY]
    prompts = [{"prompt_token_ids": ids, "cache_salt": salt} for salt in ("mine", "yours")]
    mine, yours, bare = llm.generate([*prompts, ids], params)
    assert mine.num_cached_tokens > 0
    assert (yours.num_cached_tokens, bare.num_cached_tokens) == (0, 0)
    assert mine.outputs[0].token_ids == yours.outputs[0].token_ids == bare.outputs[0].token_ids


def test_prompts_are_cut_to_their_end(llm: LLM) -> None:
    [cut] = llm.generate({"prompt": "So: The capital of France is"}, GREEDY, truncate_prompt_tokens=4)
    assert cut.prompt == "So: The capital of France is"
    assert cut.prompt_token_ids == llm.generate("The capital of France is", GREEDY)[0].prompt_token_ids[-4:]
    [long] = llm.generate([list(range(1000, 1400))], GREEDY, truncate_prompt_tokens=-1)
    assert long.prompt_token_ids == list(range(1400 - (256 - 16), 1400))
    assert len(long.outputs[0].token_ids) == 16


@pytest.mark.parametrize(
    ("prompt", "truncation", "said"),
    [
        ({"text": "x"}, None, "'prompt_token_ids', and may have 'cache_salt'"),
        ({}, None, "a prompt has nothing"),
        ({"prompt": "x", "cache_salt": "x" * 257}, None, "cache_salt has 257 characters"),
        ("x", 0, "truncate_prompt_tokens is 0"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_named(llm: LLM, prompt, truncation, said) -> None:
    with pytest.raises(InvalidRequest, match=said):
        llm.generate(prompt, GREEDY, truncate_prompt_tokens=truncation)


def test_samples_and_beams_and_their_prompts(llm: LLM) -> None:
    """What the service does with the same parameters, test_completions.py compares with transformers."""
    text = "The capital of France is"
    params = [
        SamplingParams(temperature=1, seed=3, n=3, max_tokens=6, prompt_logprobs=1),
        SamplingParams(temperature=1, seed=seed_of_completion(3, 1), max_tokens=6),
        SamplingParams(n=2, beam_search=BeamSearch(width=3, length_penalty=0.5), max_tokens=6, logprobs=1),
        SamplingParams(temperature=0, max_tokens=4, bad_words=["Paris"]),
        SamplingParams(max_tokens=0, prompt_logprobs=0),
    ]
    several, alone, beams, without, scored = llm.generate([text] * 5, params)
    assert [output.index for output in several.outputs] == [0, 1, 2]
    assert len({output.text for output in several.outputs}) == 3
    assert several.outputs[1].token_ids == alone.outputs[0].token_ids
    assert several.prompt_logprobs is not None
    assert scored.prompt_logprobs is not None
    assert [entry and entry.logprob for entry in several.prompt_logprobs] == [
        entry and pytest.approx(entry.logprob, abs=1e-4) for entry in scored.prompt_logprobs
    ]
    assert (several.prompt_logprobs[0], len(several.prompt_logprobs)) == (None, 5)
    assert (scored.outputs[0].token_ids, scored.outputs[0].text) == ([], "")
    assert "Paris" not in without.outputs[0].text
    for output in beams.outputs:
        assert output.logprobs is not None
        total = sum(entry.logprob for entry in output.logprobs)
        assert output.score == pytest.approx(total / len(output.token_ids) ** 0.5, abs=1e-5)
    assert beams.outputs[0].score > beams.outputs[1].score


def test_best_of_keeps_the_highest_mean_log_probability(llm: LLM) -> None:
    every = SamplingParams(temperature=1.2, seed=5, n=4, max_tokens=6, logprobs=0)
    best = SamplingParams(temperature=1.2, seed=5, n=2, best_of=4, max_tokens=6)
    all_of_them, kept = llm.generate(["Once upon a time"] * 2, [every, best])
    means = {
        output.text: sum(entry.logprob for entry in output.logprobs or ()) / len(output.token_ids)
        for output in all_of_them.outputs
    }
    ranked = sorted(means, key=means.__getitem__, reverse=True)
    assert [output.text for output in kept.outputs] == ranked[:2]
    assert [output.logprobs for output in kept.outputs] == [None, None]


def test_constrained_and_free_prompts_are_completed_together(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    person = StructuredOutput(json_schema=json.dumps(schema))
    either = StructuredOutput(choices=["Berlin", "London"])
    params = [
        SamplingParams(temperature=0, max_tokens=64, structured_output=person),
        SamplingParams(temperature=0, structured_output=either),
        GREEDY,
    ]
    prompts = ["A person as JSON:", "The capital of France is", "The capital of France is"]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    written = json.loads(outputs[0].text)
    assert {name: type(value) for name, value in written.items()} == {"name": str, "age": int}
    assert outputs[1].text in ("Berlin", "London")
    assert [(output.finish_reason, output.stop_reason) for output in outputs[:2]] == [("stop", None)] * 2
    assert outputs[2].text == llm.generate(prompts[2], GREEDY)[0].outputs[0].text


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", GREEDY, "the prompt is empty"),
        ([1] * 256, GREEDY, "at most 255"),
        ([49_152], GREEDY, "out of range"),
        ([-1], GREEDY, "negative"),
        (["a", "b"], [GREEDY], "1 sampling_params for 2 prompts"),
        ("a", SamplingParams(logit_bias={99_999: 1.0}), "logit_bias"),
        ("a", SamplingParams(structured_output=StructuredOutput(json_schema='{"not": {}}')), '"not"'),
    ],
)
def test_bad_prompts_and_parameters_are_refused_before_anything_is_computed(
    llm: LLM, prompt: object, params: object, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompt, params)  # type: ignore[arg-type]
    assert llm.generate("a", ONE_TOKEN)[0].outputs[0].token_ids


def test_wrong_options_and_models_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown model"):
        LLM("no-such-model")
    with pytest.raises(ConfigError, match="dtype"):
        LLM(dtype="int3")
    with pytest.raises(ConfigError, match="block"):
        LLM(str(write_directory(tmp_path / "tiny")), kv_cache_memory=1)


def test_a_worker_that_hangs_is_killed_and_the_error_says_over_what(smollm2_dir: Path) -> None:
    with LLM(engine="null", step_timeout=0.2) as llm:
        assert llm._engine is not None
        assert len(llm.generate("Hello", GREEDY)[0].outputs[0].token_ids) == 16
        process = llm._engine._workers.processes[0]
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match=r"hung and was killed: step \d+ with 1 request .*step_timeout"):
            llm.generate("Hello", GREEDY)
        assert process.wait(5) == -signal.SIGKILL


def test_a_dead_worker_is_an_error_with_its_log_and_closing_leaves_no_process(smollm2_dir: Path) -> None:
    before = set(psutil.Process().children())
    llm = LLM(engine="null")
    assert llm._engine is not None
    os.kill(llm._engine._workers.processes[0].pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="engine-worker ended with status -9"):
        llm.generate("a", GREEDY)
    llm.close()
    llm.close()
    assert set(psutil.Process().children()) <= before
    with pytest.raises(InvalidRequest, match="closed"):
        llm.generate("a", GREEDY)
