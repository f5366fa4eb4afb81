"""What changes a request's logits before temperature: masks, token lists and penalties.

The order: allowed tokens and masks, minimum length, bias, bad words, then penalties.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.sampling.masks import unpack_mask
from engine.sampling.parameters import SamplingBatch

# The logit of a bad word's last token: chosen only where nothing else may be.
BAD_WORD_LOGIT = -1e30


def apply_masks(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Leaves only the tokens that a request's mask allows, in place; logits are [S, vocab] fp32."""
    for index, mask in batch.masks.items():
        forbidden = torch.from_numpy(~unpack_mask(mask, logits.shape[1])).to(logits.device)
        logits[index].masked_fill_(forbidden, -torch.inf)


def apply_bad_words(logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor) -> None:
    """Makes tokens that would complete a bad word the last to be chosen, in place.

    Args:
        logits: [S, vocab] fp32.
        batch: the same S requests.
        token_ids: every worker row's tokens, [rows, max_model_len].
    """
    for index, lists in batch.lists.items():
        if not lists.bad_words:
            continue
        num_outputs = int(batch.positions[index] - batch.columns["num_prompt_tokens"][index])
        longest = min(num_outputs, max(map(len, lists.bad_words)) - 1)
        end = int(batch.positions[index])
        tail = tuple(token_ids[int(batch.rows[index]), end - longest : end].tolist())
        completing = {word[-1] for word in lists.bad_words if _ends_with(tail, word[:-1])}
        if completing:
            row, last = logits[index], torch.tensor(sorted(completing), device=logits.device)
            kept = row[last]
            row[last] = kept.where(kept == -torch.inf, BAD_WORD_LOGIT)


def _ends_with(tokens: tuple[int, ...], end: tuple[int, ...]) -> bool:
    return len(end) <= len(tokens) and tokens[len(tokens) - len(end) :] == end


def apply_token_lists(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Applies allowed_token_ids, the mask before min_tokens, and logit_bias, in place.

    Args:
        logits: [S, vocab] fp32.
        batch: the same S requests.
    """
    num_outputs = batch.positions - batch.columns["num_prompt_tokens"]
    for index, lists in batch.lists.items():
        row = logits[index]
        if len(lists.allowed_ids):
            allowed = torch.from_numpy(lists.allowed_ids).to(logits.device)
            kept = row[allowed]
            row.fill_(-torch.inf)
            row[allowed] = kept
        if len(lists.masked_ids) and num_outputs[index] < batch.columns["min_tokens"][index]:
            row[torch.from_numpy(lists.masked_ids).to(logits.device)] = -torch.inf
        if len(lists.bias_ids):
            bias = torch.from_numpy(lists.bias_values).to(logits.device)
            row.index_add_(0, torch.from_numpy(lists.bias_ids).to(logits.device), bias)


def apply_penalties(logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor) -> None:
    """Applies the repetition, presence and frequency penalties, in place.

    The repetition penalty (arXiv:1909.05858) divides positive and multiplies negative logits of tokens in
    the prompt or the output; the others subtract from tokens in the output.

    Args:
        logits: [S, vocab] fp32.
        batch: the same S requests.
        token_ids: every worker row's tokens, [rows, max_model_len].
    """
    affected = np.flatnonzero(batch.columns["has_penalties"])
    if not len(affected):
        return
    device = logits.device
    columns = batch.columns[affected]
    lengths = torch.from_numpy(batch.positions[affected]).to(device)
    prompt_lengths = torch.from_numpy(columns["num_prompt_tokens"].copy()).to(device)
    rows = torch.from_numpy(batch.rows[affected]).to(device)
    index = torch.from_numpy(affected).to(device)
    longest = int(batch.positions[affected].max())
    seen = token_ids.index_select(0, rows)[:, :longest].long()
    place = torch.arange(longest, device=device)
    in_sequence = place < lengths[:, None]
    in_output = in_sequence & (place >= prompt_lengths[:, None])
    # Row contents past a request's length are left over from another; count them as nothing of token 0.
    seen = seen.masked_fill(~in_sequence, 0)
    shape = (len(affected), logits.shape[1])
    total = torch.zeros(shape, device=device).scatter_add_(1, seen, in_sequence.float())
    output = torch.zeros(shape, device=device).scatter_add_(1, seen, in_output.float())

    def column(name: str) -> torch.Tensor:
        return torch.from_numpy(columns[name].copy()).to(device)[:, None]

    values = logits.index_select(0, index)
    repetition = column("repetition_penalty")
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(total > 0, repeated, values)
    values -= column("frequency_penalty") * output
    values -= column("presence_penalty") * (output > 0)
    logits.index_copy_(0, index, values)
