"""Log probabilities of prompt tokens and pooled hidden states, by torch; see engine/step/prompt_work.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.dispatch.records import PromptLogprobs
from engine.dispatch.sampling import F32Array
from engine.step.prompt_work import LogprobsChunk, PooledChunk, logprobs_places, split_logprobs

# Positions whose logits there are at once.
POSITIONS_AT_ONCE = 128


class NotFinite(ArithmeticError):
    """A step's logits hold a NaN or an infinity."""


def compute_prompt_logprobs(
    chunks: Sequence[LogprobsChunk],
    hidden: torch.Tensor,
    begins: IntArray,
    token_ids: torch.Tensor,
    compute_logits: Callable[[torch.Tensor, IntArray], torch.Tensor],
) -> list[PromptLogprobs]:
    """What a step tells of its prompts' tokens.

    Args:
        hidden: final hidden states of the step's tokens, [T, hidden].
        begins: where each request's tokens begin among them, in the plan's order.
        token_ids: every worker row's, [rows, max_model_len].
        compute_logits: of some hidden states, and which of the step's tokens they are of.

    Raises:
        NotFinite: a token's log probability is not a finite number.
    """
    places = logprobs_places(chunks, begins, token_ids.shape[1])
    indices, targets = torch.from_numpy(places.hidden), torch.from_numpy(places.targets)
    parts = []
    for begin in range(0, len(indices), POSITIONS_AT_ONCE):
        part = slice(begin, begin + POSITIONS_AT_ONCE)
        logits = compute_logits(hidden.index_select(0, indices[part]), places.hidden[part]).float()
        logprobs = logits.log_softmax(dim=-1)
        chosen = logprobs.gather(1, token_ids.view(-1).index_select(0, targets[part])[:, None]).squeeze(1)
        top = logprobs.topk(min(places.num_top, logprobs.shape[1]), dim=-1)
        parts.append((chosen, top.indices, top.values))
    of_tokens, top_ids, top_logprobs = (torch.cat(arrays).numpy() for arrays in zip(*parts, strict=True))
    if not np.isfinite(of_tokens).all():
        raise NotFinite
    return split_logprobs(chunks, of_tokens, top_ids.astype(np.uint32), top_logprobs)


class PooledStates:
    """Sums of hidden states, for each row whose request has pooling.

    Args:
        finish: makes what requests get of complete pooled states; see CausalLM.
    """

    def __init__(
        self, num_rows: int, hidden_size: int, finish: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._finish = finish
        self._sums = torch.zeros((num_rows, hidden_size), dtype=torch.float32)

    def add(
        self, chunks: Sequence[PooledChunk], hidden: torch.Tensor, begins: IntArray
    ) -> dict[int, F32Array]:
        """Adds a step's hidden states, [T, hidden]; the states that are complete, by index in the plan."""
        complete = {}
        for chunk in chunks:
            first = int(begins[chunk.index])
            total = hidden[first + chunk.begin : first + chunk.end].float().sum(dim=0)
            if chunk.continues:
                total += self._sums[chunk.row]
            self._sums[chunk.row] = total
            if chunk.divisor:
                complete[chunk.index] = self._finish(total[None] / chunk.divisor)[0].numpy()
        return complete
