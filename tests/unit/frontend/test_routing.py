"""Which replica a request is sent to: the longest cached prefix, bounded by load."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.replicas.addresses import Addresses
from frontend.replicas.prefix_index import PrefixIndex
from frontend.replicas.router import FEW, Router
from pagewire.base.errors import ConfigError
from pagewire.wire.block_hashes import ROOT_HASH, hash_blocks

CHAINS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), max_size=8)


def chain(tokens: list[int]) -> list[bytes]:
    """The hashes of blocks of one token each."""
    return hash_blocks(ROOT_HASH, array("I", tokens), 1)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["stored", "removed", "cleared"]),
            st.lists(st.integers(0, 1), min_size=1, max_size=4),
        ),
        max_size=20,
    ),
    st.lists(st.integers(0, 1), max_size=4),
    st.integers(1, 7),
)
def test_the_index_finds_what_sets_of_hashes_find(events, asked, among) -> None:
    index, sets = PrefixIndex(), [set(), set(), set()]
    for replica, kind, tokens in events:
        hashes = chain(tokens)
        if kind == "stored":
            index.stored(replica, b"".join(hashes))
            sets[replica].update(hashes)
        elif kind == "removed":
            index.removed(replica, b"".join(hashes))
            sets[replica].difference_update(hashes)
        else:
            index.cleared(replica)
            sets[replica].clear()
    assert len(index) == len(set().union(*sets))
    hashes = chain(asked)
    lengths = {}
    for replica in range(3):
        if among >> replica & 1:
            lengths[replica] = next(
                (i for i, each in enumerate(hashes) if each not in sets[replica]), len(hashes)
            )
    longest = max(lengths.values())
    expected = sum(1 << replica for replica, length in lengths.items() if length == longest)
    assert index.longest(hashes, among) == (expected, longest)


def test_the_longest_prefix_wins_and_among_equals_the_least_loaded() -> None:
    router = Router(seed=1)
    router.index.stored(1, b"".join(chain([1, 2, 3])))
    router.index.stored(2, b"".join(chain([1, 2])))
    router.index.stored(3, b"".join(chain([1, 2])))
    assert router.choose(chain([1, 2, 3, 4]), [0, 2, 0, 0], range(4), 0.0).replica == 1
    assert router.choose(chain([1, 2, 9]), [0, 3, 2, 1], range(4), 0.0).replica == 3
    assert router.choose(chain([7, 7]), [2, 1, 0, 1], range(4), 0.0).replica == 2


def test_a_replica_with_the_prefix_and_too_much_to_do_is_passed_over() -> None:
    prefix = chain([1, 2, 3])

    def chosen(*loads: int) -> int:
        router = Router(bound=1.25, seed=1)
        router.index.stored(0, b"".join(prefix))
        return router.choose(prefix, loads, range(3), 0.0).replica

    assert chosen(FEW - 1, 0, 0) == 0
    assert chosen(FEW, 0, 0) != 0
    assert chosen(24, 20, 20) == 0
    assert chosen(30, 20, 20) != 0


def test_requests_with_a_new_prefix_that_come_at_once_stay_together() -> None:
    router = Router(seed=3)
    first = router.choose(chain([5, 6]), [0, 0, 0], range(3), 10.0)
    loads = [0, 0, 0]
    loads[first.replica] = 1
    again = router.choose(chain([5, 6]), loads, range(3), 10.1)
    assert (again.replica, again.num_blocks) == (first.replica, 2)
    # The replica has never told of these blocks: it is not expected to have them for ever.
    for now in (20.0, 30.0):
        router.choose(chain([8]), [0, 0, 0], range(3), now)
    assert router.choose(chain([5, 6]), loads, range(3), 30.1).num_blocks == 0


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), CHAINS)
def test_no_replica_gets_more_than_its_bound(loads: list[int], prompts: list[list[int]]) -> None:
    router, loads = Router(bound=1.25, seed=0), list(loads)
    for prompt in prompts:
        before = list(loads)
        chosen = router.choose(chain(prompt), loads, range(len(loads)), 0.0).replica
        loads[chosen] += 1
        bound = 1.25 * (sum(before) + 1) / len(before)
        assert loads[chosen] <= max(FEW, bound + 1) or before[chosen] == min(before)


def test_replicas_without_any_prefix_take_turns() -> None:
    router = Router(seed=0)
    counts = Counter(router.choose(chain([n, n]), [1, 1, 1], range(3), 0.0).replica for n in range(30))
    assert counts == {0: 10, 1: 10, 2: 10}


def test_addresses_are_listed_or_looked_up() -> None:
    addresses = Addresses.parse("unix:/run/a.sock, host:1,dns:pods.svc:50051")
    assert [(each.target, each.name) for each in addresses.listed] == [
        ("unix:/run/a.sock", "0"),
        ("host:1", "1"),
    ]
    assert addresses.names == (("pods.svc", 50051),)
    assert not addresses.is_single
    assert Addresses.parse("host:1").is_single


@pytest.mark.parametrize("text", ["", "a:1,", "a:1,a:1", "dns:a", "dns::5", "dns:a:0", "dns:a:b"])
def test_addresses_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="scheduler"):
        Addresses.parse(text)
