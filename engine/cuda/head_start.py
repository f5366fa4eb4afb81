"""What a worker for a GPU does while its main thread imports torch."""

from __future__ import annotations

import threading

from engine.cuda.gpu import GpuTarget, create_context, find_gpu


class HeadStart:
    """Starts CUDA and Triton in threads of its own; imports no torch.

    Args:
        device: as in WorkerConfig; on "cpu" there is nothing to start.
    """

    def __init__(self, device: str) -> None:
        self.target: GpuTarget | None = None
        self._index = int(device.partition(":")[2] or 0)
        self._target_known = threading.Event()
        works = [] if device == "cpu" else [self._cuda, self._triton]
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def wait(self) -> GpuTarget | None:
        """The GPU, if there is one. Afterwards no thread runs, so that the process may fork."""
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
        """Triton names its binaries after a hash of all of its own, 400 MB, kept for the process."""
        self._target_known.wait()
        if self.target is None:
            return
        from triton.runtime.cache import triton_key

        triton_key()
