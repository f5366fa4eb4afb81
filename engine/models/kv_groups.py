"""Which layers of a model share a block table: those that see equally far, in groups of equal size.

Layers with a sliding window need no keys and values behind it, so their blocks can be given back while other
layers still need theirs. All groups take blocks from one pool, so a block must have the same bytes in each:
every group has the same number of layers. Where the layers of one reach do not divide, the last group has
places that no layer uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

# Every group has a block table in every row and a list of slots in every step.
_MOST_GROUPS = 8
# Fewer groups are preferred where they take no more than this share of memory more.
_WORTH = 0.05


@dataclass(frozen=True, slots=True)
class KVGroups:
    """The KV groups of a model, those without a window first.

    Attributes:
        windows: how many tokens the layers of each group see, a token's own included; 0 for no limit.
        group_of: each layer's group.
        place_of: each layer's place among the layers of its group.
        group_size: layers of a group, places that no layer uses among them.
    """

    windows: tuple[int, ...]
    group_of: tuple[int, ...]
    place_of: tuple[int, ...]
    group_size: int

    def of_layers(self, layers: range) -> KVGroups:
        """The same groups with some of the layers alone, as a pipeline stage has them. Every group stays, so
        that all stages have the same block tables; a block has room for no more layers than there are here.
        """
        places: list[int] = []
        counts = [0] * len(self.windows)
        for layer in layers:
            group = self.group_of[layer]
            places.append(counts[group])
            counts[group] += 1
        return KVGroups(
            self.windows, tuple(self.group_of[layer] for layer in layers), tuple(places), max(counts)
        )


@lru_cache(maxsize=8)
def kv_groups(windows: tuple[int, ...], max_model_len: int) -> KVGroups:
    """The groups for which a request of `max_model_len` tokens takes the least memory.

    Groups of g layers take g times the sum of what their layers reach, so a large g costs unused places and
    a small one makes many groups. For Gemma 3, five layers with a window to one without, g is the number of
    those without. If it pays for nothing else, all layers are one group, which reaches as far as any of them.

    Args:
        windows: how many tokens each layer sees, a token's own included; 0 for no limit.
        max_model_len: the longest request. A window that it does not exceed is no limit.
    """
    reaches = [window if 0 < window < max_model_len else 0 for window in windows]
    together = _grouped([0 if 0 in reaches else max(reaches)] * len(reaches), len(reaches))
    cut = [_grouped(reaches, size) for size in range(1, len(reaches) + 1)]
    candidates = [together, *(groups for groups in cut if len(groups.windows) <= _MOST_GROUPS)]
    least = min(_layer_tokens(groups, max_model_len) for groups in candidates)
    good = [groups for groups in candidates if _layer_tokens(groups, max_model_len) <= (1 + _WORTH) * least]
    return min(good, key=lambda groups: (len(groups.windows), _layer_tokens(groups, max_model_len)))


def _layer_tokens(groups: KVGroups, num_tokens: int) -> int:
    """Tokens that a request of `num_tokens` holds, over all places in all groups."""
    return groups.group_size * sum(min(window or num_tokens, num_tokens) for window in groups.windows)


def _grouped(reaches: Sequence[int], size: int) -> KVGroups:
    """The layers of each reach in groups of `size`, in their order."""
    windows: list[int] = []
    group_of, place_of = [0] * len(reaches), [0] * len(reaches)
    for reach in sorted(set(reaches), key=lambda reach: (reach > 0, -reach)):
        first = len(windows)
        layers = [layer for layer, own in enumerate(reaches) if own == reach]
        for index, layer in enumerate(layers):
            group_of[layer], place_of[layer] = first + index // size, index % size
        windows += [reach] * -(-len(layers) // size)
    return KVGroups(tuple(windows), tuple(group_of), tuple(place_of), size)
