"""`python -m frontend`: `pagewire frontend` as `pagewire serve` starts it, without the other commands'
imports, which take as long as a third of its own.
"""

from __future__ import annotations

import sys

from frontend.config import FrontendConfig
from frontend.text.template_renderer import RENDERER
from pagewire.base.command_line import read
from pagewire.base.lifeline import end_with_parent
from pagewire.base.run_command import run_command
from pagewire.telemetry.logs import log_to_stderr


def main() -> None:
    """Runs a frontend and ends the process, with the statuses of the `pagewire` command."""
    end_with_parent()
    run_command(_frontend)


def _frontend() -> None:
    config = read(FrontendConfig, sys.argv[1:])
    RENDERER.start()  # it starts while everything else is imported, which takes longer

    from frontend.server import run

    log_to_stderr(config.log_format, "frontend")
    sys.exit(run(config))


if __name__ == "__main__":
    main()
