"""Chooses the next token of every request that samples in a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.sampling.filters import filter_logits
from engine.sampling.generator import uniforms
from engine.sampling.parameters import IntArray, SamplingBatch, subset
from engine.sampling.penalties import apply_bad_words, apply_masks, apply_penalties, apply_token_lists


@dataclass(slots=True)
class RawLogprobs:
    """Log probabilities of some of the sampled tokens, on the device.

    Attributes:
        index: which of the step's sampled tokens, [L], on the host.
        num_top: how many top entries each asked for, [L], on the host.
        sampled: of the sampled token, [L].
        top_ids, top_logprobs: of the likeliest, likeliest first, [L, the largest num_top].
    """

    index: IntArray
    num_top: IntArray
    sampled: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


@dataclass(slots=True)
class Sampled:
    """What a step sampled, on the device; nothing has been waited for.

    Attributes:
        token_ids: [S] int64.
        largest: each row's largest raw logit, [S]. Not finite exactly where the logits hold a NaN or an
            infinity, or nothing finite, and the token means nothing.
        logprobs: for requests that asked; None if none did.
    """

    token_ids: torch.Tensor
    largest: torch.Tensor
    logprobs: RawLogprobs | None


def sample(logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor) -> Sampled:
    """One token for each of S requests.

    Greedy requests take the largest logit, ties by lowest id. The others invert the cumulative
    distribution, in order of token id and in fp64, at a number drawn from (seed, position): the outcome
    depends on a request's own logits and parameters only, never on its batch.

    Args:
        logits: [S, vocab] fp32. Not changed.
        batch: the parameters of the same S requests.
        token_ids: every worker row's tokens, [rows, max_model_len], for penalties.
    """
    largest, chosen = logits.max(dim=-1)
    special = np.flatnonzero(~batch.columns["is_plain_greedy"])
    if len(special):
        index = torch.from_numpy(special).to(logits.device)
        part = subset(batch, special)
        chosen[index] = _sample_special(logits.index_select(0, index), part, token_ids)
    return Sampled(chosen, largest, _logprobs(logits, chosen, batch))


def _sample_special(logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor) -> torch.Tensor:
    """Samples requests that are not plain greedy. Overwrites the logits."""
    apply_token_lists(logits, batch)
    apply_masks(logits, batch)
    apply_bad_words(logits, batch, token_ids)
    apply_penalties(logits, batch, token_ids)
    chosen = logits.argmax(dim=-1)
    random = np.flatnonzero(batch.columns["temperature"] > 0)
    if len(random):
        index = torch.from_numpy(random).to(logits.device)
        chosen[index] = _sample_random(logits.index_select(0, index), subset(batch, random))
    return chosen


def _sample_random(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    columns, device = batch.columns, logits.device

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(columns[name].copy()).to(device, dtype)

    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scaled = logits - logits.max(dim=-1, keepdim=True).values
    scaled /= column("temperature", torch.float32)[:, None]
    limits = (columns["top_k"] > 0) | (columns["top_p"] < 1) | (columns["min_p"] > 0)
    filtered = np.flatnonzero(limits)
    if len(filtered):
        index = torch.from_numpy(filtered).to(device)
        scaled[index] = filter_logits(
            scaled.index_select(0, index),
            column("top_k", torch.int64)[index],
            column("top_p", torch.float64)[index],
            column("min_p", torch.float64)[index],
        )
    draws = torch.from_numpy(uniforms(columns["seed"], batch.positions)).to(device)
    return _invert(scaled, draws)


def _invert(scaled: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulative weight exceeds draw * total; one per row of [S, vocab]."""
    cumulative = scaled.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(draws[:, None] * total, below_total)
    found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # Only logits that are not finite can lead past the end; their step is reported as an error.
    return found.clamp_(max=scaled.shape[1] - 1)


def _logprobs(logits: torch.Tensor, chosen: torch.Tensor, batch: SamplingBatch) -> RawLogprobs | None:
    """Log probabilities from the raw logits, for the requests that asked."""
    asked = np.flatnonzero(batch.columns["logprobs"] >= 0)
    if not len(asked):
        return None
    index = torch.from_numpy(asked).to(logits.device)
    logprobs = logits.index_select(0, index).log_softmax(dim=-1)
    num_top = batch.columns["logprobs"][asked].astype(np.int64)
    top = logprobs.topk(min(int(num_top.max()), logits.shape[1]), dim=-1)
    sampled = logprobs.gather(1, chosen[index, None]).squeeze(1)
    return RawLogprobs(asked, num_top, sampled, top.indices, top.values)
