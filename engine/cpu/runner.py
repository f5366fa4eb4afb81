"""Runs step plans: applies them to the rows, feeds the model, samples, and hands results back."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from engine.attention.interface import IntArray
from engine.cpu.adapters import adapter_batch
from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.drafts import CpuDrafter, DraftTokens
from engine.cpu.prompt_states import NotFinite, PooledStates, compute_prompt_logprobs
from engine.cpu.recorded_steps import RecordedSteps
from engine.cpu.results import NO_PROMPT_RESULTS, PromptResults, SampledStep
from engine.cpu.rows import RequestRows
from engine.cpu.step_layout import StepInputs, make_context, prepare_inputs
from engine.dispatch.records import PromptLogprobs, StepPlan, StepResult
from engine.dispatch.sampling import u32
from engine.layers.adapters import AdapterBatch
from engine.models.base import CausalLM
from engine.platform.kv_cache import KVPool
from engine.sampling.masks import mask_batch
from engine.sampling.sampler import sample
from engine.step.accepted import AcceptedSlots
from engine.step.pipeline import make_stage
from engine.step.prompt_work import PromptWork, find_prompt_work
from engine.step.row_ledger import PlanError
from engine.step.runner import NOT_FINITE, FinishedStep, PendingStep

logger = logging.getLogger(__name__)


class CpuModelRunner:
    """Owns a model's rows and KV pool and executes plans in order. One thread uses it.

    `launch` starts a step without waiting for the device, so that the next plan can be launched behind it;
    on the CPU the step is over when it returns.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: TorchAttentionBackend,
        kv_pool: KVPool,
        rows: RequestRows,
        recorded: RecordedSteps | None = None,
        drafter: CpuDrafter | None = None,
    ) -> None:
        """`recorded`: what runs steps of few tokens faster, if anything does. `drafter`: what proposes draft
        tokens, if anything does."""
        limits = rows.limits
        self._drafter = drafter
        self.model = model
        self.recorded = recorded
        self.backend = backend
        self.kv_pool = kv_pool
        self.rows = rows
        self.device = rows.token_ids.device
        self.stage = make_stage(
            model.parallel.communicator,
            model.stage.index,
            model.stage.count,
            num_rows=limits.max_num_seqs,
            hidden_size=limits.hidden_size,
            max_tokens=limits.max_num_batched_tokens,
            dtype=kv_pool.blocks.dtype,
            device=self.device,
        )
        self._pooled = PooledStates(rows.limits.max_num_seqs, rows.limits.hidden_size, model.finish_pooled)

    def reset(self) -> None:
        """Forgets every request. The KV pool's content is dead from here on: nothing refers to it."""
        self.rows.reset()
        if self.stage is not None:
            self.stage.reset()

    def work_ahead(self) -> bool:
        return False

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts one step. Never raises for what is in the plan or happens in the model: a failure becomes
        a result with an error, and the rows stay usable."""
        started = time.monotonic()
        step: PendingStep
        try:
            step = self._launch(plan, started)
        except PlanError as error:
            return FinishedStep.failed(plan.step_id, f"inconsistent plan: {error}")
        except NotFinite:
            step = FinishedStep.failed(plan.step_id, NOT_FINITE)
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            step = FinishedStep.failed(plan.step_id, f"{type(error).__name__}: {error}")
        if self.stage is not None and self.stage.is_last:
            return self.stage.returning(step, plan)
        return step

    @torch.inference_mode()
    def _launch(self, plan: StepPlan, started: float) -> PendingStep:
        if self.stage is not None:
            for rows, places, tokens in self.stage.tokens_for(plan):
                self.rows.put_tokens(rows, places, tokens)
        self.rows.apply(plan)
        if not len(plan.rows):
            return FinishedStep(StepResult(plan.step_id, u32([])))
        starts = self.rows.check_schedule(plan)
        drafts = None if self._drafter is None else self._drafter.propose(plan, starts)
        if drafts is not None and not drafts.num_slots.any():
            return FinishedStep(_nothing_gained(plan))
        inputs = prepare_inputs(plan, self.rows, starts, drafts)
        if len(plan.copied_blocks):
            copied = torch.from_numpy(plan.copied_blocks.astype(np.int64))
            self.kv_pool.copy(copied[:, 0].to(self.device), copied[:, 1].to(self.device))
        work = find_prompt_work(plan, self.rows)
        if not work and self.recorded is not None:
            logits = self.recorded.logits(inputs, self.rows.token_ids.view(-1))
            if logits is not None:
                return self._sample(plan, started, inputs, logits, NO_PROMPT_RESULTS, drafts)
        hidden = self._run_model(inputs)
        if self.stage is not None and not self.stage.is_last:
            return self._pass_on(plan, started, inputs, hidden)
        prompts = self._tell(work, hidden, inputs) if work else NO_PROMPT_RESULTS
        if not len(inputs.logits_indices):
            result = _nothing_gained(plan) if drafts else StepResult(plan.step_id, u32([]))
            result.execute_us = _microseconds_since(started)
            result.prompt_logprobs, result.pooled = prompts.logprobs, prompts.pooled
            return FinishedStep(result)
        last = hidden.index_select(0, torch.from_numpy(inputs.logits_indices).to(self.device))
        logits = self.model.compute_logits(last, _adapters_of(inputs, inputs.logits_indices))
        return self._sample(plan, started, inputs, logits.float(), prompts, drafts)

    def _pass_on(
        self, plan: StepPlan, started: float, inputs: StepInputs, hidden: torch.Tensor
    ) -> PendingStep:
        """Gives the next stage what this one has made; the last one samples."""
        assert self.stage is not None
        self.stage.send(hidden)
        rows = inputs.sampling_rows
        self.stage.sampled(rows, self.rows.num_tokens[rows])
        self.rows.num_tokens[rows] += 1
        return FinishedStep(StepResult(plan.step_id, u32([]), execute_us=_microseconds_since(started)))

    def _sample(
        self,
        plan: StepPlan,
        started: float,
        inputs: StepInputs,
        logits: torch.Tensor,
        prompts: PromptResults,
        drafts: DraftTokens | None,
    ) -> PendingStep:
        """Samples from the logits of the slots that sample, in the plan's order."""
        batch = self.rows.sampling.select(inputs.sampling_rows, inputs.sampling_positions)
        if plan.masks:
            everyone = np.cumsum(inputs.num_slots) - inputs.num_slots
            mask_batch(batch, plan, everyone, self.rows.limits.vocab_size)
        sampled = sample(logits, batch, self.rows.token_ids)
        if drafts is None:
            self.rows.append_sampled(inputs.sampling_rows, sampled.token_ids)
            return SampledStep(plan.step_id, started, sampled, prompts)
        accepted = self._accept(plan, inputs, sampled.token_ids, drafts)
        return SampledStep(plan.step_id, started, sampled, prompts, accepted)

    def _accept(
        self, plan: StepPlan, inputs: StepInputs, sampled: torch.Tensor, drafts: DraftTokens
    ) -> AcceptedSlots:
        """Appends to each row what it gains."""
        assert self._drafter is not None
        samples, rows, positions = plan.samples != 0, inputs.sampling_rows, inputs.sampling_positions
        by_slot, tokens = drafts.by_slot(samples), sampled.numpy()
        gained = self._drafter.count_gained(by_slot, tokens, inputs.num_slots, rows, positions)
        self.rows.write_drafts(
            rows, positions, tokens
        )  # those behind what is gained are behind the rows' ends
        self.rows.num_tokens[plan.rows[samples].astype(np.int64)] += gained
        return AcceptedSlots(inputs.num_slots, gained, np.maximum(inputs.num_slots - 1, 0))

    def _tell(self, work: PromptWork, hidden: torch.Tensor, inputs: StepInputs) -> PromptResults:
        logprobs: list[PromptLogprobs] = []
        if work.logprobs:
            logprobs = compute_prompt_logprobs(
                work.logprobs,
                hidden,
                inputs.begins,
                self.rows.token_ids,
                lambda part, places: self.model.compute_logits(part, _adapters_of(inputs, places)),
            )
        return PromptResults(logprobs, self._pooled.add(work.pooled, hidden, inputs.begins))

    def _run_model(self, inputs: StepInputs) -> torch.Tensor:
        """Final hidden states of the step's tokens, [T, hidden]."""
        token_index = torch.from_numpy(inputs.token_index).to(self.device, non_blocking=True)
        positions = torch.from_numpy(inputs.positions).to(self.device, non_blocking=True)
        token_ids = self.rows.token_ids.view(-1).index_select(0, token_index)
        adapters = adapter_batch(inputs.adapter_slots)
        context = make_context(self.model, self.backend, positions, inputs.layouts, adapters)
        received = None
        if self.stage is not None:
            self.stage.receive(len(positions))
            received = self.stage.input(len(positions))
        hidden: torch.Tensor = self.model(token_ids, context, self.kv_pool.layers, received)
        return hidden


def _adapters_of(inputs: StepInputs, tokens: IntArray) -> AdapterBatch | None:
    """The adapters of some of a step's tokens."""
    return None if inputs.adapter_slots is None else adapter_batch(inputs.adapter_slots[tokens])


def _nothing_gained(plan: StepPlan) -> StepResult:
    """Of a step whose requests have all been taken to their ends by steps before it."""
    nothing = np.zeros(np.count_nonzero(plan.samples), np.uint32)
    return StepResult(plan.step_id, u32([]), num_tokens=nothing, num_drafts=nothing)


def _microseconds_since(started: float) -> int:
    return round((time.monotonic() - started) * 1e6)
