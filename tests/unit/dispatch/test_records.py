"""Plans and results survive their binary form, and damaged records are refused, never misread silently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dispatch.control import RING_SLOTS
from engine.dispatch.limits import MAX_BAD_WORD_TOKENS, EngineLimits, mask_words
from engine.dispatch.records import (
    NewRequest,
    PromptLogprobs,
    StepPlan,
    StepResult,
    TokenLogprobs,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
    plan_bytes,
    result_bytes,
)
from engine.dispatch.ring import RingShape
from engine.dispatch.sampling import F32, U32, Pooling, RecordError, SamplingRecord, u32

WORD = st.integers(0, 2**32 - 1)
FLOAT = st.floats(width=32, allow_nan=False)
IDS = st.lists(WORD, max_size=8)

samplings = st.builds(
    SamplingRecord,
    temperature=FLOAT,
    top_p=FLOAT,
    top_k=st.integers(0, 2**31 - 1),
    min_p=FLOAT,
    repetition_penalty=FLOAT,
    presence_penalty=FLOAT,
    frequency_penalty=FLOAT,
    seed=st.integers(-(2**63), 2**63 - 1),
    min_tokens=st.integers(0, 2**31 - 1),
    logprobs=st.integers(-1, 20),
    masked_until_min_tokens=IDS.map(tuple),
    logit_bias=st.lists(st.tuples(WORD, FLOAT), max_size=4).map(tuple),
    allowed_token_ids=IDS.map(tuple),
    bad_words=st.lists(st.lists(WORD, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    prompt_logprobs=st.integers(-1, 20),
    pooling=st.sampled_from(Pooling),
)
new_requests = st.builds(
    NewRequest,
    row=WORD,
    token_ids=IDS.map(u32),
    num_prompt_tokens=WORD,
    block_ids=IDS.map(u32),
    sampling=samplings,
)


@st.composite
def masks(draw: Any) -> dict[int, np.ndarray]:
    width = draw(st.integers(1, 3))
    words = st.lists(WORD, min_size=width, max_size=width).map(u32)
    return draw(st.dictionaries(st.integers(0, 7), words, max_size=3))


@st.composite
def plans(draw: Any) -> StepPlan:
    n = draw(st.integers(0, 5))
    columns = [u32(draw(st.lists(WORD, min_size=n, max_size=n))) for _ in range(4)]
    counts = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    blocks = draw(st.lists(WORD, min_size=sum(counts), max_size=sum(counts)))
    return StepPlan(
        draw(st.integers(0, 2**64 - 1)),
        u32(draw(IDS)),
        draw(st.lists(new_requests, max_size=3)),
        *columns,
        u32(counts),
        u32(blocks),
        draw(masks()),
        u32(draw(st.lists(st.tuples(WORD, WORD), max_size=3))).reshape(-1, 2),
    )


@st.composite
def prompt_logprobs(draw: Any) -> PromptLogprobs:
    n, k = draw(st.integers(0, 3)), draw(st.integers(0, 2))

    def array(values: Any, size: int, dtype: np.dtype) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype)

    logprobs, top_ids = array(FLOAT, n, F32), array(WORD, n * k, U32).reshape(n, k)
    top_logprobs = array(FLOAT, n * k, F32).reshape(n, k)
    return PromptLogprobs(draw(WORD), draw(WORD), logprobs, top_ids, top_logprobs)


@st.composite
def pooled_states(draw: Any) -> dict[int, np.ndarray]:
    size = draw(st.integers(1, 3))
    states = st.lists(FLOAT, min_size=size, max_size=size).map(lambda values: np.array(values, F32))
    return draw(st.dictionaries(st.integers(0, 7), states, max_size=3))


@st.composite
def results(draw: Any) -> StepResult:
    tokens = draw(IDS)
    logprobs = {}
    for index in draw(st.sets(st.integers(0, 7), max_size=3)):
        top = draw(st.lists(st.tuples(WORD, FLOAT), max_size=4))
        ids, values = [id_ for id_, _ in top], [value for _, value in top]
        logprobs[index] = TokenLogprobs(draw(FLOAT), np.array(ids, U32), np.array(values, F32))
    execute_us, launch_us, error = draw(WORD), draw(WORD), draw(st.text(max_size=20))
    prompts, pooled = draw(st.lists(prompt_logprobs(), max_size=2)), draw(pooled_states())
    step_id = draw(st.integers(0, 2**64 - 1))
    is_last = draw(st.booleans())
    return StepResult(step_id, u32(tokens), logprobs, execute_us, error, prompts, pooled, is_last, launch_us)


def plain(value: Any) -> Any:
    """Arrays as lists, dataclasses as tuples, for comparison."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return [plain(getattr(value, name)) for name in value.__dataclass_fields__]
    return value


@given(plans())
def test_a_plan_survives_encoding(plan: StepPlan) -> None:
    assert plain(decode_plan(encode_plan(plan))) == plain(plan)


@given(results())
def test_a_result_survives_encoding(result: StepResult) -> None:
    assert plain(decode_result(encode_result(result))) == plain(result)


@given(plans(), results(), st.data())
def test_a_damaged_record_is_refused_or_decodes_to_something_of_the_same_size(
    plan: StepPlan, result: StepResult, data: st.DataObject
) -> None:
    for record, decode in ((encode_plan(plan), decode_plan), (encode_result(result), decode_result)):
        damaged = bytearray(record)
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] ^= data.draw(st.integers(1, 255))
        with_cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
        for candidate in (bytes(damaged), with_cut):
            try:
                decode(candidate)
            except RecordError:
                continue
            assert len(candidate) == len(record)


