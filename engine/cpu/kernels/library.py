"""The compiled kernels as Python calls them: torch tensors in, torch tensors out."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import torch

from engine.attention.interface import (
    AttentionSpec,
    BatchLayout,
    HeadLayout,
    LayerKVCache,
    QKNorm,
    RotaryTable,
)
from engine.cpu.kernels.blocks import BLOCK, INTEGERS, BlockKind
from engine.layers.adapters import LayerSlots

_POINTER, _INT, _LONG, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
_FLOAT = ctypes.c_float
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _all(names: str, kind: type) -> dict[str, type]:
    return dict.fromkeys(names.split(), kind)


# The structures of src/layers.h and src/program.cpp.
_Norm = _structure(
    "_Norm", **_all("x residual weight out", _POINTER), **_all("tokens size x_stride", _LONG), eps=_FLOAT
)
_Gating = _structure(
    "_Gating", **_all("gate_up out", _POINTER), **_all("tokens size", _LONG), activation=ctypes.c_int32
)
_Scaling = _structure(
    "_Scaling", **_all("x out", _POINTER), **_all("tokens size", _LONG), **_all("factor cap", _FLOAT)
)
_Rotating = _structure(
    "_Rotating",
    **_all("qkv positions angles query_scale q_norm k_norm slots key value query", _POINTER),
    **_all("tokens heads kv_heads dim rotary_dim interleaved", _LONG),
    **_all("block_size block_stride slot_stride head_stride", _LONG),
    eps=_FLOAT,
)
_Attending = _structure(
    "_Attending",
    **_all("query key value out counts seq_lens block_table slopes sinks", _POINTER),
    **_all("requests heads kv_heads dim table_stride", _LONG),
    **_all("block_size block_stride slot_stride head_stride window", _LONG),
    **_all("scale soft_cap", _FLOAT),
    next=_LONG,
)


_Adapting = _structure(
    "_Adapting",
    **_all("x out shrunk slots ranks has_vectors a b gain offset sizes", _POINTER),
    **_all("x_stride tokens rows columns parts rank", _LONG),
)
_Multiplying = _structure(
    "_Multiplying",
    kind=_LONG,
    panels=_POINTER,
    **_all("rows columns group", _LONG),
    x=_POINTER,
    **_all("x_stride tokens", _LONG),
    **_all("bias out", _POINTER),
)
_Embedding = _structure(
    "_Embedding",
    kind=_LONG,
    panels=_POINTER,
    **_all("columns group", _LONG),
    ids=_POINTER,
    tokens=_LONG,
    out=_POINTER,
)
_Gathering = _structure("_Gathering", **_all("x index out", _POINTER), **_all("count size", _LONG))
_Step = _structure("_Step", operation=_LONG, job=_POINTER)

# Operation of src/program.cpp.
_MULTIPLY, _EMBED, _NORM, _GATE, _ROTATE, _ATTEND, _GATHER, _SCALE, _ADAPT = range(9)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# Arguments and result of each function of src/library.cpp.
_FUNCTIONS = {
    "pagewire_open": ((_INT, _TEXT), _POINTER),
    "pagewire_close": ((_POINTER,), None),
    "pagewire_instructions": ((_POINTER,), _TEXT),
    "pagewire_packed_bytes": ((_INT, _LONG, _LONG, _LONG), _LONG),
    "pagewire_pack": ((_POINTER, _INT, _POINTER, _LONG, _LONG, _POINTER), None),
    "pagewire_pack_groups": (
        (_POINTER, _INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER),
        None,
    ),
    "pagewire_do": ((_POINTER, _LONG, _POINTER), None),
    "pagewire_run": ((_POINTER, _POINTER, _LONG), None),
}


class UnknownInstructionsError(Exception):
    """This processor lacks the instructions that were asked for, or the library does."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [rows, columns] in panels; src/blocks.h says how they lie.

    Attributes:
        panels: bytes, on the CPU.
        group: blocks of 32 columns that share a scale, of integers in groups.
    """

    kind: BlockKind
    rows: int
    columns: int
    panels: torch.Tensor
    group: int = 0


class Program:
    """Operations that were recorded, with everything that they read and write; they can be run again at
    once."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, ctypes.Structure]] = []
        self._kept: list[object] = []
        self._array: ctypes.Array[ctypes.Structure] | None = None

    def add(self, operation: int, job: ctypes.Structure, kept: tuple[object, ...]) -> None:
        """Appends an operation, and keeps alive what its job points to."""
        self._steps.append((operation, job))
        self._kept.extend(kept)

    def array(self) -> ctypes.Array[ctypes.Structure]:
        """The operations as the library takes them."""
        if self._array is None:
            steps = ((operation, ctypes.addressof(job)) for operation, job in self._steps)
            self._array = (_Step * len(self._steps))(*starmap(_Step, steps))
        return self._array


