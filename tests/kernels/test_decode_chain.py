"""Kernels that overlap with the one before them compute what they compute one after the other."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.decode_chain import DEFAULT, DecodeStep, capture
from benchmarks.kernels.elementwise import Model
from engine.kernels.launch import set_overlap
from tests.kernels.hopper_compiler import ahead_of_wait

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# With the weights' shapes of which products were measured, and thus of all kinds.
SMALL_QWEN = Model(1024, 16, 8, 3072, 4096, norms_heads=True)
SMALL_LLAMA = Model(4096, 32, 8, 14336, 4096, norms_heads=False)
MAX_CONTEXT = 700


def randomise(step: DecodeStep) -> None:
    """Other tokens in other blocks, after contexts of other lengths, and padding in other places."""
    step.token_ids.random_(step.model.vocab)
    step.first_lengths.random_(1, MAX_CONTEXT + 1)
    step.rows.copy_(torch.randperm(step.num_seqs, device=DEVICE))
    if step.num_seqs > 1:
        step.rows[torch.rand(step.num_seqs, device=DEVICE) < 0.1] = -1
    step.block_table.copy_(torch.randperm(step.block_table.numel(), device=DEVICE).view_as(step.block_table))


def state(step: DecodeStep, results: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results and everything else that a step leaves."""
    caches = [cache.clone() for pair in step.caches for cache in pair]
    return [*results, *caches, *(value.clone() for value in step.inputs.values())]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has one kernel at a time")
@pytest.mark.parametrize("num_seqs", [1, 2, 16, 40, 256])
@pytest.mark.parametrize("model", [SMALL_QWEN, SMALL_LLAMA], ids=["qwen", "llama"])
def test_a_step_is_bitwise_the_same_with_and_without_overlap(model: Model, num_seqs: int) -> None:
    """Over and over: with other inputs each time, whatever is read too early is left from another step."""
    torch.manual_seed(num_seqs)
    with torch.device(DEVICE):
        step = DecodeStep(model, 6, num_seqs, MAX_CONTEXT, torch.bfloat16)
    overlapping, ordinary = (capture(step, DEFAULT, overlap=overlap) for overlap in (True, False))
    for _ in range(50):
        randomise(step)
        actual = state(step, overlapping.replayed())
        expected = state(step, ordinary.replayed())
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has one kernel at a time")
def test_steps_in_a_row_without_a_graph_are_the_same_too() -> None:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        step = DecodeStep(SMALL_QWEN, 4, 4, MAX_CONTEXT, torch.bfloat16)
    for _ in range(10):
        randomise(step)
        tokens = []
        for overlap in (True, False):
            set_overlap(overlap)
            try:
                tokens.append([result.clone() for result in step.launch()])
            finally:
                set_overlap(True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*tokens, strict=True))


PTX = """
ld.param.b64 %rd1, [kernel_param_0];
ld.param.b64 %rd2, [kernel_param_1];
mov.u32 %r1, %tid.x;
mad.wide.u32 %rd3, %r1, 4, %rd1;
ld.global.b32 { %r2 }, [ %rd3 + 0 ];
mad.wide.u32 %rd4, %r2, 4, %rd2;
griddepcontrol.wait;
ld.global.b32 { %r3 }, [ %rd4 + 0 ];
st.global.b32 [ %rd4 + 0 ], { %r3 };
ret;
"""


def test_what_a_kernel_reads_and_writes_too_early_is_found() -> None:
    told = {"waits": 1, "early_reads": ["table"], "early_writes": 0, "early_exits": 0}
    assert ahead_of_wait(PTX, ["table", "cache"]) == told
    late = PTX.replace("griddepcontrol.wait;\n", "").replace("ret;", "griddepcontrol.wait;\nret;")
    told = {"waits": 1, "early_reads": ["cache", "table"], "early_writes": 1, "early_exits": 0}
    assert ahead_of_wait(late, ["table", "cache"]) == told
    told = {"waits": 0, "early_reads": ["cache", "table"], "early_writes": 1, "early_exits": 1}
    assert ahead_of_wait(PTX.replace("griddepcontrol.wait;\n", ""), ["table", "cache"]) == told
