"""The named workloads are those that the peer was measured with; others are as described."""

from __future__ import annotations

import pytest

from pagewire.base.errors import ConfigError
from pagewire.bench.workloads import NAMED, Lengths, Workload, named

# Written by hand from the table of figures to beat, and for W2 from a run of its recipe:
# name -> requests, prompt tokens in all (shared ones counted for each), output tokens in all.
TOTALS = {
    "W1": (256, 256 * 128, 256 * 512),
    "W2": (512, 292_288, 147_446),
    "W3": (1, 128, 256),
    "W3b": (16, 16 * 128, 16 * 256),
    "W4": (64, 64 * 2048, 64),
    "W5": (256, 256 * 2112, 256 * 64),
}


@pytest.mark.parametrize("name", TOTALS)
def test_named_workloads_have_the_lengths_that_were_agreed(name: str) -> None:
    workload = NAMED[name]
    prompts = workload.prompts(1000, 1)
    outputs = [output for _, output in workload.lengths()]
    assert (len(prompts), sum(map(len, prompts)), sum(outputs)) == TOTALS[name]
    assert max(map(len, prompts)) + max(outputs) <= workload.longest
    assert workload.prefix_caching == (name == "W5")
    assert workload.counts_input == (name == "W4")


def test_w2_draws_all_prompts_before_all_outputs() -> None:
    lengths = NAMED["W2"].lengths()
    assert lengths[:3] == [(1011, 311), (997, 204), (185, 271)]
    assert lengths[-1] == (182, 444)


def test_every_name_is_agreed() -> None:
    assert list(NAMED) == list(TOTALS)
    assert [workload.name for workload in named("W3, W1,W3")] == ["W3", "W1"]


def test_prompts_of_a_round_share_their_prefix_and_nothing_with_another_round() -> None:
    workload = Workload(
        name="w", num_requests=5, prompt=Lengths(30, 60), output=Lengths(1, 9), shared_prefix=40
    )
    first, again, second = (workload.prompts(50_000, round_) for round_ in (1, 1, 2))
    assert first == again
    assert {tuple(prompt[:40]) for prompt in first} == {tuple(first[0][:40])}
    assert len({tuple(prompt[40:56]) for prompt in first}) == 5
    assert first[0][:40] != second[0][:40]
    assert [len(prompt) for prompt in first] == [len(prompt) for prompt in second]
    assert all(0 <= token < 50_000 for prompt in first for token in prompt)


def test_lengths_of_a_range_reach_both_its_ends() -> None:
    workload = Workload(name="w", num_requests=200, prompt=Lengths.parse("3:5", "p"), output=Lengths(1, 1))
    assert {prompt for prompt, _ in workload.lengths()} == {3, 4, 5}
    assert str(workload) == "200 x 3:5/1"


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "5:4", "0:4", "1:2:3", "1:"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt-len is .*; it must be a number of tokens, or a range"):
        Lengths.parse(text, "prompt-len")


@pytest.mark.parametrize("names", ["", "W9", "W1,w2", ","])
def test_workloads_that_do_not_exist_are_refused_with_those_that_do(names: str) -> None:
    with pytest.raises(ConfigError, match="W1, W2, W3, W3b, W4, W5"):
        named(names)