class NativeLibrary:
    """The kernels, with a pool of threads that compute together. One thread calls it at a time.

    Attributes:
        instructions: which instruction set computes: "avx512", "avxvnni", "avx2" or "plain".
        num_threads: that compute, the caller's among them.
    """

    def __init__(self, path: Path, num_threads: int, instructions: str = "") -> None:
        """
        Args:
            path: what build.py made.
            num_threads: the caller's among them.
            instructions: by default the best that the processor has.

        Raises:
            UnknownInstructionsError: the processor or the library lacks `instructions`.
            OSError: the library cannot be loaded.
        """
        self.num_threads = num_threads
        self._functions = ctypes.CDLL(str(path))
        for name, (arguments, result) in _FUNCTIONS.items():
            function = getattr(self._functions, name)
            function.argtypes, function.restype = arguments, result
        self._handle = self._functions.pagewire_open(num_threads, instructions.encode())
        if not self._handle:
            raise UnknownInstructionsError(f"this processor or library has no kernels for {instructions}")
        self.instructions: str = self._functions.pagewire_instructions(self._handle).decode()
        self._recording: Program | None = None
        self._finalizer = weakref.finalize(self, self._functions.pagewire_close, self._handle)

    def close(self) -> None:
        """Ends the threads. The library cannot be used after it."""
        self._finalizer()

    @contextmanager
    def recording(self) -> Iterator[Program]:
        """Records what is computed inside, beside computing it."""
        assert self._recording is None
        self._recording = Program()
        try:
            yield self._recording
        finally:
            self._recording = None

    def run(self, program: Program) -> None:
        """Computes again what was recorded: from what its inputs hold now, into the same outputs."""
        steps = program.array()
        self._functions.pagewire_run(self._handle, ctypes.addressof(steps), len(steps))

    def _do(self, operation: int, job: ctypes.Structure, *kept: object) -> None:
        """Runs an operation. A recorded one needs what its job points to for longer: `kept`."""
        if self._recording is not None:
            self._recording.add(operation, job, kept)
        self._functions.pagewire_do(self._handle, operation, ctypes.addressof(job))

    def pack(self, kind: BlockKind, rows: torch.Tensor, columns: int) -> PackedMatrix:
        """Rows as a GGUF file has them, bytes [rows, kind.row_bytes(columns)], as panels.

        Raises:
            ValueError: the shape is not that of so many columns.
        """
        if columns % kind.columns or rows.dtype != torch.uint8 or rows.dim() != 2:
            raise ValueError(f"{kind.name} keeps {kind.columns} columns together; these are {columns}")
        if rows.shape[1] != kind.row_bytes(columns):
            raise ValueError(
                f"a row of {columns} columns has {kind.row_bytes(columns)} bytes in {kind.name}, "
                f"not {rows.shape[1]}"
            )
        rows = rows.contiguous()
        panels = self._panels(kind, len(rows), columns, 0)
        self._functions.pagewire_pack(
            self._handle, kind.code, rows.data_ptr(), len(rows), columns, panels.data_ptr()
        )
        return PackedMatrix(kind, len(rows), columns, panels)

    def pack_groups(
        self, bits: int, codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, group_size: int
    ) -> PackedMatrix:
        """Integers as panels: codes * scales + minima.

        Args:
            bits: 4, with codes uint8 [rows, columns] below 16; or 8, with int8.
            scales, minima: fp32 [rows, groups]. The last group may be shorter.
            group_size: columns of a group, a multiple of 32; there are a multiple of 32 columns too.
        """
        rows, columns = codes.shape
        assert columns % BLOCK == 0
        assert group_size % BLOCK == 0
        assert codes.dtype == (torch.uint8 if bits == 4 else torch.int8)
        for each in (scales, minima):
            assert each.dtype == torch.float32
            assert each.shape == (rows, -(-columns // group_size))
        codes, scales, minima = codes.contiguous(), scales.contiguous(), minima.contiguous()
        kind, group = INTEGERS[bits], group_size // BLOCK
        panels = self._panels(kind, rows, columns, group)
        self._functions.pagewire_pack_groups(
            self._handle, kind.code, codes.data_ptr(), scales.data_ptr(), minima.data_ptr(),
            rows, columns, group, panels.data_ptr(),
        )  # fmt: skip
        return PackedMatrix(kind, rows, columns, panels, group)

    def _panels(self, kind: BlockKind, rows: int, columns: int, group: int) -> torch.Tensor:
        num_bytes = self._functions.pagewire_packed_bytes(kind.code, rows, columns, group)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def multiply(
        self, x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, columns] fp32 -> x @ matrix.T + bias, [T, rows] fp32.

        For kinds of blocks, each 32 numbers of x are rounded to 8 bits with a scale of their own. All else
        is exact or fp32.
        """
        assert x.dtype == torch.float32
        assert x.shape[1] == matrix.columns
        assert x.stride(1) == 1
        assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
        out = torch.empty(len(x), matrix.rows, dtype=torch.float32)
        job = _Multiplying(
            matrix.kind.code, matrix.panels.data_ptr(), matrix.rows, matrix.columns, matrix.group,
            x.data_ptr(), x.stride(0), len(x), _address(bias), out.data_ptr(),
        )  # fmt: skip
        self._do(_MULTIPLY, job, x, matrix, bias, out)
        return out

    def rms_norm(
        self, residual: torch.Tensor, weight: torch.Tensor, eps: float, x: torch.Tensor | None = None
    ) -> torch.Tensor:
        """residual / rms(residual) * weight over the last dimension, in the shape of `residual`, which is
        contiguous.

        Args:
            x: [T, size], added to the residual [T, size] first, in place.
        """
        out = torch.empty_like(residual)
        size = residual.shape[-1]
        stride = 0 if x is None else x.stride(0)
        job = _Norm(
            _address(x), residual.data_ptr(), weight.data_ptr(), out.data_ptr(),
            residual.numel() // size, size, stride, eps,
        )  # fmt: skip
        self._do(_NORM, job, x, residual, weight, out)
        return out

    def activate_and_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """[T, 2 * n], gate then up, contiguous -> activation(gate) * up, [T, n]."""
        num_tokens, size = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(num_tokens, size, dtype=torch.float32)
        job = _Gating(gate_up.data_ptr(), out.data_ptr(), num_tokens, size, ACTIVATIONS[activation])
        self._do(_GATE, job, gate_up, out)
        return out

    def scale(self, x: torch.Tensor, factor: float, soft_cap: float) -> torch.Tensor:
        """See LayerOps.scale. x [T, size], contiguous."""
        assert x.is_contiguous()
        out = torch.empty_like(x)
        job = _Scaling(x.data_ptr(), out.data_ptr(), len(x), x.shape[1], factor, soft_cap)
        self._do(_SCALE, job, x, out)
        return out

    def adapt(self, x: torch.Tensor, out: torch.Tensor, tokens: torch.Tensor, slots: LayerSlots) -> None:
        """Adds to a layer's products what adapters add to them; see LayerSlots.

        Args:
            x: [T, in] fp32.
            out: [T, out] fp32, contiguous; changed.
            tokens: the slot of each token's adapter, -1 for none, [T] int32.
            slots: the layer's, in fp32.
        """
        assert x.dtype == out.dtype == slots.a.dtype == torch.float32
        assert out.is_contiguous()
        assert x.stride(1) == 1
        assert tokens.dtype == torch.int32
        _, parts, rank, columns = slots.a.shape
        shrunk = torch.empty(len(x), parts, rank, dtype=torch.float32)
        sizes = (ctypes.c_int64 * parts)(*slots.sizes)
        table = slots.table
        job = _Adapting(
            x.data_ptr(), out.data_ptr(), shrunk.data_ptr(), tokens.data_ptr(), table.ranks.data_ptr(),
            table.has_vectors.data_ptr(), slots.a.data_ptr(), slots.b.data_ptr(), slots.gain.data_ptr(),
            slots.offset.data_ptr(), ctypes.addressof(sizes), x.stride(0), len(x), out.shape[1], columns,
            parts, rank,
        )  # fmt: skip
        self._do(_ADAPT, job, x, out, shrunk, tokens, slots, sizes)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rotation: tuple[RotaryTable, torch.Tensor] | None,
        kv_cache: LayerKVCache,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """See AttentionBackend.rotate_and_store. `rotation`: a table, and the tokens' positions [T] int64."""
        query = torch.empty(len(qkv), heads.num_heads, heads.head_dim, dtype=torch.float32)
        table, positions = rotation or (None, None)
        key = kv_cache.key
        job = _Rotating(
            qkv.data_ptr(), _address(positions), None if table is None else table.angles.data_ptr(),
            None if table is None else _address(table.query_scale),
            None if norm is None else norm.query.data_ptr(), None if norm is None else norm.key.data_ptr(),
            slot_mapping.data_ptr(), key.data_ptr(), kv_cache.value.data_ptr(), query.data_ptr(),
            len(qkv), heads.num_heads, heads.num_kv_heads, heads.head_dim,
            0 if table is None else table.angles.shape[1], table is not None and table.interleaved,
            key.shape[1], key.stride(0), key.stride(1), key.stride(2), 0.0 if norm is None else norm.eps,
        )  # fmt: skip
        self._do(_ROTATE, job, qkv, norm, rotation, kv_cache, slot_mapping, query)
        return query

    def attend(
        self, query: torch.Tensor, kv_cache: LayerKVCache, layout: BatchLayout, spec: AttentionSpec
    ) -> torch.Tensor:
        """See AttentionBackend.forward: query [T, H, D] -> [T, H, D]."""
        out = torch.empty_like(query)
        key, table = kv_cache.key, layout.block_table
        assert table.strides[1] == table.itemsize
        assert query.is_contiguous()
        job = _Attending(
            query.data_ptr(), key.data_ptr(), kv_cache.value.data_ptr(), out.data_ptr(),
            layout.counts.ctypes.data, layout.seq_lens.ctypes.data, table.ctypes.data,
            _address(spec.alibi_slopes), _address(spec.sinks),
            len(layout.counts), query.shape[1], key.shape[2], query.shape[2],
            table.strides[0] // table.itemsize,
            key.shape[1], key.stride(0), key.stride(1), key.stride(2), spec.sliding_window,
            spec.scale, spec.soft_cap, 0,
        )  # fmt: skip
        self._do(_ATTEND, job, query, kv_cache, layout, spec, out)
        return out

    def embed(self, token_ids: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        """Rows of the matrix, [T, columns] fp32. Ids [T] int64 must be below `matrix.rows`."""
        assert token_ids.dtype == torch.int64
        assert token_ids.is_contiguous()
        out = torch.empty(len(token_ids), matrix.columns, dtype=torch.float32)
        job = _Embedding(
            matrix.kind.code, matrix.panels.data_ptr(), matrix.columns, matrix.group,
            token_ids.data_ptr(), len(token_ids), out.data_ptr(),
        )  # fmt: skip
        self._do(_EMBED, job, token_ids, matrix, out)
        return out

    def gather(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of x [T, size] fp32, contiguous: [len(index), size]. The index [any] int64 is below T."""
        assert x.is_contiguous()
        assert index.dtype == torch.int64
        out = torch.empty(len(index), x.shape[1], dtype=torch.float32)
        job = _Gathering(x.data_ptr(), index.data_ptr(), out.data_ptr(), len(index), x.shape[1])
        self._do(_GATHER, job, x, index, out)
        return out