def test_a_record_of_another_version_is_refused() -> None:
    record = bytearray(encode_result(StepResult(0, u32([]))))
    record[0] += 1
    with pytest.raises(RecordError, match="version"):
        decode_result(bytes(record))


LIMITS = EngineLimits(
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    max_model_len=512,
    num_blocks=64,
    vocab_size=1000,
    hidden_size=24,
)


@pytest.mark.parametrize("kv_windows", [(0,), (0, 64, 64)])
def test_the_largest_plan_and_result_fit_their_slots(kv_windows: tuple[int, ...]) -> None:
    limits, num_groups = replace(LIMITS, kv_windows=kv_windows), len(kv_windows)
    words = limits.max_new_words
    new = [NewRequest(row, u32([0] * (words // 4)), 1, u32([]), SamplingRecord()) for row in range(4)]
    ones, blocks = u32([1] * 4), u32([0] * (4 + 64 // 16) * num_groups)
    masks = {index: u32([0] * mask_words(1000)) for index in range(4)}
    copied = u32([(0, 1)] * 4 * num_groups)
    columns = (ones, ones, ones, ones, u32([2] * 4))
    plan = StepPlan(0, u32(range(4)), new, *columns, blocks, masks, copied, num_groups)
    assert sum(request.num_words for request in new) == words
    assert words // 4 * 4 == words
    assert plan_bytes(limits) - 128 <= len(encode_plan(plan)) <= plan_bytes(limits)
    top = TokenLogprobs(0.0, [0] * 20, [0.0] * 20)
    assert (limits.max_prompt_logprobs, limits.max_pooled) == (64, 4)
    tops = np.zeros((16, 20), U32), np.zeros((16, 20), F32)
    prompts = [PromptLogprobs(index, 1, np.zeros(16, F32), *tops) for index in range(4)]
    pooled = {index: np.zeros(24, F32) for index in range(4)}
    result = StepResult(
        0,
        u32([0] * 4),
        dict.fromkeys(range(4), top),
        error="x" * 9999,
        prompt_logprobs=prompts,
        pooled=pooled,
    )
    assert result_bytes(limits) - 128 <= len(encode_result(result)) <= result_bytes(limits)


def test_a_request_with_the_longest_lists_fits_a_plan() -> None:
    sampling = SamplingRecord(
        masked_until_min_tokens=tuple(range(1024)),
        logit_bias=((0, 1.0),) * 1024,
        allowed_token_ids=tuple(range(1024)),
        bad_words=((7,),) * MAX_BAD_WORD_TOKENS,
    )
    request = NewRequest(0, u32([0] * 512), 512, u32(range(32)), sampling)
    assert request.num_words <= LIMITS.max_new_words
    one = u32([1])
    plan = StepPlan(0, u32([]), [request], one, one, one, one, u32([0]), u32([]))
    assert len(encode_plan(plan)) <= plan_bytes(LIMITS)
    assert decode_plan(encode_plan(plan)).new_requests[0].sampling == sampling


def test_the_rings_of_a_large_model_stay_small() -> None:
    """Of masks, prompt log probabilities and pooled states, what one step may hold is bounded."""
    limits = EngineLimits(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        block_size=16,
        max_model_len=131_072,
        num_blocks=1 << 16,
        vocab_size=151_936,
        hidden_size=8192,
    )
    assert (limits.max_prompt_logprobs, limits.max_pooled) == (2048, 128)
    shapes = [RingShape(size, RING_SLOTS) for size in (plan_bytes(limits), result_bytes(limits))]
    assert sum(shape.segment_bytes for shape in shapes) < 60 * 2**20


def test_masks_of_different_sizes_are_not_sent() -> None:
    none = u32([])
    plan = StepPlan(0, none, [], none, none, none, none, none, none, {0: u32([1]), 1: u32([1, 2])})
    with pytest.raises(ValueError, match="shape"):
        encode_plan(plan)


def test_an_unknown_kind_of_pooling_is_refused() -> None:
    request = NewRequest(0, u32([1]), 1, u32([0]), SamplingRecord(pooling=4))
    one = u32([1])
    plan = StepPlan(0, u32([]), [request], one, one, one, one, u32([0]), u32([]))
    with pytest.raises(RecordError, match="4 is no kind of pooling"):
        decode_plan(encode_plan(plan))


def test_a_plan_for_work_ahead_says_so_and_its_result_whether_there_is_more() -> None:
    none = u32([])
    plan = StepPlan(2**64 - 1, none, [], none, none, none, none, none, none, work_ahead=True)
    record = encode_plan(plan)
    assert decode_plan(record).work_ahead
    assert decode_plan(record).step_id == 2**64 - 1
    with pytest.raises(RecordError):
        decode_plan(record.replace(bytes([1, 0, 0, 0]), bytes([2, 0, 0, 0])))
    for is_last in (False, True):
        for more_ahead in (False, True):
            result = StepResult(3, none, is_last=is_last, more_ahead=more_ahead)
            decoded = decode_result(encode_result(result))
            assert (decoded.is_last, decoded.more_ahead) == (is_last, more_ahead)
