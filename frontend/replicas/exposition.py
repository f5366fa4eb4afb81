"""The metrics of several schedulers as one exposition: each sample with the label `replica`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?( .*)")


def merged_expositions(expositions: Iterable[tuple[str, bytes]]) -> bytes:
    """Puts the samples of a metric together, as Prometheus' text format asks for.

    Args:
        expositions: (name of the replica, its exposition in text format 0.0.4), each with the same metrics or
            some of them.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for replica, exposition in expositions:
        label = 'replica="{}"'.format(replica.replace("\\", "\\\\").replace('"', '\\"'))
        comments, samples = families.setdefault("", ([], []))
        for line in exposition.decode().splitlines():
            if line.startswith("# "):
                kind, _, rest = line.removeprefix("# ").partition(" ")
                name = rest.partition(" ")[0]
                comments, samples = families.setdefault(name, ([], []))
                if not any(known.startswith(f"# {kind} ") for known in comments):
                    comments.append(line)
            elif (match := _SAMPLE.fullmatch(line)) is not None:
                labels = f"{label},{match[2]}" if match[2] else label
                samples.append(f"{match[1]}{{{labels}}}{match[3]}")
    lines = (line for comments, samples in families.values() for line in (*comments, *samples))
    return "".join(f"{line}\n" for line in lines).encode()
