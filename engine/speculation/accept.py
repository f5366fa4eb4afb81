"""Which drafts are accepted: the first ones that are what the model samples.

Each of a request's positions is sampled as without speculation, from the model's logits there and with the
number that its seed has for that position. A draft stands if it is the token sampled in its place, and the
first sampled token that differs from its draft, or comes after the last draft, is the step's last. So the
output is, token for token, what it would be without drafts.

For proposals that are one token and not a distribution this is rejection sampling (Leviathan et al., 2023;
Chen et al., 2023): with all of q on the draft, it is accepted with probability min(1, p / q) = p(draft), and
else a token is drawn from p without the draft.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def count_gained(drafts: IntArray, sampled: IntArray, num_slots: IntArray) -> IntArray:
    """Tokens that each of S requests gains.

    Args:
        drafts: for each of T slots the draft that comes after its position, -1 in a request's last slot.
        sampled: the token sampled in each slot, [T].
        num_slots: slots of each request, one after the other, [S]: one more than drafts; 0 for a request that
            gains nothing.
    """
    begins = np.cumsum(num_slots) - num_slots
    differs = np.append(drafts != sampled, True)
    at = np.where(differs, np.arange(len(differs)), len(differs))
    first = np.minimum.accumulate(at[::-1])[::-1]
    gained: IntArray = np.where(num_slots > 0, first[np.minimum(begins, len(first) - 1)] - begins + 1, 0)
    return gained
