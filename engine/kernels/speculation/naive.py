"""The definition of the kernels for draft tokens, one request at a time."""

from __future__ import annotations

from dataclasses import dataclass, field


def naive_ngram(
    tokens: list[int], prediction: list[int], num_outputs: int, *, least: int, most: int, count: int
) -> list[int]:
    """Up to `count` drafts after `tokens`; see `engine.speculation.ngram.propose`."""

    def run_at(text: list[int], end: int) -> int:
        run = 0
        while run < min(most, end, len(tokens)) and text[end - 1 - run] == tokens[-1 - run]:
            run += 1
        return run

    def longest(text: list[int]) -> tuple[int, int]:
        return max(((run_at(text, end), end) for end in range(1, len(text) + 1)), default=(0, 0))

    own_run, own_end = longest(tokens[:-1])
    run, end = longest(prediction)
    begins = 0 < num_outputs < most and prediction[:num_outputs] == tokens[len(tokens) - num_outputs :]
    if begins and num_outputs <= len(prediction) and run < most:
        run, end = most, num_outputs
    if run >= least and run >= own_run:
        return prediction[end : end + count]
    if own_run < least:
        return []
    period = len(tokens) - own_end
    return [tokens[own_end + i % period] for i in range(count)]


@dataclass(slots=True)
class SlotInputs:
    """What each decode slot is fed. A slot that computes nothing has 0, 0, -1, 0 and row -1."""

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slot_mapping: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def naive_slots(
    rows: list[int],
    offsets: list[int],
    room: list[int],
    next_drafts: list[int],
    token_ids: list[list[int]],
    block_table: list[list[int]],
    lengths: list[int],
    *,
    block_size: int,
) -> SlotInputs:
    """Slot i computes the last token of its row if its offset is 0, else the draft that slot i - 1 has."""
    inputs = SlotInputs()
    for slot, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        draft = next_drafts[slot - 1] if offset else 0
        if row < 0 or lengths[row] > room[slot] or draft < 0:
            values = (0, 0, -1, 0, -1)
        else:
            position = lengths[row] - 1 + offset
            block_id = block_table[row][position // block_size]
            token = draft if offset else token_ids[row][position]
            values = (token, position, block_id * block_size + position % block_size, position + 1, row)
        for name, value in zip(SlotInputs.__slots__, values, strict=True):
            getattr(inputs, name).append(value)
    return inputs


def naive_accept(sampled: list[int], next_drafts: list[int]) -> tuple[list[int], int]:
    """(the tokens that a request gains, how many drafts it had), from the token sampled in each of its slots
    and the draft that comes after each, -1 where none does."""
    gained = []
    for token, draft in zip(sampled, next_drafts, strict=True):
        gained.append(token)
        if token != draft:
            break
    return gained, sum(draft >= 0 for draft in next_drafts)
