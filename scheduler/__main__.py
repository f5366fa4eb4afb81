"""`python -m scheduler`: `pagewire scheduler` as `pagewire serve` starts it, without the other commands'
imports, because streams wait while a scheduler restarts.
"""

from __future__ import annotations

import sys

from pagewire.base.command_line import read
from pagewire.base.errors import ConfigError
from pagewire.base.exit_status import CONFIG_ERROR
from pagewire.base.lifeline import end_with_parent
from pagewire.telemetry.logs import log_to_stderr
from scheduler.config import SchedulerConfig
from scheduler.serve.server import run


def main() -> None:
    """Runs a scheduler and ends the process, with the statuses of the `pagewire` command."""
    end_with_parent()
    try:
        config = read(SchedulerConfig, sys.argv[1:])
        log_to_stderr(config.log_format, "scheduler")
        sys.exit(run(config))
    except ConfigError as error:
        print(f"pagewire: {error.message}", file=sys.stderr)
        sys.exit(CONFIG_ERROR)


if __name__ == "__main__":
    main()
