"""The scheduler's core and a model runner in one process: all decisions and all numbers are the real ones."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.config import WorkerConfig
from engine.dispatch.adapters import AdapterCommand, AdapterFacts
from engine.dispatch.records import TokenLogprobs
from engine.dispatch.sampling import F32Array, Pooling, SamplingRecord
from engine.step.runner import PendingStep
from engine.worker.build import MakePlatform, build_worker
from pagewire.base.errors import InvalidRequest
from pagewire.wire.block_hashes import root_hash
from scheduler.core import Scheduler
from scheduler.request import Request
from scheduler.settings import CoreSettings
from scheduler.step import StepOutput

STEPS_IN_FLIGHT = 2


class CoreDriver:
    """Serves requests of a checkpoint on the CPU, in float32 unless told otherwise. Blocks that a test's
    requests fill are found by later ones.

    Attributes:
        is_timed: whether the scheduler is told what steps take, by which it decides how many drafts pay.
    """

    is_timed = True

    def __init__(self, model: Path, make_platform: MakePlatform | None = None, **settings: Any) -> None:
        values = {"device": "cpu", "dtype": "float32", "block_size": 16, "num_blocks": 64, **settings}
        built = build_worker(WorkerConfig(model=str(model), socket=Path("unused"), **values), make_platform)
        self.runner, self.facts, self.adapters = built.runner, built.facts, built.adapters
        self.scheduler = Scheduler(built.facts.limits, CoreSettings())

    def load(self, adapter_id: int, directory: Path) -> None:
        """Has the worker read an adapter.

        Raises:
            InvalidRequest: it refuses it.
        """
        self._command("load", adapter_id, str(directory))
        self.scheduler.adapters.loaded(adapter_id)

    def _command(self, kind: str, adapter_id: int, path: str = "", slot: int = -1) -> None:
        assert self.adapters is not None
        command = AdapterCommand(kind, AdapterFacts(adapter_id, f"adapter-{adapter_id}", path), slot)
        while (progress := self.adapters.execute(command)).more:
            pass
        if progress.error:
            raise InvalidRequest(progress.error)

    def drop(self, adapter_id: int) -> None:
        """Has the worker forget an adapter."""
        self._command("drop", adapter_id)
        self.scheduler.adapters.dropped(adapter_id)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int],
        sampling: SamplingRecord | Sequence[SamplingRecord],
        adapter_ids: Sequence[int] = (),
        **more: Any,
    ) -> list[tuple[Request, list[TokenLogprobs]]]:
        """Serves all prompts together, each with its adapter, if any. Returns each request and its tokens'
        log probabilities.

        Args:
            more: of every request; see Request.
        """
        count = len(prompts)
        records = [sampling] * count if isinstance(sampling, SamplingRecord) else sampling
        lengths = [max_tokens] * count if isinstance(max_tokens, int) else max_tokens
        requests = [
            Request(
                str(number),
                array("I", prompt),
                len(prompt),
                record,
                max_total_tokens=len(prompt) + length,
                adapter_id=adapter_ids[number] if adapter_ids else 0,
                root_hash=root_hash("", adapter_ids[number] if adapter_ids else 0),
                **more,
            )
            for number, (prompt, record, length) in enumerate(zip(prompts, records, lengths, strict=True))
        ]
        logprobs: dict[str, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.scheduler.add(request)
        for output in self._steps():
            for index, (request, _) in enumerate(output.tokens):
                if index in output.logprobs:
                    logprobs[request.request_id].append(output.logprobs[index])
        return [(request, logprobs[request.request_id]) for request in requests]

    def pool(
        self, prompts: Sequence[Sequence[int]], kind: Pooling = Pooling.LAST
    ) -> list[tuple[Request, F32Array]]:
        """Pools all prompts together. Returns each request and what it got."""
        requests = [
            Request(
                str(number),
                array("I", prompt),
                len(prompt),
                SamplingRecord(pooling=kind),
                max_total_tokens=len(prompt) + 1,
            )
            for number, prompt in enumerate(prompts)
        ]
        for request in requests:
            self.scheduler.add(request)
        pooled = {request.request_id: state for output in self._steps() for request, state in output.pooled}
        return [(request, pooled[request.request_id]) for request in requests]

    def _steps(self) -> Iterator[StepOutput]:
        """Steps until nothing is left to do."""
        in_flight: deque[PendingStep] = deque()
        while True:
            while len(in_flight) < STEPS_IN_FLIGHT and (plan := self.scheduler.schedule()) is not None:
                in_flight.append(self.runner.launch(plan))
            if (placement := self.scheduler.adapters.next_placement()) is not None:
                self._command("place", placement[0], slot=placement[1])
                self.scheduler.adapters.placed(*placement)
                continue
            if not in_flight:
                return
            result = in_flight.popleft().result()
            assert not result.error, result.error
            if not self.is_timed:
                result.execute_us = 0
            yield self.scheduler.update(result)
