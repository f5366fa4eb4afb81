"""Steps in which every request computes one token: recorded for each number of requests, then run again in
one call.

What Python does between the kernels of a step takes as long as the kernels themselves when there is one
token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from engine.attention.interface import BatchLayout
from engine.cpu.adapters import CpuAdapterBatch
from engine.cpu.attention import TorchAttentionBackend
from engine.cpu.kernels.library import NativeLibrary, Program
from engine.cpu.step_layout import StepInputs, make_context
from engine.dispatch.limits import EngineLimits
from engine.models.base import CausalLM
from engine.platform.kv_cache import KVPool

# With more requests the kernels take so long that what lies between them does not matter.
MOST_REQUESTS = 16
# Functions whose result is memory that is not read yet.
_MAKE_ROOM = {"empty", "empty_like"}
# Those that read a number, on which what is computed afterwards may depend.
_READ = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__"}


class RecordedSteps:
    """Runs a model on steps of one token for each request."""

    def __init__(
        self,
        native: NativeLibrary,
        model: CausalLM,
        backend: TorchAttentionBackend,
        kv_pool: KVPool,
        limits: EngineLimits,
    ) -> None:
        self._native, self._model, self._backend = native, model, backend
        self._kv_pool, self._limits = kv_pool, limits
        # By the number of requests, and whether any of them has an adapter.
        self._recorded: dict[tuple[int, bool], _Recorded] = {}
        self._can_record = True

    @property
    def sizes(self) -> set[int]:
        """The numbers of requests for which steps are recorded."""
        return {count for count, _ in self._recorded}

    def logits(self, inputs: StepInputs, token_ids: torch.Tensor) -> torch.Tensor | None:
        """The logits of a step's requests in the plan's order, [S, vocab], which the next call overwrites;
        None where the step is not one of those, or the model computes something by other than native kernels.

        Args:
            token_ids: every row's, flattened.
        """
        count = len(inputs.positions)
        is_one_each = count == len(inputs.logits_indices) == len(inputs.layouts[0].counts)
        if not self._can_record or not is_one_each or count > MOST_REQUESTS:
            return None
        slots = inputs.adapter_slots
        if slots is not None and not self._model.adapter_tables.isdisjoint(slots.tolist()):
            return None
        key = count, slots is not None
        recorded = self._recorded.get(key)
        if recorded is not None:
            recorded.fill(inputs, token_ids)
            self._native.run(recorded.program)
            return recorded.logits
        recorded = _Recorded(inputs, self._limits)
        recorded.fill(inputs, token_ids)
        with _ForeignFunctions() as foreign, self._native.recording() as program:
            recorded.record(program, self._native, self._model, self._backend, self._kv_pool)
        if foreign.seen:
            self._can_record = False
        else:
            self._recorded[key] = recorded
        return recorded.logits


class _Recorded:
    """The inputs, operations and logits of steps with so many requests."""

    program: Program
    logits: torch.Tensor

    def __init__(self, inputs: StepInputs, limits: EngineLimits) -> None:
        count = len(inputs.positions)
        self._token_ids = torch.zeros(count, dtype=torch.int64)
        self._positions, self._index = torch.zeros_like(self._token_ids), torch.zeros_like(self._token_ids)
        self._adapters = None
        if inputs.adapter_slots is not None:
            self._adapters = CpuAdapterBatch((), torch.full((count,), -1, dtype=torch.int32))
        self._layouts = [
            BatchLayout(
                counts=np.ones(count, np.int64),
                seq_lens=np.zeros(count, np.int64),
                block_table=np.zeros((count, limits.max_blocks), np.int64),
                slot_mapping=np.zeros(count, np.int64),
                block_size=layout.block_size,
            )
            for layout in inputs.layouts
        ]

    def fill(self, inputs: StepInputs, token_ids: torch.Tensor) -> None:
        """Puts a step's inputs where the operations read them."""
        self._token_ids.numpy()[:] = token_ids.numpy()[inputs.token_index]
        self._positions.numpy()[:] = inputs.positions
        self._index.numpy()[:] = inputs.logits_indices
        if self._adapters is not None:
            self._adapters.slots.numpy()[:] = inputs.adapter_slots
        for kept, layout in zip(self._layouts, inputs.layouts, strict=True):
            kept.seq_lens[:] = layout.seq_lens
            kept.slot_mapping[:] = layout.slot_mapping
            kept.block_table[:, : layout.block_table.shape[1]] = layout.block_table

    def record(
        self,
        program: Program,
        native: NativeLibrary,
        model: CausalLM,
        backend: TorchAttentionBackend,
        kv_pool: KVPool,
    ) -> None:
        """Computes the logits of the inputs, and keeps how."""
        context = make_context(model, backend, self._positions, self._layouts, self._adapters)
        hidden = model(self._token_ids, context, kv_pool.layers)
        self.logits = model.compute_logits(native.gather(hidden, self._index))
        self.program = program


class _ForeignFunctions(TorchFunctionMode):
    """Sees whether torch computes something itself, which a program would not compute again.

    It sees functions that Python calls. A TorchDispatchMode would see the operators below them, but the first
    one imports torch's compiler, which takes seconds, in the first request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if _computes(name, args, result):
            self.seen.add(name)
        return result


def _computes(name: str, args: Sequence[Any], result: Any) -> bool:
    """Whether a function did more than to make room, or another view of memory that an argument has."""
    is_private = name.startswith("__")
    changes = name in ("__setitem__", "__set__") or (name.startswith("__i") and name != "__init__")
    if name in _READ or changes or (name.endswith("_") and not is_private):
        return True
    made = [each for each in (result if isinstance(result, list | tuple) else (result,)) if _is_tensor(each)]
    if name in _MAKE_ROOM or not made:
        return False
    given = {_memory(each) for each in args if _is_tensor(each)}
    return any(_memory(each) not in given for each in made)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie. Those in a layout of oneDNN's have no address: each is only itself."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
