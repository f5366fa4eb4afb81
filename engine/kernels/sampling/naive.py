"""The definition of sampling, one row at a time, by sorting; tests compare the kernels to it."""

from __future__ import annotations

import torch

# The logit of a token that would complete a bad word.
BAD_WORD_LOGIT = -1e30


def naive_sample(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, draw: float
) -> int:
    """The token that one row of finite logits, [vocab], and a number in (0, 1) choose.

    temperature 0 takes the largest logit. Otherwise min_p, then top_k, then top_p over what is left,
    renormalised, keep the likeliest tokens, at least one; the token is the first, in order of id, at which
    the cumulative weight exceeds draw * total. Between equal logits the lowest id counts as likelier.
    """
    values, order = logits.float().sort(descending=True, stable=True)
    if temperature == 0:
        return int(order[0])
    weights = ((values - values[0]) / temperature).double().exp()
    candidate = weights >= min_p
    if top_k > 0:
        candidate[top_k:] = False
    weights = weights.where(candidate, 0)
    if top_p < 1:
        before = weights.cumsum(0) - weights
        kept = before < top_p * weights.sum()
        kept[0] = True
        weights = weights.where(kept, 0)
    by_id = torch.zeros_like(weights).index_copy_(0, order, weights)
    cumulative = by_id.cumsum(0)
    past = (cumulative > draw * cumulative[-1]) & (by_id > 0)
    return int(past.nonzero()[0] if past.any() else by_id.nonzero()[-1])


def naive_adjust(
    logits: torch.Tensor,
    *,
    token_ids: list[int],
    num_prompt_tokens: int,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    allowed_ids: list[int] | None = None,
    masked_ids: list[int] | None = None,
    bias: dict[int, float] | None = None,
    mask: torch.Tensor | None = None,
    bad_words: list[list[int]] | None = None,
) -> torch.Tensor:
    """One row's logits, [vocab], after allowed ids, masked ids, bias, bad words and penalties, in this order;
    fp32.

    Args:
        token_ids: the request's prompt and output so far.
        num_prompt_tokens: how many of them are prompt.
        mask: whether each token is allowed, [vocab] bool; not with allowed_ids.
        bad_words: token sequences; the last token of one whose other tokens end the output is the last to be
            chosen, where it may be at all.
    """
    adjusted = logits.float().clone()
    if allowed_ids:
        adjusted.fill_(-torch.inf)
        adjusted[allowed_ids] = logits.float()[allowed_ids]
    if mask is not None:
        adjusted[~mask] = -torch.inf
    adjusted[masked_ids or []] = -torch.inf
    for token_id, value in (bias or {}).items():
        adjusted[token_id] += value
    output = token_ids[num_prompt_tokens:]
    for *before, last in bad_words or []:
        if len(before) <= len(output) and output[len(output) - len(before) :] == before:
            adjusted[last] = torch.where(adjusted[last] == -torch.inf, -torch.inf, BAD_WORD_LOGIT)
    for token_id in set(token_ids):
        value = adjusted[token_id]
        value = value / repetition_penalty if value > 0 else value * repetition_penalty
        value = value - frequency_penalty * output.count(token_id)
        adjusted[token_id] = value - presence_penalty * (token_id in output)
    return adjusted


def naive_logprobs(
    logits: torch.Tensor, chosen: int, num_top: int
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Of one row, [vocab]: the chosen token's log probability, and the likeliest tokens' ids and values."""
    logprobs = logits.double().log_softmax(0)
    values, order = logprobs.sort(descending=True, stable=True)
    return float(logprobs[chosen]), order[:num_top], values[:num_top]
