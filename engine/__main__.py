"""`python -m engine`: `engine-worker` as `pagewire serve` and `LLM` start it, without what a command line for
people imports.
"""

from __future__ import annotations

import sys

from engine.config import WorkerConfig
from engine.worker.process import run_process, run_worker
from pagewire.base.command_line import read


def main() -> None:
    """Runs a worker and ends the process, with the statuses of `run_process`."""
    run_process(lambda: sys.exit(run_worker(read(WorkerConfig, sys.argv[1:]))))


if __name__ == "__main__":
    main()
