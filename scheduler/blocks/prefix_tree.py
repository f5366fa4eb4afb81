"""The prefix cache as a tree, for people who look at it: what there is, and how often it is hit."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagewire.wire.block_hashes import BlockHash
from scheduler.blocks.pool import BlockPool, CachedBlock


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """Consecutive blocks that all who share the last of them share.

    Attributes:
        block_ids: their ids, in order.
        parent: index of the node whose tokens come before; -1 for none.
        num_hits: how often a request found the first of them.
        num_held: how many of them requests hold now.
    """

    block_ids: list[int]
    parent: int
    num_hits: int
    num_held: int


@dataclass(slots=True)
class PrefixTree:
    """Part of what is in the prefix cache.

    Attributes:
        nodes: the parent of each comes before it.
        num_left_out: nodes that were left out for their number.
    """

    nodes: list[PrefixNode] = field(default_factory=list)
    num_left_out: int = 0

    def root_of(self, index: int) -> int:
        """Index of the root above a node, or of the node itself."""
        while (parent := self.nodes[index].parent) >= 0:
            index = parent
        return index


def prefix_tree(pool: BlockPool, *, max_blocks: int, max_nodes: int) -> PrefixTree:
    """The tree of the blocks that were cached last, and of those before them. What makes up most comes first.

    Args:
        pool: the pool; of several KV groups, the first group's blocks are told of.
        max_blocks: how many blocks are looked at.
        max_nodes: how many nodes are told of.
    """
    known = _last_cached(pool, max_blocks)
    children: dict[BlockHash, list[CachedBlock]] = {}
    roots = []
    for block in known.values():
        if block.parent in known:
            children.setdefault(block.parent, []).append(block)
        else:
            roots.append(block)
    sizes = _sizes(roots, children)
    tree = PrefixTree()
    # The largest and most wanted first; parents before their children. The id makes entries comparable.
    heap = [(-_weight(block, sizes), block.block_id, -1, block) for block in roots]
    heapq.heapify(heap)
    while heap and len(tree.nodes) < max_nodes:
        _, _, parent, block = heapq.heappop(heap)
        blocks = _alone_from(block, children)
        tree.nodes.append(
            PrefixNode(
                [each.block_id for each in blocks],
                parent,
                block.num_hits,
                sum(each.ref_count > 0 for each in blocks),
            )
        )
        for child in children.get(blocks[-1].block_hash, ()):
            heapq.heappush(heap, (-_weight(child, sizes), child.block_id, len(tree.nodes) - 1, child))
    tree.num_left_out = len(heap)
    return tree


def _last_cached(pool: BlockPool, max_blocks: int) -> dict[BlockHash, CachedBlock]:
    """The blocks cached last and the blocks before them. Only the first KV group's hashes have 16 bytes."""
    known: dict[BlockHash, CachedBlock] = {}
    for num_seen, block in enumerate(pool.recently_cached()):
        if num_seen >= max_blocks or len(known) >= max_blocks:
            break
        if len(block.block_hash) != 16:
            continue
        current: CachedBlock | None = block
        while current is not None and current.block_hash not in known:
            known[current.block_hash] = current
            current = pool.cached(current.parent)
    return known


def _alone_from(block: CachedBlock, children: dict[BlockHash, list[CachedBlock]]) -> Sequence[CachedBlock]:
    """A block and those behind it, up to where prefixes part or where fewer requests found what follows."""
    blocks = [block]
    while len(behind := children.get(blocks[-1].block_hash, [])) == 1:
        if behind[0].num_hits != block.num_hits:
            break
        blocks.append(behind[0])
    return blocks


def _sizes(roots: list[CachedBlock], children: dict[BlockHash, list[CachedBlock]]) -> dict[BlockHash, int]:
    """How many blocks there are in each block's subtree, itself included."""
    order, stack = [], list(roots)
    while stack:
        block = stack.pop()
        order.append(block)
        stack += children.get(block.block_hash, ())
    sizes: dict[BlockHash, int] = {}
    for block in reversed(order):
        sizes[block.block_hash] = 1 + sum(
            sizes[child.block_hash] for child in children.get(block.block_hash, ())
        )
    return sizes


def _weight(block: CachedBlock, sizes: dict[BlockHash, int]) -> int:
    return sizes[block.block_hash] * (1 + block.num_hits)
