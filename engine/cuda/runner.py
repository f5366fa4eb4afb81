"""Runs step plans on a GPU. Tokens, block tables, inputs and samples stay in device memory.

The host sends each step as one small copy (its columns and the changes of the rows) and reads one small copy
back (the sampled ids). Nothing in between waits for the host: the next step reads a step's sampled tokens
from the rows on the device.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.cuda.adapters import CudaAdapterBatch, adapter_groups
from engine.cuda.attention import (
    PrefixMetadata,
    TritonAttentionBackend,
    TritonAttentionMetadata,
)
from engine.cuda.device_errors import failed_step, is_lost
from engine.cuda.graphs import GraphSize, StepGraphs, decode_graph_sizes
from engine.cuda.prompt_states import PromptStates, PromptTransfer
from engine.cuda.results import LaunchedStep, ResultBuffers
from engine.cuda.rows import DeviceRows
from engine.cuda.sampling_extras import SamplingExtras, sampling_columns
from engine.cuda.staging import NUM_TURNS
from engine.cuda.step_layout import (
    StepLayout,
    exact_shape,
    fill_adapters,
    fill_columns,
    fill_drafts,
    fill_sampling,
    lay_out,
    padded_shape,
    token_slots,
)
from engine.cuda.step_shape import StepColumns, StepShape, device_columns, host_columns
from engine.dispatch.limits import EngineLimits
from engine.dispatch.records import NO_COPIES, StepPlan, StepResult
from engine.dispatch.sampling import u32
from engine.kernels.copy_blocks.kernel import copy_blocks
from engine.kernels.lora.kernel import AdapterTiles, tile_tokens
from engine.kernels.sampling.kernel import SamplingWorkspace, sample_rows
from engine.kernels.speculation.kernel import accept_drafts, prepare_slots, propose_ngrams
from engine.kernels.step_inputs.kernel import (
    fill_group_slots,
    prepare_chunks,
    prepare_decodes,
    scatter_words,
)
from engine.layers.adapters import AdapterBatch
from engine.layers.step_context import StepContext
from engine.models.base import CausalLM
from engine.platform.kv_cache import KVPool
from engine.sampling.masks import mask_batch
from engine.sampling.parameters import SamplingBatch
from engine.speculation.settings import SpeculationSettings
from engine.step.pipeline import PipelineStage
from engine.step.prompt_work import PromptWork, find_prompt_work
from engine.step.row_ledger import PlanError
from engine.step.runner import DeviceLost, FinishedStep, PendingStep

logger = logging.getLogger(__name__)

_SMALLEST_REHEARSAL = 64
_MAX_KEPT_SHAPES = 1024


@dataclass(slots=True)
class _Inputs:
    """The model's inputs, which `prepare_*` and `fill_group_slots` compute from the columns of each step.

    `slot_mapping` is of the first KV group, `group_slots` [groups - 1, tokens] of the others. With
    speculation `slot_rows` are the rows of the slots that compute something, and `next_drafts` the drafts
    after them.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    group_slots: torch.Tensor
    slot_rows: torch.Tensor
    next_drafts: torch.Tensor

    @classmethod
    def allocate(cls, max_tokens: int, max_seqs: int, num_groups: int, device: torch.device) -> _Inputs:
        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        tokens = (zeros(max_tokens), zeros(max_tokens), zeros(max_tokens))
        seqs = (zeros(max_seqs), zeros(max_seqs))
        return cls(*tokens, zeros(max_seqs), zeros(num_groups - 1, max_tokens), *seqs)


