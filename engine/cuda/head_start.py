"""Initialises CUDA and Triton in threads while the worker's main thread imports torch."""

from __future__ import annotations

import threading

from engine.cuda.gpu import GpuTarget, create_context, find_gpu


class HeadStart:
    """Starts CUDA and Triton in separate threads, without importing torch.

    Args:
        device: as in WorkerConfig; for "cpu" nothing is started.
        rank: whose GPU it is, where the device has no number.
    """

    def __init__(self, device: str, rank: int = 0) -> None:
        self.target: GpuTarget | None = None
        self._index = int(device.partition(":")[2] or rank)
        self._target_known = threading.Event()
        works = [] if device == "cpu" else [self._cuda, self._triton]
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def wait(self) -> GpuTarget | None:
        """Waits for the threads, so that the process may fork. Returns the GPU, or None if there is none."""
        for thread in self._threads:
            thread.join()
        return self.target

    def _cuda(self) -> None:
        try:
            self.target = find_gpu(self._index)
        finally:
            self._target_known.set()
        if self.target is not None:
            create_context(self._index)

    def _triton(self) -> None:
        """Computes Triton's cache key, a hash over its own 400 MB, which it keeps for the process."""
        self._target_known.wait()
        if self.target is None:
            return
        from triton.runtime.cache import triton_key

        triton_key()
