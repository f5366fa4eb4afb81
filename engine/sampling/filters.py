"""min_p, top_k and top_p: which tokens of a distribution may be drawn.

All three keep the likeliest tokens, so that each row comes down to one number: how many are kept. Between
equal logits the lowest token id counts as likelier.
"""

from __future__ import annotations

import torch

# Few rows keep more tokens than this; those that do cost a full sort.
FEW = 256


def filter_logits(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Sets the logits of tokens that may not be drawn to -inf.

    min_p comes first, then top_k, then top_p over what these two left, renormalised.

    Args:
        logits: scaled by temperature, [S, vocab] fp32.
        top_k: [S] int64; 0 keeps all.
        top_p, min_p: [S] fp64; 1 and 0 keep all.

    Returns:
        [S, vocab]. At least one token of each row is kept.
    """
    vocab_size = logits.shape[1]
    top_k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    top = logits.topk(min(FEW, vocab_size), dim=-1).values
    num_kept, complete = _count_kept(logits, top, top_k, top_p, min_p)
    threshold = top.gather(1, num_kept[:, None] - 1)
    rest = (~complete).nonzero().squeeze(1)
    if len(rest):
        ordered = logits[rest].sort(dim=-1, descending=True).values
        kept, _ = _count_kept(ordered, ordered, top_k[rest], top_p[rest], min_p[rest])
        num_kept[rest] = kept
        threshold[rest] = ordered.gather(1, kept[:, None] - 1)
    return _keep_likeliest(logits, threshold, num_kept)


def _count_kept(
    logits: torch.Tensor, top: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of its likeliest tokens each row keeps, given the largest logits in order, [S, W].

    Returns:
        (number kept [S], whether W was enough to tell [S]).
    """
    width, vocab_size = top.shape[1], logits.shape[1]
    weights = (top - top[:, :1]).double().exp()
    candidate = torch.arange(width, device=logits.device) < top_k[:, None]
    candidate &= weights >= min_p[:, None]
    num_candidates = candidate.sum(-1)
    candidate_weights = weights.where(candidate, 0)
    # Rows whose candidates go on past the window need the weight of the whole row for their total.
    open_ended = (num_candidates == width) & (top_k > width)
    total = candidate_weights.sum(-1)
    if width < vocab_size and bool(open_ended.any()):
        everything = (logits - top[:, :1]).double().exp_()
        everything = everything.where(everything >= min_p[:, None], 0).sum(-1)
        total = torch.where(open_ended, everything, total)
    before = candidate_weights.cumsum(-1) - candidate_weights
    in_nucleus = candidate & (before < (top_p * total)[:, None])
    # A top_p of 1 keeps every candidate, whatever rounding says about sums.
    num_kept = torch.where(top_p < 1, in_nucleus.sum(-1), num_candidates).clamp(min=1)
    complete = (num_kept < width) | (top_k <= width) | (width == vocab_size)
    return num_kept, complete


def _keep_likeliest(logits: torch.Tensor, threshold: torch.Tensor, num_kept: torch.Tensor) -> torch.Tensor:
    """Keeps each row's `num_kept` largest logits, ties by lowest id, given the smallest of them, [S, 1]."""
    above = logits > threshold
    tied = logits == threshold
    room = num_kept[:, None] - above.sum(-1, keepdim=True)
    if bool((tied.sum(-1, keepdim=True) > room).any()):
        tied &= tied.cumsum(-1) <= room
    return logits.masked_fill(~(above | tied), -torch.inf)
