"""The engine under test: an `LLM`, with its worker process and the real dispatch, and a look at its steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from engine.dispatch.facts import WorkerFacts
from pagewire.base.errors import ConfigError, PagewireError
from pagewire.bench.step_meter import Listener, StepMeter
from pagewire.bench.workloads import WARM_UP, Workload
from pagewire.offline.llm import LLM, RequestOutput
from pagewire.wire.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests handed to the engine at once: prompts, and how many tokens each is to generate."""

    prompts: list[list[int]]
    output_lens: list[int]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a batch took.

    Attributes:
        began: `time.perf_counter` when it was handed over.
        seconds: until its last token.
        outputs: in the batch's order.
        steps: see StepMeter.report.
    """

    began: float
    seconds: float
    outputs: list[RequestOutput]
    steps: dict[str, Any]


# A worker captures its last graphs once it serves, some 20 ms each, when no plan is there.
SETTLE_SECONDS = 3.0


class BenchEngine:
    """Loads a model and runs batches greedily, every request to its exact length. A context manager.

    Args:
        model: a directory, .gguf file, id or alias.
        workloads: what will be run; the engine refuses what it could not.
        options: WorkerConfig fields.

    Raises:
        ConfigError: an option, the model or a workload is wrong.
    """

    def __init__(self, model: str, workloads: Sequence[Workload], options: dict[str, Any]) -> None:
        caching = any(workload.prefix_caching for workload in workloads)
        began = time.perf_counter()
        self._llm = LLM(model, enable_prefix_caching=caching, **options)
        self.load_seconds = time.perf_counter() - began
        # The only place that looks inside LLM: its core is what counts steps.
        self._engine = self._llm._running()
        try:
            for workload in (WARM_UP, *workloads):
                self.check(workload)
        except BaseException:
            self._llm.close()
            raise

    @property
    def facts(self) -> WorkerFacts:
        """What the worker says of itself."""
        return self._engine.facts

    def __enter__(self) -> BenchEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._llm.close()

    def describe(self) -> dict[str, Any]:
        """The worker's facts and the time it took to load, for the record."""
        return {**asdict(self.facts), "load_s": round(self.load_seconds, 2)}

    def warm_up(self) -> None:
        """Runs WARM_UP, so that the first measured batch finds everything compiled and allocated, and leaves
        the worker the time for what it does when it has nothing else to do."""
        self.use_prefix_caching(False)
        self.run(self.batch(WARM_UP, 0))
        if self.facts.device.startswith("cuda"):
            time.sleep(SETTLE_SECONDS)

    def batch(self, workload: Workload, round_: int) -> Batch:
        """A workload's requests, with prompts that no other round has."""
        prompts = workload.prompts(self.facts.limits.vocab_size, round_)
        return Batch(prompts, [output for _, output in workload.lengths()])

    def use_prefix_caching(self, wanted: bool) -> None:
        """Turns the sharing of prefixes on or off between batches; the cache is empty afterwards.

        It can be on only if one of the workloads given at the start asked for it.
        """
        core = self._engine.core
        core.prefixes.is_enabled = wanted
        core.pool.forget()

    def run(self, batch: Batch, listener: Listener | None = None) -> Measured:
        """Runs a batch to its end.

        Raises:
            PagewireError: a request did not generate exactly what it was asked for.
        """
        params = [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in batch.output_lens
        ]
        with StepMeter(self._engine.core, listener) as meter:
            began = time.perf_counter()
            outputs = self._llm.generate(batch.prompts, params)
            seconds = time.perf_counter() - began
        for output, wanted in zip(outputs, batch.output_lens, strict=True):
            got = len(output.outputs[0].token_ids)
            if got != wanted:
                raise PagewireError(f"{output.request_id} generated {got} tokens instead of {wanted}")
        return Measured(began, seconds, outputs, meter.report(seconds))

    def check(self, workload: Workload) -> None:
        """Raises ConfigError if the workload has requests that are too long for this engine."""
        if workload.longest > self.facts.limits.max_model_len:
            raise ConfigError(
                f"{workload.name} ({workload}) has requests of {workload.longest} tokens, max_model_len is "
                f"{self.facts.limits.max_model_len}; choose a longer --max-model-len or shorter requests"
            )
