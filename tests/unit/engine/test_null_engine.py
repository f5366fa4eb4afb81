"""The null engine answers any plan in form, at the rate that it is told."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from engine.config import WorkerConfig
from engine.dispatch.facts import WorkerFacts
from engine.dispatch.records import NewRequest, StepPlan, StepResult
from engine.dispatch.sampling import Pooling, SamplingRecord, U32Array, u32
from engine.models.families import load_model_config
from engine.null.build import NUM_BLOCKS, build_null_worker
from engine.null.runner import NullRunner
from engine.null.text import NullText, text_token_ids
from pagewire.base.errors import ConfigError
from pagewire.hub.tokenizer.token_pieces import read_tokenizer

VOCAB = 100
EOS = 7
WORDS = u32([20, 30, 40, 50, 60, 70])
HIDDEN = 16


def new_runner(*, step_ms: float = 0.0, prompt_us: float = 0.0) -> NullRunner:
    return NullRunner(
        NullText(WORDS),
        max_num_seqs=8,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        eos_token_ids=(EOS,),
        step_seconds=step_ms / 1e3,
        prompt_token_seconds=prompt_us / 1e6,
    )


def new_request(row: int, num_tokens: int = 4, **sampling: object) -> NewRequest:
    return NewRequest(row, u32([1] * num_tokens), num_tokens, u32([0]), SamplingRecord(**sampling))  # type: ignore[arg-type]


def plan(
    columns: list[tuple[int, int, int, int]],
    new: list[NewRequest] | None = None,
    masks: dict[int, U32Array] | None = None,
    freed: list[int] | None = None,
) -> StepPlan:
    """Columns are (row, start, count, samples)."""
    rows, starts, counts, samples = (u32(column) for column in zip(*columns, strict=True))
    none = u32([0] * len(columns))
    return StepPlan(1, u32(freed or []), new or [], rows, starts, counts, samples, none, u32([]), masks or {})


def step(runner: NullRunner, *args: object, **kwargs: object) -> StepResult:
    result = runner.launch(plan(*args, **kwargs)).result()  # type: ignore[arg-type]
    assert result.error == ""
    return result


def generate(runner: NullRunner, seed: int, num_tokens: int = 20) -> list[int]:
    tokens = step(runner, [(0, 0, 4, 1)], [new_request(0, seed=seed)]).token_ids.tolist()
    for position in range(4, 3 + num_tokens):
        tokens += step(runner, [(0, position, 1, 1)]).token_ids.tolist()
    return tokens


def test_tokens_depend_on_seed_and_position_alone() -> None:
    runner = new_runner()
    first = generate(runner, seed=5)
    assert set(first) <= set(WORDS.tolist())
    assert generate(runner, seed=5) == first
    assert generate(runner, seed=6) != first
    # Preempted after ten tokens and recomputed in another row, beside another request.
    resumed = [new_request(3, 14, seed=5), new_request(1, 4, seed=6)]
    assert step(runner, [(1, 0, 4, 1), (3, 0, 14, 1)], resumed).token_ids[1] == first[10]


def test_a_chunk_that_ends_before_its_request_samples_nothing() -> None:
    runner = new_runner()
    result = step(runner, [(0, 0, 2, 0), (1, 0, 4, 1)], [new_request(0), new_request(1)])
    assert len(result.token_ids) == 1


def test_a_step_takes_its_time_and_prompts_add_theirs() -> None:
    runner = new_runner(step_ms=5, prompt_us=100)
    began = time.monotonic()
    prompt = step(runner, [(0, 0, 200, 1)], [new_request(0, 200)])
    decode = step(runner, [(0, 200, 1, 1)])
    assert time.monotonic() - began >= 0.030
    assert prompt.execute_us >= 25_000 > decode.execute_us >= 5_000


def test_allowed_tokens_and_masks_are_obeyed_and_a_mask_that_allows_the_end_ends() -> None:
    runner = new_runner()
    mask = np.zeros(4, np.uint32)
    mask[1] = 1 << 3 | 1 << 9  # 35 and 41
    for start in range(4, 12):
        new = [new_request(0, allowed_token_ids=(3, 4)), new_request(1)] if start == 4 else []
        result = step(runner, [(0, start, 1, 1), (1, start, 1, 1)], new, {1: mask})
        assert result.token_ids[0] in (3, 4)
        assert result.token_ids[1] in (35, 41)
    mask[0] = 1 << EOS
    assert step(runner, [(1, 12, 1, 1)], masks={0: mask}).token_ids.tolist() == [EOS]


def test_log_probabilities_and_pooled_states_are_well_formed() -> None:
    runner = new_runner()
    new = [
        new_request(0, 6, logprobs=3, prompt_logprobs=2),
        new_request(1, 4),
        new_request(2, 4, pooling=Pooling.LAST),
    ]
    first = step(runner, [(0, 0, 4, 0), (1, 0, 4, 1), (2, 0, 4, 0)], new)
    assert first.logprobs == {}
    assert first.prompt_logprobs[0].first == 1
    assert first.prompt_logprobs[0].top_ids.shape == first.prompt_logprobs[0].top_logprobs.shape == (4, 2)
    assert np.linalg.norm(first.pooled[2]) == pytest.approx(1)
    assert len(first.pooled[2]) == HIDDEN
    second = step(runner, [(1, 4, 1, 1), (0, 4, 2, 1)], freed=[2])
    assert list(second.logprobs) == [1]
    assert len(second.logprobs[1].top_ids) == len(second.logprobs[1].top_logprobs) == 3
    assert len(second.prompt_logprobs[0].logprobs) == 1
    # A row that another request took over is answered as that one asks.
    assert step(runner, [(0, 0, 4, 1)], [new_request(0)], freed=[0]).logprobs == {}


def test_a_plan_beyond_its_rows_is_an_error_and_not_the_end() -> None:
    runner = new_runner()
    assert "IndexError" in runner.launch(plan([(9, 0, 1, 1)])).result().error
    assert generate(runner, seed=1)


def test_its_text_is_words(smollm2_dir: Path) -> None:
    tokenizer: Tokenizer = read_tokenizer(smollm2_dir)
    ids = text_token_ids(smollm2_dir, frozenset(), tokenizer.get_vocab_size())
    assert len(ids) > 10_000
    text = tokenizer.decode(ids[::100].tolist())
    assert text.isascii()
    assert text.count(" ") > 100


def test_its_facts_are_the_models_and_its_context_may_be_longer(smollm2_dir: Path) -> None:
    def facts(**values: object) -> WorkerFacts:
        config = WorkerConfig(model=str(smollm2_dir), socket=Path("unused"), engine="null", **values)  # type: ignore[arg-type]
        return build_null_worker(config).facts

    own = facts()
    assert (own.limits.vocab_size, own.eos_token_ids, own.limits.max_model_len) == (49152, (2,), 8192)
    assert facts(max_model_len=100_000).limits.max_model_len == 100_000
    assert facts(max_model_len=100_000, num_blocks=100).limits.max_model_len == 1600


def test_its_facts_have_the_models_kv_groups(smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model_config(smollm2_dir)
    layers = [replace(layer, sliding_window=i % 3 and 512) for i, layer in enumerate(model.layers)]
    mixed = replace(model, layers=tuple(layers))
    monkeypatch.setattr("engine.null.build.load_model_config", lambda directory: mixed)
    limits = build_null_worker(
        WorkerConfig(model=str(smollm2_dir), socket=Path("unused"), engine="null")
    ).facts.limits
    assert limits.kv_windows == (0, 512, 512)
    assert limits.num_blocks == 3 * NUM_BLOCKS


def test_its_options_need_it() -> None:
    with pytest.raises(ConfigError, match="unless the engine is null"):
        WorkerConfig(model="m", socket=Path("s"), null_step_ms=5)
    with pytest.raises(ConfigError, match="one of model, null"):
        WorkerConfig(model="m", socket=Path("s"), engine="nil")
    with pytest.raises(ConfigError, match="null_prompt_us is -1"):
        WorkerConfig(model="m", socket=Path("s"), engine="null", null_prompt_us=-1)
