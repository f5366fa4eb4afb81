"""How errors become the exit statuses of the `pagewire` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pagewire.base.errors import ConfigError, PagewireError


def run_command(command: Callable[[], object]) -> None:
    """Runs a command, and ends the process if it fails.

    Status 1: it failed. 2: the command line, a setting or a model is wrong. 130: interrupted.
    """
    try:
        command()
    except PagewireError as error:
        print(f"pagewire: {error.message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as `| head` does
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise  # it is about no file that the user named
        print(f"pagewire: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except UnicodeError as error:
        print(f"pagewire: an argument or the input is not UTF-8: {error}", file=sys.stderr)
        sys.exit(2)
