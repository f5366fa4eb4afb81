"""The definition of a step's inputs, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class TokenInputs:
    """What the model is fed for each token, and what each padding token is fed: 0, 0 and -1."""

    input_ids: list[int]
    positions: list[int]
    slot_mapping: list[int]
    seq_lens: list[int]


def naive_lengths(lengths: list[int], sampling_rows: list[int], ends: list[int]) -> list[int]:
    """Tokens of each row after a step in which each of `sampling_rows` (-1 is none) appends one behind the
    position where its request's tokens end."""
    after = list(lengths)
    for row, end in zip(sampling_rows, ends, strict=True):
        if row >= 0:
            after[row] = end + 1
    return after


def naive_step_inputs(
    rows: list[int],
    starts: list[int],
    counts: list[int],
    token_ids: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int,
    num_tokens: int,
) -> TokenInputs:
    """Request i computes counts[i] tokens from position starts[i] on; row -1 is padding.

    Args:
        token_ids: [R, L].
        block_table: [R, B] block ids.
        num_tokens: length of the padded result; what no request fills is padding.
    """
    inputs = TokenInputs([], [], [], [])
    for row, start, count in zip(rows, starts, counts, strict=True):
        for position in range(start, start + count):
            if row < 0:
                _append(inputs, 0, 0, -1)
                continue
            block_id = int(block_table[row, position // block_size])
            slot = block_id * block_size + position % block_size
            _append(inputs, int(token_ids[row, position]), position, slot)
        inputs.seq_lens.append(start + count if row >= 0 else 0)
    while len(inputs.input_ids) < num_tokens:
        _append(inputs, 0, 0, -1)
    return inputs


def naive_group_slots(
    rows: list[int],
    query_start_loc: list[int],
    positions: list[int],
    block_tables: torch.Tensor,
    *,
    block_size: int,
) -> list[list[int]]:
    """The slots of all tokens, -1 for padding, in each group of `block_tables` [G, R, B]."""
    slots = [[-1] * len(positions) for _ in block_tables]
    for row, begin, end in zip(rows, query_start_loc, query_start_loc[1:], strict=False):
        for token in range(begin, end if row >= 0 else begin):
            index, offset = divmod(positions[token], block_size)
            for group, table in enumerate(block_tables):
                slots[group][token] = int(table[row, index]) * block_size + offset
    return slots


def naive_scatter_words(arena: torch.Tensor, index: torch.Tensor, value: torch.Tensor, count: int) -> None:
    """arena[index[k]] = value[k] for the first `count` words; an index of -1 is skipped."""
    for k in range(count):
        if index[k] >= 0:
            arena[index[k]] = value[k]


def naive_embed(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T] token ids -> [T, N], rows of the weight [V, N]."""
    return torch.stack([weight[int(token_id)] for token_id in input_ids])


def _append(inputs: TokenInputs, input_id: int, position: int, slot: int) -> None:
    inputs.input_ids.append(input_id)
    inputs.positions.append(position)
    inputs.slot_mapping.append(slot)
