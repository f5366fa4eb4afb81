"""Tensors in files, read by several threads into pinned buffers and sent on from there to a GPU.

Host memory is bounded by the buffers, whatever the size of the files; device memory, beside what the caller
keeps, by AHEAD_BYTES or the largest tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.loader.blocks import blocks_by_tensor, require_blocks

NUM_READERS = 8
BUFFERS_PER_READER = 2
CHUNK_BYTES = 8 * 1024**2
# On the device, of tensors that were begun and not taken yet.
AHEAD_BYTES = 512 * 1024**2

# The format itself allows 100 MB, which takes minutes and gigabytes to parse.
MAX_HEADER_BYTES = 32 * 1024**2
MAX_TENSORS = 2**17
MAX_DIMENSIONS = 8

# The format's names: https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        begin, num_bytes: where its bytes lie in the file.
        strides: from element to element along each dimension, in elements; None where they lie in order.
        blocks: of a matrix whose rows are in blocks, as bytes, the blocks' format, such as "Q4_K"; see
            blocks.py.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    num_bytes: int
    strides: tuple[int, ...] | None = None
    blocks: str = ""

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor, of the bytes that the file has for it."""
        elements = data.view(self.dtype)
        if self.strides is None:
            return elements.view(self.shape)
        return elements.as_strided(self.shape, self.strides)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The file's tensors in the order of their bytes.

    Raises:
        SafetensorError: the file is damaged, truncated, larger in its header than any real one, or holds
            numbers of an unknown format.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise SafetensorError(f"its header has {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
        text = file.read(header_bytes)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise SafetensorError(f"its header is not JSON: {_reason(error)}") from error
    if len(header) > MAX_TENSORS:
        raise SafetensorError(f"its header has {len(header)} tensors; at most {MAX_TENSORS} are read")
    with safe_open(path, framework="pt"):
        pass  # checks the header: that the tensors fit their shapes and the file, and leave no gap
    blocks = blocks_by_tensor(header.pop("__metadata__", {}))
    first = 8 + header_bytes
    tensors = [_stored(path, name, entry, first, blocks.get(name, "")) for name, entry in header.items()]
    return sorted(tensors, key=lambda tensor: tensor.begin)


def _reason(error: Exception) -> str:
    """A UnicodeDecodeError's own text may hold the whole header."""
    return error.reason if isinstance(error, UnicodeDecodeError) else str(error)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two tensors of one name is meant, readers of the format do not agree on."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise SafetensorError(f"its header has {twice!r} twice")
    return entries


def _stored(path: Path, name: str, entry: dict[str, Any], first: int, blocks: str) -> StoredTensor:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise SafetensorError(f"tensor {name!r} is of {entry['dtype']}; known are {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if len(shape) > MAX_DIMENSIONS:
        raise SafetensorError(
            f"tensor {name!r} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read"
        )
    assert end - begin == math.prod(shape) * dtype.itemsize
    if blocks:
        require_blocks(name, dtype, shape, blocks)
    return StoredTensor(path, name, dtype, shape, first + begin, end - begin, blocks=blocks)


def stream_tensors(
    tensors: Sequence[StoredTensor], device: torch.device
) -> Generator[tuple[StoredTensor, torch.Tensor], None, None]:
    """The tensors on the device, in their order, ready for the current stream. Close it if it is not used up.

    Raises:
        SafetensorError: a file ends before it should.
        OSError: it cannot be read.
    """
    with ExitStack() as stack:
        upload = _Uploads(device, stack)
        begun: deque[tuple[StoredTensor, torch.Tensor, list[Future[None]]]] = deque()
        ahead = 0
        for stored in tensors:
            while begun and ahead + stored.num_bytes > AHEAD_BYTES:
                ahead -= begun[0][0].num_bytes
                yield upload.finish(*begun.popleft())
            begun.append((stored, *upload.begin(stored)))
            ahead += stored.num_bytes
        while begun:
            yield upload.finish(*begun.popleft())


class _Buffer:
    """Memory on the host that the device can copy from while the host goes on."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.bytes = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self.view = memoryview(self.bytes.numpy())  # type: ignore[arg-type]
        self.sent = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]


class _Uploads:
    """Threads that read, and a stream that copies. Ends with the stack."""

    def __init__(self, device: torch.device, stack: ExitStack) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(NUM_READERS * BUFFERS_PER_READER):
            self._buffers.put(_Buffer(device))
        self._files: dict[Path, int] = {}
        self._readers = ThreadPoolExecutor(
            NUM_READERS, "weights", initializer=_make_current, initargs=(device,)
        )
        # In this order's reverse: no thread reads on when its file is closed.
        stack.callback(self._close_files)
        stack.callback(self._readers.shutdown, wait=True, cancel_futures=True)

    def begin(self, stored: StoredTensor) -> tuple[torch.Tensor, list[Future[None]]]:
        """Starts to fill a tensor of bytes."""
        target = torch.empty(stored.num_bytes, dtype=torch.uint8, device=self._device)
        if self._stream is not None:
            # The memory may have been another tensor's, which the current stream has still to copy.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        descriptor = self._descriptor(stored.path)
        chunks = [
            self._readers.submit(self._fill, target[at : at + CHUNK_BYTES], descriptor, stored, at)
            for at in range(0, stored.num_bytes, CHUNK_BYTES)
        ]
        return target, chunks

    def finish(
        self, stored: StoredTensor, target: torch.Tensor, chunks: list[Future[None]]
    ) -> tuple[StoredTensor, torch.Tensor]:
        """Waits until everything is on its way, and has the current stream wait for the rest."""
        for chunk in chunks:
            chunk.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return stored, stored.view(target)

    def _fill(self, target: torch.Tensor, descriptor: int, stored: StoredTensor, at: int) -> None:
        buffer = self._buffers.get()
        try:
            if buffer.sent is not None:
                buffer.sent.synchronize()
            read_exactly(descriptor, buffer.view[: len(target)], stored, at)
            source = buffer.bytes[: len(target)]
            if self._stream is None or buffer.sent is None:
                target.copy_(source)
                return
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                buffer.sent.record(self._stream)
        finally:
            self._buffers.put(buffer)

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def _close_files(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


def _make_current(device: torch.device) -> None:
    """Each thread has a current device of its own: at first the first GPU, where a context takes memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def read_exactly(descriptor: int, view: memoryview, stored: StoredTensor, at: int) -> None:
    """Fills the view with a tensor's bytes from `at` on.

    Raises:
        SafetensorError: the file ends before.
        OSError: it cannot be read.
    """
    while len(view):
        count = os.preadv(descriptor, [view], stored.begin + at)
        if count == 0:
            raise SafetensorError(f"the file ends within tensor {stored.name!r}")
        view, at = view[count:], at + count
