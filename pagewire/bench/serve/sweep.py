"""A whole measurement: the loads that were asked for, one after another, against one server."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pagewire.base.errors import PagewireError
from pagewire.bench.serve.dataset_files import Trace
from pagewire.bench.serve.datasets import Dataset
from pagewire.bench.serve.generator import Generator, Measured
from pagewire.bench.serve.load import Load
from pagewire.bench.serve.metrics import Objectives, client_health, rows, summarize
from pagewire.bench.serve.share import Point


@dataclass(frozen=True, slots=True)
class Preset:
    """A load and random lengths with a name, so that measurements of several servers can be compared."""

    num_requests: int
    input_len: str
    output_len: str
    rate: str | None = None
    concurrency: str | None = None

    def __str__(self) -> str:
        load = f"{self.rate} per second" if self.rate else f"{self.concurrency} at a time"
        if self.rate is None and self.concurrency is None:
            load = "all at once"
        return f"{self.num_requests} x {self.input_len}/{self.output_len}, {load}"


PRESETS = {
    "burst": Preset(512, "256", "256"),
    "closed64": Preset(256, "512", "128", concurrency="64"),
    "rate8": Preset(256, "512", "256", rate="8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is measured.

    Attributes:
        dataset: what is asked.
        loads: the points, in order.
        uses_trace: whether requests come when the trace says.
        warmup: requests before the first point, not measured.
        objectives: of the goodput.
        save_requests: whether results have an entry for each request.
    """

    dataset: Dataset
    loads: Sequence[Load]
    uses_trace: bool = False
    warmup: int = 1
    objectives: Objectives
    save_requests: bool = False

    def run(
        self,
        generator: Generator,
        on_result: Callable[[dict[str, Any]], None],
        on_begin: Callable[[str], None] = lambda load: None,
    ) -> bool:
        """Measures every point, and tells of each when it begins and as soon as it is done.

        Returns:
            Whether Ctrl-C ended it.

        Raises:
            PagewireError: the server cannot be reached, or answers no request of the warm-up.
        """
        self._warm_up(generator)
        for number, load in enumerate(self.loads):
            on_begin(self._text(load))
            measured = generator.measure(
                Point(run=f"run {number}", load=load, dataset=self.dataset, uses_trace=self.uses_trace)
            )
            on_result(self._result(load, measured))
            if measured.interrupted:
                return True
        return False

    def _warm_up(self, generator: Generator) -> None:
        if not self.warmup:
            return
        most = max(load.concurrency or self.warmup for load in self.loads)
        answers = generator.warm_up(self.dataset, self.warmup, most)
        errors = [answer.error for answer in answers if answer.error]
        if errors and len(errors) == len(answers):
            raise PagewireError(f"the server answered no request of the warm-up: {errors[0]}")

    def _result(self, load: Load, measured: Measured) -> dict[str, Any]:
        result = {
            "load": {**asdict(load), "rate": _finite(load.rate), "text": self._text(load)},
            "dataset": str(self.dataset),
            "interrupted": measured.interrupted,
            **summarize(measured.answers, self.objectives),
            "client": client_health(measured.health, measured.answers),
        }
        if self.save_requests:
            result["per_request"] = rows(measured.answers)
        return result

    def _text(self, load: Load) -> str:
        if self.uses_trace and isinstance(self.dataset, Trace):
            return f"as recorded, {self.dataset.speed:g} times as fast"
        return str(load)


def _finite(rate: float) -> float | None:
    """JSON has no infinity."""
    return None if math.isinf(rate) else rate
