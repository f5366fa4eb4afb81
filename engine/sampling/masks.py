"""Masks that come with a plan: which tokens some of its requests may sample in this step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.dispatch.records import StepPlan
from engine.dispatch.sampling import U32Array
from engine.sampling.parameters import IntArray, SamplingBatch, TokenLists

BoolArray = npt.NDArray[np.bool_]
_NONE = np.zeros(0, dtype=np.int64)


def unpack_mask(mask: U32Array, vocab_size: int) -> BoolArray:
    """Whether each token is allowed, [vocab]."""
    bits = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


def pack_mask(allowed: BoolArray) -> U32Array:
    """What `unpack_mask` unpacks."""
    bits = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.bool_)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view("<u4")


def mask_batch(batch: SamplingBatch, plan: StepPlan, sampling: IntArray, vocab_size: int) -> None:
    """Gives a batch the masks of a plan.

    What else limits a masked request's tokens becomes part of its mask, unless that would allow nothing: a
    mask is what a grammar demands, so that it wins.

    Args:
        sampling: index in the batch of each request that samples, in the plan's order.
    """
    rank = np.cumsum(plan.samples != 0) - 1
    for column, mask in plan.masks.items():
        index = int(sampling[rank[column]])
        lists = batch.lists.get(index)
        if lists is not None:
            num_outputs = batch.positions[index] - batch.columns["num_prompt_tokens"][index]
            too_short = bool(num_outputs < batch.columns["min_tokens"][index])
            mask = _narrowed(mask, lists, too_short, vocab_size)
            batch.lists[index] = replace(lists, allowed_ids=_NONE, masked_ids=_NONE)
        batch.masks[index] = mask
        batch.columns["is_plain_greedy"][index] = False


def _narrowed(mask: U32Array, lists: TokenLists, too_short: bool, vocab_size: int) -> U32Array:
    allowed = unpack_mask(mask, vocab_size)
    if len(lists.allowed_ids):
        listed = np.zeros(vocab_size, dtype=np.bool_)
        listed[lists.allowed_ids] = True
        allowed = _unless_empty(allowed & listed, allowed)
    if too_short and len(lists.masked_ids):
        kept = allowed.copy()
        kept[lists.masked_ids] = False
        allowed = _unless_empty(kept, allowed)
    return pack_mask(allowed)


def _unless_empty(allowed: BoolArray, otherwise: BoolArray) -> BoolArray:
    return allowed if allowed.any() else otherwise
