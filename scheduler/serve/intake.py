"""Converts sampling parameters and token ids to a request for the core."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from engine.dispatch.facts import WorkerFacts
from engine.dispatch.limits import MAX_BAD_WORD_TOKENS
from engine.dispatch.sampling import SCALARS, Pooling, SamplingRecord
from pagewire.base.errors import InvalidRequest, Unsupported
from pagewire.wire.block_hashes import BlockHash, root_hash
from pagewire.wire.sampling_params import SamplingParams
from pagewire.wire.tasks import why_no_generation
from scheduler.request import Request

# Parameters that are passed on unchanged.
_SAME_NAME = tuple(name for name in SCALARS if name in SamplingParams.__dataclass_fields__)


def make_request(
    request_id: str,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    facts: WorkerFacts,
    *,
    num_prompt_tokens: int = 0,
    priority: int = 0,
    client: str = "",
    owner: object = None,
    bad_words: Sequence[Sequence[int]] = (),
    cache_salt: str = "",
    pooling: int = Pooling.NONE,
    adapter_id: int = 0,
    group: str = "",
    part: int = 0,
    trace: bytes = b"",
) -> Request:
    """Makes a request; fills in defaults for the seed, max_tokens and the tokens that end the output.

    Args:
        request_id: for logs.
        token_ids: prompt, and any output already generated.
        sampling: how to sample. Parameters that work on text, or ask for several completions of one prompt,
            are ignored.
        facts: the worker's facts about the model.
        num_prompt_tokens: how many of `token_ids` are prompt; 0 means all.
        priority: lower goes first.
        client: who sent it; see `Shares.of`.
        owner: stored in the request.
        bad_words: token sequences that may not appear in the output.
        cache_salt: cached prefixes are shared only between requests of the same salt.
        pooling: a Pooling; if not NONE, the request returns a pooled state and `sampling` is ignored.
        adapter_id: the adapter that its tokens are computed with; 0 is the base model alone.
        group, part, trace: see `Request`.

    Raises:
        InvalidRequest: a value does not suit the model.
        Unsupported: the model does not generate.
    """
    num_prompt_tokens = num_prompt_tokens or len(token_ids)
    if num_prompt_tokens > len(token_ids):
        raise InvalidRequest(f"num_prompt_tokens is {num_prompt_tokens}, of {len(token_ids)} tokens in all")
    try:
        known = array("I", token_ids)
    except OverflowError:
        raise InvalidRequest("token ids must not be negative, nor beyond 32 bits", param="prompt") from None
    if adapter_id and not facts.limits.max_loras:
        raise InvalidRequest("this engine serves no adapters", param="adapter_id")
    root = root_hash(cache_salt, adapter_id)
    if pooling != Pooling.NONE:
        request = _pooling_request(request_id, known, pooling, priority, client, owner, root, adapter_id)
        request.group, request.part, request.trace = group, part, trace
        return request
    if facts.task != "generate":
        raise Unsupported(why_no_generation(facts.task), param="model")
    sampling.check_token_ids(facts.limits.vocab_size)
    _check_bad_words(bad_words, facts.limits.vocab_size)
    max_tokens = facts.limits.max_model_len if sampling.max_tokens is None else sampling.max_tokens
    eos = () if sampling.ignore_eos else facts.eos_token_ids
    stop_token_ids = frozenset(sampling.stop_token_ids).union(eos)
    return Request(
        request_id,
        known,
        num_prompt_tokens,
        _record(sampling, stop_token_ids, bad_words),
        max_total_tokens=num_prompt_tokens + max_tokens,
        stop_token_ids=stop_token_ids,
        priority=priority,
        client=client,
        owner=owner,
        root_hash=root,
        adapter_id=adapter_id,
        constraint=sampling.structured_output,
        group=group,
        part=part,
        trace=trace,
    )


def _pooling_request(
    request_id: str,
    token_ids: array[int],
    pooling: int,
    priority: int,
    client: str,
    owner: object,
    root: BlockHash,
    adapter_id: int,
) -> Request:
    if pooling not in list(Pooling):
        known = ", ".join(f"{each.value} ({each.name.lower()})" for each in Pooling)
        raise InvalidRequest(f"pooling is {pooling}; it must be one of {known}", param="pooling")
    return Request(
        request_id,
        token_ids,
        len(token_ids),
        SamplingRecord(pooling=pooling),
        max_total_tokens=len(token_ids) + 1,
        priority=priority,
        client=client,
        owner=owner,
        root_hash=root,
        adapter_id=adapter_id,
    )


def _check_bad_words(bad_words: Sequence[Sequence[int]], vocab_size: int) -> None:
    num_tokens = sum(map(len, bad_words))
    if num_tokens > MAX_BAD_WORD_TOKENS:
        raise InvalidRequest(
            f"bad_words has {num_tokens} tokens in all; it must have at most {MAX_BAD_WORD_TOKENS}",
            param="bad_words",
        )
    for sequence in bad_words:
        if not sequence or not all(0 <= token_id < vocab_size for token_id in sequence):
            raise InvalidRequest(
                f"bad_words has the tokens {list(sequence)}; it must have lists of at least one, between 0 "
                f"and {vocab_size - 1}",
                param="bad_words",
            )


def _record(
    sampling: SamplingParams, stop_token_ids: frozenset[int], bad_words: Sequence[Sequence[int]]
) -> SamplingRecord:
    values = {name: getattr(sampling, name) for name in _SAME_NAME}
    values.update(
        top_k=max(sampling.top_k, 0),
        seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
        logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
        prompt_logprobs=-1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs,
        masked_until_min_tokens=tuple(sorted(stop_token_ids)) if sampling.min_tokens else (),
        logit_bias=tuple(sampling.logit_bias.items()),
        allowed_token_ids=tuple(sampling.allowed_token_ids or ()),
        bad_words=tuple(map(tuple, bad_words)),
    )
    return SamplingRecord(**values)
