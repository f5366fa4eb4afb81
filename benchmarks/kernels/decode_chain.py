"""A whole decode step of a model shape: what overlapping launches and attention's tiles change.

    python -m benchmarks.kernels.decode_chain [--json FILE]

All kernels of a step in the model's order, from the inputs to the sampled tokens, are captured as one CUDA
graph. Layers take turns over copies of weights and caches that together are larger than the L2 cache. A step
is timed with launches that overlap ("on") and without ("off"), in turns, and its hidden states, logits and
tokens must be the same bitwise. The other rows are the same step with overlap and another way to walk the
contexts; "difference" is that of their logits from the first row's.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks import record
from benchmarks.kernels.elementwise import BLOCK_SIZE, EPS, MODELS, Model
from engine.kernels.activate_and_mul.kernel import activate_and_mul
from engine.kernels.launch import set_overlap
from engine.kernels.linear.choice import choose_linear, linear
from engine.kernels.linear.tiled import ShareWorkspace
from engine.kernels.paged_attention.decode import (
    DecodeConfig,
    decode_splits,
    paged_decode_attention,
    split_workspace,
)
from engine.kernels.rms_norm.kernel import add_rms_norm, rms_norm
from engine.kernels.rotate_and_store.kernel import rotate_and_store
from engine.kernels.sampling.kernel import SamplingColumns, SamplingWorkspace, sample_rows
from engine.kernels.step_inputs.kernel import embed, prepare_decodes

LAYERS = {"qwen06b": 28, "llama8b": 32}
CONTEXT = 384
# Of weights, and of keys and values: several times the L2 cache.
ROTATED_BYTES = 256 << 20
REPLAYS, WARM_UP = 15, 3
COMPILERS = 12


@dataclass(frozen=True, slots=True)
class Walk:
    """How attention walks the contexts; None stands for the default."""

    config: DecodeConfig | None = None
    num_splits: int | None = None

    def __str__(self) -> str:
        if self.config is None:
            return "default"
        n, w, s, share = (
            self.config.block_n,
            self.config.num_warps,
            self.config.num_stages,
            self.config.min_share,
        )
        return f"n{n} w{w} s{s} share{share} split{self.num_splits}"


DEFAULT = Walk()
# By requests. What the default is built on was measured without overlap.
WALKS = {
    1: [
        Walk(DecodeConfig(64, 2, 3), 32),
        Walk(DecodeConfig(64, 2, 3, min_share=256), 16),
        Walk(DecodeConfig(128, 4, 2), 16),
        Walk(DecodeConfig(32, 2, 4, min_share=64), 32),
    ],
    16: [
        Walk(DecodeConfig(64, 2, 3), 2),
        Walk(DecodeConfig(64, 4, 3), 1),
        Walk(DecodeConfig(64, 4, 3), 2),
        Walk(DecodeConfig(128, 4, 2), 1),
    ],
    256: [
        Walk(DecodeConfig(64, 4, 3), 1),
        Walk(DecodeConfig(32, 2, 4), 1),
        Walk(DecodeConfig(32, 4, 4), 1),
        Walk(DecodeConfig(64, 2, 3), 1),
    ],
}


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class DecodeStep:
    """One decode step of `num_seqs` requests, again and again: nothing that it writes changes what it reads.

    Everything is made on torch's default device.

    Attributes:
        starts: [S] int32, the tokens before the one that the step computes, of each request.
        rows: [S] int32, each request's row; -1 makes it padding.
    """

    def __init__(
        self, model: Model, num_layers: int, num_seqs: int, max_context: int, dtype: torch.dtype
    ) -> None:
        self.model, self.num_layers, self.num_seqs, self.dtype = model, num_layers, num_seqs, dtype
        self.walk = DEFAULT
        device = torch.get_default_device()
        self.num_sms = 4
        if device.type == "cuda":
            self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        first = self._random_layer()
        copies = min(num_layers, math.ceil(ROTATED_BYTES / 2 / (first.qkv.numel() + first.gate_up.numel())))
        self.layers = [first, *(self._random_layer() for _ in range(copies - 1))]
        self.final_norm = self._random(model.hidden) + 1
        self.embedding = self._random(model.vocab, model.hidden)
        self.head = self.embedding
        columns = -(-max_context // BLOCK_SIZE)
        blocks = num_seqs * columns
        shape = (blocks, BLOCK_SIZE, model.num_kv_heads, model.head_dim)
        copies = min(num_layers, math.ceil(ROTATED_BYTES / (4 * math.prod(shape))))
        self.caches = [(self._random(*shape), self._random(*shape)) for _ in range(copies)]
        self.block_table = torch.randperm(blocks).to(torch.int32).view(num_seqs, columns)
        self.token_ids = torch.randint(model.vocab, (num_seqs, max_context + 1), dtype=torch.int32)
        self.table = torch.rand(max_context, model.head_dim)
        self.rows = torch.arange(num_seqs, dtype=torch.int32)
        # Every step of a row appends a token; here each begins where the first did.
        self.first_lengths = torch.full((num_seqs,), max_context, dtype=torch.int32)
        self.lengths = self.first_lengths.clone()
        names = ("input_ids", "positions", "slot_mapping", "seq_lens")
        self.inputs = {name: torch.zeros(num_seqs, dtype=torch.int32) for name in names}
        self.linear_workspace = ShareWorkspace.make(device, tile_elements=264 * 128 * 128, tiles=1 << 14)
        self.attention_workspace = split_workspace(
            num_seqs, num_seqs * 32, model.num_heads, model.num_kv_heads, model.head_dim, device
        )
        self.sampling_workspace = SamplingWorkspace.allocate(num_seqs, model.vocab, device)
        self.slot = torch.zeros(1, dtype=torch.int32)
        self.sampled = torch.zeros(1, num_seqs, dtype=torch.int32)
        zeros, ones = torch.zeros(num_seqs), torch.ones(num_seqs)
        self.columns = SamplingColumns(
            temperature=zeros,
            top_k=zeros.int(),
            top_p=ones,
            min_p=zeros,
            draw=ones.double() / 2,
            rows=self.rows,
            # Where no later step reads it.
            positions=torch.full((num_seqs,), max_context, dtype=torch.int32),
        )

    def _random(self, *shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
        return torch.empty(shape, dtype=self.dtype).normal_(std=scale)

    def _random_layer(self) -> Layer:
        model = self.model
        heads = model.num_heads + 2 * model.num_kv_heads
        norms = [self._random(model.head_dim) + 1 for _ in range(2)] if model.norms_heads else [None, None]
        return Layer(
            input_norm=self._random(model.hidden) + 1,
            qkv=self._random(heads * model.head_dim, model.hidden),
            q_norm=norms[0],
            k_norm=norms[1],
            o=self._random(model.hidden, model.num_heads * model.head_dim),
            mlp_norm=self._random(model.hidden) + 1,
            gate_up=self._random(2 * model.intermediate, model.hidden),
            down=self._random(model.hidden, model.intermediate),
        )

    def launch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Launches the step. Returns what the last layer left, the logits and the tokens."""
        self.lengths.copy_(self.first_lengths)
        prepare_decodes(
            self.rows, self.lengths, self.token_ids, self.block_table, block_size=BLOCK_SIZE, **self.inputs
        )
        x = embed(self.inputs["input_ids"], self.embedding)
        residual = None
        for index in range(self.num_layers):
            layer = self.layers[index % len(self.layers)]
            if residual is None:
                residual, x = x, rms_norm(x, layer.input_norm, EPS)
            else:
                x = add_rms_norm(x, residual, layer.input_norm, EPS)
            x = self._multiply(x, layer.qkv)
            x = self._attend(x, layer, *self.caches[index % len(self.caches)])
            x = self._multiply(x, layer.o)
            x = add_rms_norm(x, residual, layer.mlp_norm, EPS)
            x = self._multiply(x, layer.gate_up)
            x = self._multiply(activate_and_mul(x, "silu"), layer.down)
        assert residual is not None
        hidden = add_rms_norm(x, residual, self.final_norm, EPS)
        logits = self._multiply(hidden, self.head)
        sample_rows(
            logits,
            columns=self.columns,
            token_ids=self.token_ids,
            out_token_ids=self.sampled,
            out_largest=None,
            slot=self.slot,
            workspace=self.sampling_workspace,
        )
        return hidden, logits, self.sampled

    def _multiply(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        config = choose_linear(self.num_seqs, *w.shape)
        product: torch.Tensor = linear(x, w, config=config, workspace=self.linear_workspace)
        return product

    def _attend(
        self, qkv: torch.Tensor, layer: Layer, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> torch.Tensor:
        model = self.model
        query = rotate_and_store(
            qkv,
            self.inputs["positions"],
            self.table,
            key_cache,
            value_cache,
            self.inputs["slot_mapping"],
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=EPS,
        )
        out = paged_decode_attention(
            query,
            key_cache,
            value_cache,
            block_table=self.block_table,
            rows=self.rows,
            seq_lens=self.inputs["seq_lens"],
            scale=model.head_dim**-0.5,
            num_splits=self.walk.num_splits or decode_splits(self.num_seqs, model.num_kv_heads, self.num_sms),
            out=query.new_empty(query.shape),
            workspace=self.attention_workspace,
            config=self.walk.config,
        )
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class Captured:
    """A step as a graph, and where its results are after a replay."""

    graph: torch.cuda.CUDAGraph
    results: tuple[torch.Tensor, ...]

    def replayed(self) -> list[torch.Tensor]:
        """Copies of the results of one replay; nothing of an earlier one can be left in them."""
        for result in self.results:
            result.fill_(-1)
        self.graph.replay()
        return [result.clone() for result in self.results]


def capture(step: DecodeStep, walk: Walk, *, overlap: bool) -> Captured:
    """The step as a graph. Its launches overlap or not, whatever is set later."""
    step.walk = walk
    set_overlap(overlap)
    try:
        step.launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step.launch()
    finally:
        set_overlap(True)
    return Captured(graph, results)


def times_ms(graphs: list[torch.cuda.CUDAGraph]) -> list[float]:
    """Median time of a replay of each, taken in turns so that the clock's drift is everyone's."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(3):
        for graph, into in zip(graphs, times, strict=True):
            for _ in range(WARM_UP):
                graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
            for event in events[:-1]:
                event.record()
                graph.replay()
            events[-1].record()
            events[-1].synchronize()
            into += [begin.elapsed_time(end) for begin, end in pairwise(events)]
    return [statistics.median(of_one) for of_one in times]


def measure(model_name: str, num_seqs: int) -> dict[str, Any]:
    """Every variant of one model's step for one number of requests."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        step = DecodeStep(MODELS[model_name], LAYERS[model_name], num_seqs, CONTEXT, torch.bfloat16)
    walks = [DEFAULT, *WALKS[num_seqs]]
    on = [capture(step, walk, overlap=True) for walk in walks]
    off = capture(step, DEFAULT, overlap=False)
    expected = off.replayed()
    for _ in range(10):
        same = all(torch.equal(a, b) for a, b in zip(on[0].replayed(), expected, strict=True))
        assert same, f"{model_name} S={num_seqs}: overlapping launches changed the result"
    differences = [float((one.replayed()[1].float() - expected[1].float()).abs().max()) for one in on]
    *on_ms, off_ms = times_ms([*(one.graph for one in on), off.graph])
    return {
        "off_ms": round(off_ms, 4),
        "on_ms": round(on_ms[0], 4),
        "gain": round(1 - on_ms[0] / off_ms, 4),
        "walks": {
            str(walk): {"on_ms": round(ms, 4), "difference": round(difference, 4)}
            for walk, ms, difference in zip(walks, on_ms, differences, strict=True)
        },
    }


def compile_variant(task: tuple[str, int, Walk, bool]) -> None:
    """Compiles a step's kernels in a process of its own; Triton's cache on disk keeps them."""
    model_name, num_seqs, walk, overlap = task
    with torch.device("cuda"):
        # A layer after the first, too, and caches of the strides and alignment that the real ones have.
        step = DecodeStep(MODELS[model_name], 2, num_seqs, CONTEXT, torch.bfloat16)
    step.walk = walk
    set_overlap(overlap)
    step.launch()
    torch.cuda.synchronize()


def compile_all() -> None:
    tasks = [(name, n, DEFAULT, overlap) for name in LAYERS for n in WALKS for overlap in (True, False)]
    tasks += [(name, n, walk, True) for name in LAYERS for n, walks in WALKS.items() for walk in walks]
    workers = min(COMPILERS, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes:
        list(processes.map(compile_variant, tasks))


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    compile_all()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "context": CONTEXT}
    for name in LAYERS:
        for num_seqs in WALKS:
            results[f"{name} S={num_seqs}"] = measure(name, num_seqs)
            torch.cuda.empty_cache()
    record.write(arguments.json, results)
    for case, result in results.items():
        if isinstance(result, dict):
            print(
                f"{case:16} off {result['off_ms']:8.3f} ms  on {result['on_ms']:8.3f}  {result['gain']:6.1%}"
            )
            for walk, told in result["walks"].items():
                print(f"  {walk:28} {told['on_ms']:8.3f}  differs by {told['difference']}")


if __name__ == "__main__":
    main()
