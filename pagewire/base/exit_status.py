"""What the exit statuses of this service's processes mean, beyond 0 for "stopped as asked"."""

from __future__ import annotations

CONFIG_ERROR = 2
"""A setting or a model file is wrong; starting again cannot help."""

DEVICE_LOST = 69
"""Nothing can be computed on the device by this process any more; a new process probably can. (EX_UNAVAILABLE
in sysexits.h.)"""

UNFINISHED = 75
"""A file of requests is not all answered; the same command goes on with it. (EX_TEMPFAIL in sysexits.h.)"""

MEANINGS = {CONFIG_ERROR: "its configuration was refused", DEVICE_LOST: "its device failed"}