class CudaModelRunner:
    """Owns a model's rows and KV pool and executes plans in order. Used by one thread only.

    `launch` starts a step without waiting for the device, so that the next plan can be launched behind it.
    It also works without a GPU, under Triton's interpreter.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: TritonAttentionBackend,
        kv_pool: KVPool,
        rows: DeviceRows,
        speculation: SpeculationSettings | None = None,
        stage: PipelineStage | None = None,
    ) -> None:
        """`stage`: of a pipeline, if it is one."""
        self._speculation = speculation
        self.model = model
        self.stage = stage
        self.backend = backend
        self.kv_pool = kv_pool
        self.rows = rows
        self.device = rows.arena.device
        self.graphs = StepGraphs(self._compute, self.device)
        self._sizes_left: list[GraphSize] = []
        self._sizes_when_met: tuple[list[GraphSize], list[GraphSize]] = ([], [])
        limits = rows.limits
        # With the padding of a graph, a step may exceed the limits on tokens and requests.
        max_decodes = max_decode_slots(limits)
        max_tokens = limits.max_num_batched_tokens + max_decodes
        max_slots = limits.max_num_seqs + max_decodes
        self._inputs = _Inputs.allocate(max_tokens, max_slots, limits.num_kv_groups, self.device)
        # The slots of a step's tokens, the block tables and the window of each KV group.
        slot_mappings = (self._inputs.slot_mapping, *self._inputs.group_slots)
        self._kv_groups = list(zip(slot_mappings, rows.block_tables, limits.kv_windows, strict=True))
        self._results = ResultBuffers(max_slots, self.device, speculates=speculation is not None)
        self._workspace = SamplingWorkspace.allocate(max_slots, limits.vocab_size, self.device)
        self._extras = SamplingExtras(
            rows, self._results.token_ids, self._workspace, append=speculation is None
        )
        self._prompts = PromptStates(rows, model.compute_logits, model.finish_pooled, self.device)
        num_words = self._max_words()
        pin = self.device.type == "cuda"
        self._staged = [torch.zeros(num_words, dtype=torch.int32, pin_memory=pin) for _ in range(NUM_TURNS)]
        self._host_words = [staged.numpy() for staged in self._staged]
        self._words = torch.zeros(num_words, dtype=torch.int32, device=self.device)
        self._nowhere = torch.full((1,), -1, dtype=torch.int32, device=self.device)
        self._next_result = 0
        # The step that is being launched, if adapters change the embedding or the output projection in it.
        self._adapted: StepLayout | None = None
        self._device_columns: dict[StepShape, StepColumns[torch.Tensor]] = {}

    def _max_words(self) -> int:
        """32-bit words of the largest step: its columns, and two words for each changed word of the rows
        (including their lengths) and for each copied block.
        """
        limits = self.rows.limits
        seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        decodes = max_decode_slots(limits)
        speculates = self._speculation is not None
        columns = StepShape(decodes, seqs, tokens, tokens + seqs + decodes, speculates=speculates).num_words
        # A block is copied at most once for each request and group.
        blocks = (seqs + tokens // limits.block_size + seqs) * limits.num_kv_groups
        return columns + 2 * (limits.max_new_words + blocks + 3 * seqs)

    @property
    def _samples(self) -> bool:
        """Whether it samples: it is no stage of a pipeline, or the last one."""
        return self.stage is None or self.stage.is_last

    @property
    def largest_shape(self) -> StepShape:
        """The shape of a step with the most tokens and the most requests."""
        limits = self.rows.limits
        seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        return self._padded(0, seqs, tokens)

    def _padded(
        self,
        num_decodes: int,
        num_chunks: int,
        num_chunk_tokens: int,
        shares_prefix: bool = False,
        has_adapters: bool = False,
    ) -> StepShape:
        return padded_shape(
            num_decodes,
            num_chunks,
            num_chunk_tokens,
            self.backend.block_q,
            tile_decodes=self.backend.tile_decodes,
            shares_prefix=shares_prefix,
            speculates=self._speculation is not None,
            num_loras=self.rows.limits.max_loras if has_adapters else 0,
            invariant=self.backend.tile_decodes,
        )

    @torch.inference_mode()
    def rehearse(self, shape: StepShape) -> None:
        """Runs a step of padding only: this compiles kernels and allocates memory, and changes no row."""
        self._send_padding(shape)
        scatter_words(self.rows.arena, self._nowhere, self._nowhere, 1)
        copy_blocks(self.kv_pool.blocks, self._nowhere, self._nowhere)
        hidden = self._run_model(shape)
        if not self._samples:
            return
        logits = self._sample(shape, hidden)
        self._extras.rehearse(logits, self._columns(shape), self._positions(shape))
        self._accept(shape)
        self._prompts.rehearse(hidden)

    def rehearse_sizes(self, sizes: Sequence[GraphSize]) -> None:
        """Rehearses the padded shapes of graphs of these sizes."""
        for size in sizes:
            self.rehearse(self._padded(*size))

    def rehearse_prompts(self) -> None:
        """Rehearses prefill steps of all magnitudes once, so that kernels for each number of tokens are
        compiled and loaded before the first request needs them."""
        limits = self.rows.limits
        for has_adapters in (False, True)[: 2 if limits.max_loras else 1]:
            tokens = limits.max_num_batched_tokens
            while tokens >= _SMALLEST_REHEARSAL:
                shape = self._padded(0, min(limits.max_num_seqs, tokens), tokens, has_adapters=has_adapters)
                self.rehearse(shape)
                tokens //= 2

    def capture(self, sizes: Sequence[GraphSize]) -> None:
        """Captures CUDA graphs of steps of these sizes."""
        self.graphs.capture([self._padded(*size) for size in sizes])

    def capture_later(self, sizes: Sequence[GraphSize]) -> None:
        """Leaves the capture of graphs of these sizes to `work_ahead`, the largest first."""
        self._sizes_left = sorted(sizes, key=lambda size: size.num_tokens)

    def capture_when_met(self, first: Sequence[GraphSize], later: Sequence[GraphSize]) -> None:
        """Leaves the capture of graphs to `met`: those of a rank hold what it and others send each other."""
        self._sizes_when_met = list(first), list(later)

    def met(self, texts: Callable[[str], list[str]]) -> None:
        """Captures graphs anew, and leaves some to `work_ahead`, now that the ranks of the group have met.
        All ranks capture the same: a step that one pads and another does not has other collectives.

        Args:
            texts: gives a text to all ranks, and returns those of all.

        Raises:
            OSError: another rank is lost, or the graphs cannot be captured.
        """
        self.graphs.forget()
        sizes = [json.loads(text) for text in texts(json.dumps(self._sizes_when_met))]
        common = [
            [GraphSize(*size) for size in sizes[0][part] if all(size in other[part] for other in sizes)]
            for part in range(2)
        ]
        try:
            self.capture(common[0])
        except RuntimeError as error:
            raise OSError(f"the graphs of a group of ranks cannot be captured: {error}") from error
        self.capture_later(common[1])

    def work_ahead(self) -> bool:
        """Captures one of the graphs left by `capture_later`. Returns whether there are more.

        Raises:
            DeviceLost: the device failed during capture.
        """
        if not self._sizes_left:
            return False
        try:
            self.capture([self._sizes_left.pop()])
        except RuntimeError as error:  # without graphs, steps are launched kernel by kernel, as before
            # Ranks must have the same graphs: one that cannot capture them is of no use to the others.
            if is_lost(error, self.device) or self._sizes_when_met[0]:
                raise DeviceLost(f"while a graph was captured: {error}") from error
            logger.warning("%d graphs are not captured: %s", len(self._sizes_left) + 1, error)
            self._sizes_left = []
        if not self._sizes_left:
            logger.info("%d graphs in all", len(self.graphs))
        return bool(self._sizes_left)

    def reset(self) -> None:
        """Forgets every request. Nothing refers to the KV pool's content any more."""
        self.rows.reset()
        if self.stage is not None:
            self.stage.reset()

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts one step. A bad plan or a failure in the model raises nothing: the result carries the error,
        and the rows stay usable."""
        began = time.perf_counter()
        step: PendingStep
        try:
            step = self._launch(plan)
            if isinstance(step, LaunchedStep) and self.device.type == "cuda":
                step.launch_us = round((time.perf_counter() - began) * 1e6)
        except PlanError as error:
            self.rows.take_changes()
            return FinishedStep.failed(plan.step_id, f"inconsistent plan: {error}")
        except Exception as error:
            self.rows.take_changes()
            logger.exception("step %d failed", plan.step_id)
            step = failed_step(plan.step_id, error, self.device)
        if self.stage is not None and self.stage.is_last:
            return self.stage.returning(step, plan)
        return step

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> PendingStep:
        rows = self.rows
        if self.stage is not None:
            for some_rows, places, tokens in self.stage.tokens_for(plan):
                rows.put_tokens(some_rows, places, tokens)
        rows.apply(plan)
        if not len(plan.rows):
            return FinishedStep(StepResult(plan.step_id, u32([])))
        rows.check_schedule(plan)
        work = find_prompt_work(plan, rows)
        layout = lay_out(plan)
        if rows.limits.max_loras:
            slots = rows.adapter_slots[layout.rows]
            layout.adapter_slots = slots if (slots >= 0).any() else None
        has_adapters = layout.adapter_slots is not None
        if not self.backend.tile_decodes and not has_adapters:
            decodes = slice(layout.num_decodes)
            layout.prefix = rows.shared_prefix(layout.rows[decodes], layout.starts[decodes])
        index = self._next_result
        self._next_result = (index + 1) % NUM_TURNS
        self._results.begin(index)
        graph = None
        self._adapted = None
        if layout.adapter_slots is not None and not self.model.adapter_tables.isdisjoint(
            layout.adapter_slots.tolist()
        ):
            self._adapted = layout
        if work is None and self._adapted is None:
            graph = self.graphs.find(
                layout.num_decodes,
                layout.num_chunks,
                layout.num_chunk_tokens,
                shares_prefix=layout.prefix is not None,
                has_adapters=has_adapters,
            )
        shape = graph or exact_shape(
            layout,
            self.backend.block_q,
            tile_decodes=self.backend.tile_decodes,
            speculates=self._speculation is not None,
            num_loras=rows.limits.max_loras,
            invariant=self.backend.tile_decodes,
        )
        batch = self._fill(index, shape, layout)
        order = layout.plan_order
        num_slots = layout.num_slots
        if self._speculation is not None and num_slots is None:
            num_slots = np.ones(len(order), np.int64)
        if plan.masks:
            first = order if num_slots is None else order[np.cumsum(num_slots) - num_slots]
            mask_batch(batch, plan, first, rows.limits.vocab_size)
        self._send(index, shape, plan.copied_blocks)
        if self.stage is not None:
            self.stage.receive(shape.num_tokens)
        if self.stage is not None and not self.stage.is_last:
            return self._pass_on(index, plan.step_id, shape, layout, captured=graph is not None)
        logits, prompts = self._execute(shape, layout, work, captured=graph is not None)
        slots = _slots(layout, shape)
        logprobs = self._extras.after_sampling(
            batch, slots, order, logits, self._columns(shape), self._positions(shape)
        )
        self._accept(shape)
        rows.num_tokens[plan.rows[plan.samples != 0].astype(np.int64)] += 1
        return self._results.collect(index, plan.step_id, slots[order], logprobs, prompts, num_slots)

    def _pass_on(
        self, index: int, step_id: int, shape: StepShape, layout: StepLayout, *, captured: bool
    ) -> PendingStep:
        """Launches a step of a stage before the last, and gives the next one what it makes."""
        assert self.stage is not None
        hidden = self.graphs.replay(shape) if captured else self._compute(shape)
        self.stage.send(hidden[: shape.num_tokens])
        sampled = layout.rows[layout.plan_order]
        self.stage.sampled(sampled, self.rows.num_tokens[sampled])
        self.rows.num_tokens[sampled] += 1
        return self._results.collect(index, step_id, layout.plan_order[:0], None, None)

    def _execute(
        self, shape: StepShape, layout: StepLayout, work: PromptWork | None, *, captured: bool
    ) -> tuple[torch.Tensor, PromptTransfer | None]:
        """Launches a step whose columns were sent. Returns its raw logits and its transfer of prompt logprobs
        and pooled states, if any."""
        if captured:
            return self.graphs.replay(shape), None
        if work is None:
            return self._compute(shape), None
        hidden = self._run_model(shape)
        logits = self._sample(shape, hidden)
        compute = self._adapted_logits if self._adapted is not None else None
        return logits, self._prompts.after_model(work, layout, hidden, compute)

    def _adapted_logits(self, hidden: torch.Tensor, tokens: IntArray) -> torch.Tensor:
        """The logits of some of a step's tokens, where adapters change the output projection."""
        return self.model.compute_logits(hidden, self._batch_of(tokens))

    def _batch_of(self, tokens: IntArray) -> AdapterBatch | None:
        """The adapters of some of an unpadded step's tokens, where one changes the embedding or the output
        projection; None in all other steps."""
        layout = self._adapted
        if layout is None:
            return None
        slots = token_slots(layout, layout.num_decodes, layout.num_decodes + layout.num_chunk_tokens)
        return AdapterBatch(adapter_groups(slots[tokens], self.device))

    def _send(self, index: int, shape: StepShape, copied_blocks: np.ndarray) -> None:
        """Copies the step's columns and the changes of the rows to the device, applies them and copies
        blocks."""
        places, words = self.rows.take_changes()
        host, end = self._host_words[index], shape.num_words
        for part in (places, words, copied_blocks[:, 0], copied_blocks[:, 1]):
            host[end : end + len(part)] = part
            end += len(part)
        self._words[:end].copy_(self._staged[index][:end], non_blocking=True)
        count, num_copied = len(places), len(copied_blocks)
        if count:
            changed = self._words[shape.num_words :]
            scatter_words(self.rows.arena, changed[:count], changed[count : 2 * count], count)
        if num_copied:
            copied = self._words[end - 2 * num_copied : end]
            copy_blocks(self.kv_pool.blocks, copied[:num_copied], copied[num_copied:])

    def _send_padding(self, shape: StepShape) -> None:
        """Sends the columns of a step without requests."""
        nobody = np.zeros(0, dtype=np.int64)
        layout = StepLayout(nobody, nobody, nobody, nobody.astype(bool), 0, nobody, nobody)
        self._fill(0, shape, layout)
        self._send(0, shape, NO_COPIES)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _fill(self, index: int, shape: StepShape, layout: StepLayout) -> SamplingBatch:
        columns = host_columns(self._host_words[index], shape)
        fill_columns(
            columns,
            shape,
            layout,
            result=index,
            block_q=self.backend.block_q,
            tile_decodes=self.backend.tile_decodes,
        )
        if shape.speculates:
            fill_drafts(columns, shape, layout, self.rows)
        fill_adapters(columns, shape, layout, invariant=self.backend.tile_decodes)
        return fill_sampling(columns, shape, layout, self.rows)

    def _columns(self, shape: StepShape) -> StepColumns[torch.Tensor]:
        """The step's columns on the device: views of fixed memory, made once per shape."""
        if shape not in self._device_columns:
            if len(self._device_columns) >= _MAX_KEPT_SHAPES:
                self._device_columns.clear()
            self._device_columns[shape] = device_columns(self._words, shape)
        return self._device_columns[shape]

    @torch.inference_mode()
    def _compute(self, shape: StepShape) -> torch.Tensor:
        """Runs model and sampling for columns that are on the device. Returns the raw logits, [S, vocab];
        of a stage before the last, the hidden states, [T, hidden]."""
        hidden = self._run_model(shape)
        return self._sample(shape, hidden) if self._samples else hidden

    def _run_model(self, shape: StepShape) -> torch.Tensor:
        """Runs the model on a step's tokens. Returns their final hidden states, [T, hidden]."""
        columns = self._columns(shape)
        self._prepare(shape, columns)
        num_tokens, num_slots = shape.num_tokens, shape.num_slots
        prefix = None
        if shape.shares_prefix:
            prefix = PrefixMetadata(columns.prefix_row, columns.prefix_len, columns.prefix_lens)
        attention = [
            TritonAttentionMetadata(
                slot_mapping=slots[:num_tokens],
                num_decodes=shape.num_decodes,
                rows=self._slot_rows(shape, columns),
                seq_lens=self._inputs.seq_lens[:num_slots],
                query_start_loc=columns.query_start_loc,
                tile_request=columns.tile_request,
                tile_start=columns.tile_start,
                block_table=block_table,
                prefix=None if window else prefix,
            )
            for slots, block_table, window in self._kv_groups
        ]
        positions = self._inputs.positions[:num_tokens]
        context = StepContext(
            positions,
            attention=attention,
            rotations=[self.backend.rotation(table, positions) for table in self.model.rotary_tables],
            adapters=self._adapter_batch(shape, columns),
        )
        received = None if self.stage is None else self.stage.input(num_tokens)
        token_ids = self._inputs.input_ids[:num_tokens]
        hidden: torch.Tensor = self.model(token_ids, context, self.kv_pool.layers, received)
        return hidden

    def _adapter_batch(self, shape: StepShape, columns: StepColumns[torch.Tensor]) -> CudaAdapterBatch | None:
        if not shape.num_adapter_tiles:
            return None
        invariant = self.backend.tile_decodes
        tiles = AdapterTiles(
            columns.adapter_tokens,
            columns.adapter_slot,
            columns.adapter_begin,
            columns.adapter_end,
            tile_tokens(shape.num_tokens, invariant=invariant),
        )
        whole = self._batch_of(np.arange(shape.num_tokens))
        return CudaAdapterBatch(() if whole is None else whole.groups, tiles)

    def _sample(self, shape: StepShape, hidden: torch.Tensor) -> torch.Tensor:
        """Samples a token in every slot. Returns the raw logits, [S, vocab]."""
        columns = self._columns(shape)
        if shape.num_chunks:
            hidden = hidden.index_select(0, columns.logits_index)
        if self._adapted is None:
            logits = self.model.compute_logits(hidden)
        else:
            ends = np.cumsum(self._adapted.counts) - 1
            logits = self._adapted_logits(hidden, ends)
        sample_rows(
            logits,
            columns=sampling_columns(columns, self._positions(shape)),
            token_ids=self.rows.token_ids,
            out_token_ids=self._results.token_ids,
            out_largest=self._results.largest,
            slot=columns.result,
            workspace=self._workspace,
            append=not shape.speculates,
        )
        return logits

    def _accept(self, shape: StepShape) -> None:
        """With speculation, appends to the rows what requests gain. It comes after all that samples."""
        settings, results = self._speculation, self._results
        if settings is None:
            return
        columns = self._columns(shape)
        accept_drafts(
            columns.sampling_rows,
            columns.offsets,
            columns.group_sizes,
            self._positions(shape),
            self._inputs.next_drafts,
            self.rows.lengths,
            self.rows.token_ids,
            out_token_ids=results.token_ids,
            out_counts=results.counts,
            out_drafts=results.drafts,
            slot=columns.result,
            acceptance=settings.acceptance if settings.method == "test" else None,
        )

    def _slot_rows(self, shape: StepShape, columns: StepColumns[torch.Tensor]) -> torch.Tensor:
        """The row of each slot, -1 where nothing is computed, [S]."""
        return self._inputs.slot_rows[: shape.num_slots] if shape.speculates else columns.rows

    def _positions(self, shape: StepShape) -> torch.Tensor:
        """The position of each slot's sampled token, [S]: right after its computed tokens."""
        return self._inputs.seq_lens[: shape.num_slots]

    def _prepare_drafts(
        self, shape: StepShape, columns: StepColumns[torch.Tensor], settings: SpeculationSettings
    ) -> None:
        """Proposes drafts, and lays out the decodes with them."""
        rows, inputs, num_decodes = self.rows, self._inputs, shape.num_decodes
        propose_ngrams(
            columns.rows[:num_decodes],
            columns.offsets,
            columns.group_sizes,
            columns.room,
            rows.lengths,
            rows.token_ids,
            rows.device_predictions,
            rows.prediction_lengths,
            rows.prompt_lengths,
            inputs.next_drafts,
            least=settings.prompt_lookup_min,
            most=settings.prompt_lookup_max,
            is_test=settings.method == "test",
        )
        prepare_slots(
            columns.rows,
            columns.offsets,
            columns.room,
            columns.seeds,
            inputs.next_drafts,
            rows.lengths,
            rows.token_ids,
            rows.block_tables[0],
            block_size=rows.limits.block_size,
            num_decodes=num_decodes,
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            seq_lens=inputs.seq_lens,
            slot_rows=inputs.slot_rows,
            draws=columns.draws,
        )

    def _prepare(self, shape: StepShape, columns: StepColumns[torch.Tensor]) -> None:
        rows, inputs, num_decodes = self.rows, self._inputs, shape.num_decodes
        if self._speculation is not None:
            self._prepare_drafts(shape, columns, self._speculation)
        elif num_decodes:
            prepare_decodes(
                columns.rows[:num_decodes],
                rows.lengths,
                rows.token_ids,
                rows.block_tables[0],
                block_size=rows.limits.block_size,
                input_ids=inputs.input_ids,
                positions=inputs.positions,
                slot_mapping=inputs.slot_mapping,
                seq_lens=inputs.seq_lens,
            )
        if shape.num_chunks:
            prepare_chunks(
                columns.rows[num_decodes:],
                columns.starts,
                columns.query_start_loc[num_decodes:],
                columns.sampling_rows[num_decodes:],
                rows.lengths,
                rows.token_ids,
                rows.block_tables[0],
                block_size=rows.limits.block_size,
                num_tokens=shape.num_tokens,
                max_count=shape.num_chunk_tokens,
                request_offset=num_decodes,
                input_ids=inputs.input_ids,
                positions=inputs.positions,
                slot_mapping=inputs.slot_mapping,
                seq_lens=inputs.seq_lens,
            )
        if len(inputs.group_slots):
            fill_group_slots(
                self._slot_rows(shape, columns),
                columns.query_start_loc,
                inputs.positions[: shape.num_tokens],
                rows.block_tables[1:],
                block_size=rows.limits.block_size,
                num_decodes=num_decodes,
                slot_mappings=inputs.group_slots,
            )


def max_decode_slots(limits: EngineLimits) -> int:
    """The most decodes of a step, a draft being one, and padding of graphs."""
    return max(
        limits.max_num_seqs + limits.max_draft_tokens,
        *decode_graph_sizes(limits.max_num_seqs, limits.max_drafts),
    )


def _slots(layout: StepLayout, shape: StepShape) -> np.ndarray:
    """The slot of each request of the layout in the padded step."""
    slots = np.arange(len(layout.rows))
    slots[layout.num_decodes :] += shape.num_decodes - layout.num_decodes
    return slots
