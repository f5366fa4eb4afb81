"""Draft tokens that continue what was written before: prompt lookup decoding (Saxena, 2023), on the host.

Of the request's last tokens the longest run of `most` to `least` is taken that stands somewhere before, and
what followed it there is proposed. The newest such place counts; where it is so new that too little follows,
what follows repeats. A prediction, text that the client expects, is searched like the request's own, and
wins where both have a run of the same length.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def propose(
    tokens: IntArray, prediction: IntArray, num_outputs: int, *, least: int, most: int, count: int
) -> IntArray:
    """Up to `count` draft tokens that may follow `tokens`; none if no run is found.

    Args:
        tokens: of the request, [L].
        prediction: what its output may be, [P]; empty if nothing is predicted.
        num_outputs: how many of `tokens` are output. If these are the prediction's first tokens, they count
            as a run of any length.
        least, most: tokens of a run.
        count: more than 0.
    """
    length = len(tokens)
    own_run, own_end = _longest_run(tokens, tokens[: length - 1], most)
    run, end = _longest_run(tokens, prediction, most)
    may_begin = run < most and 0 < num_outputs <= len(prediction) and num_outputs < most
    if may_begin and (prediction[:num_outputs] == tokens[length - num_outputs :]).all():
        run, end = most, num_outputs
    if run >= least and run >= own_run:
        return prediction[end : end + count]
    if own_run < least:
        return tokens[:0]
    # What follows is as long as the distance to the end, and then repeats.
    period = length - own_end
    found: IntArray = tokens[own_end + np.arange(count) % period]
    return found


def _longest_run(tokens: IntArray, text: IntArray, most: int) -> tuple[int, int]:
    """(length of the longest run of the last tokens that the text has, at most `most`; where the newest such
    place in the text ends). Places at the end of a text after which nothing follows do not count."""
    ends = np.flatnonzero(text == tokens[-1]) + 1
    run, end = 0, 0
    for size in range(1, min(most, len(tokens)) + 1):
        if size > 1:
            ends = ends[ends >= size]
            ends = ends[text[ends - size] == tokens[-size]]
        if not len(ends):
            break
        run, end = size, int(ends[-1])
    return run, end
