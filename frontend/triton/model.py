"""The served model as Triton's clients see it: names, metadata, configuration and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frontend.generation.pipeline import GenerationPipeline
from frontend.generation.request import MAX_CHOICES
from frontend.inference_counters import InferenceCounters
from frontend.triton.inputs import INPUTS, OUTPUTS
from pagewire.base.errors import NotFound
from pagewire.base.version import __version__

ALIASES = ("ensemble", "tensorrt_llm_bls")
"""What TensorRT-LLM's model repositories call the model that takes and answers text."""

VERSION = "1"
PLATFORM = "pagewire"

_EXTENSIONS = (
    "binary_tensor_data",
    "generate",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)


class TritonModel:
    """Answers questions about the one model that is served, under each of its names."""

    def __init__(self, pipeline: GenerationPipeline, counters: InferenceCounters) -> None:
        self._pipeline = pipeline
        self._counters = counters

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model, and its adapters."""
        return tuple(dict.fromkeys((*self._pipeline.model.all_names, *ALIASES)))

    def check(self, name: str, version: str = "") -> None:
        """Accepts the model's names and its version.

        Raises:
            NotFound: there is no such model, or no such version of it.
        """
        if name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise NotFound(f"unknown model {name!r}; this server has {known}", param="model")
        if version not in ("", VERSION, "-1"):
            raise NotFound(
                f"the model {name!r} has no version {version!r}; it has {VERSION}", param="version"
            )

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a request for a model would be served now."""
        try:
            self.check(name, version)
        except NotFound:
            return False
        return self._pipeline.ready

    @staticmethod
    def server_metadata() -> dict[str, Any]:
        """What the server is."""
        return {"name": "pagewire", "version": __version__, "extensions": list(_EXTENSIONS)}

    def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """A model's tensors; the first of their dimensions is the batch.

        Raises:
            NotFound: there is no such model.
        """
        self.check(name, version)
        return {
            "name": name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [
                {"name": each, "datatype": known.datatype, "shape": [-1, *known.dims]}
                for each, known in INPUTS.items()
                if known.served
            ],
            "outputs": [
                {"name": each, "datatype": datatype, "shape": [-1, *dims]}
                for each, (datatype, dims) in OUTPUTS.items()
            ],
        }

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """A model's configuration.

        Raises:
            NotFound: there is no such model.
        """
        self.check(name, version)
        return {
            "name": name,
            "platform": "",
            "backend": PLATFORM,
            "max_batch_size": MAX_CHOICES,
            "input": [
                {
                    "name": each,
                    "data_type": _type_of(known.datatype),
                    "dims": list(known.dims),
                    "optional": not known.required,
                }
                for each, known in INPUTS.items()
                if known.served
            ],
            "output": [
                {"name": each, "data_type": _type_of(datatype), "dims": list(dims)}
                for each, (datatype, dims) in OUTPUTS.items()
            ],
            "model_transaction_policy": {"decoupled": True},
        }

    def index(self, *, ready_only: bool) -> list[dict[str, str]]:
        """The models that there are."""
        ready = self._pipeline.ready
        if ready_only and not ready:
            return []
        reason = "" if ready else self._pipeline.why_not_ready()
        state = "READY" if ready else "UNAVAILABLE"
        return [{"name": name, "version": VERSION, "state": state, "reason": reason} for name in self.names]

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """What is counted of a model, or of all. All names have the same counts, those of the one model.

        Raises:
            NotFound: there is no such model.
        """
        if name:
            self.check(name, version)
        counted = _counted(self._counters)
        names = (name,) if name else self.names
        return {"model_stats": [{"name": each, "version": VERSION, **counted} for each in names]}


def _counted(counters: InferenceCounters) -> Mapping[str, Any]:
    successes = counters.successes
    return {
        "last_inference": round(counters.last_ended * 1e3),
        "inference_count": counters.inferences,
        "execution_count": successes,
        "inference_stats": {
            "success": _duration(successes, counters.request),
            "fail": _duration(counters.failures.total(), counters.failed),
            "queue": _duration(successes, counters.queue),
            "compute_input": _duration(successes, counters.compute_input),
            "compute_infer": _duration(successes, counters.compute_infer),
            "compute_output": _duration(successes, 0),
            "cache_hit": _duration(0, 0),
            "cache_miss": _duration(0, 0),
        },
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def _type_of(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
