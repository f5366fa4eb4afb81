"""What a chat template costs a frontend: rendered in another process, and, for comparison, in this one.

Times are medians of a render, in microseconds. `cpu` is the processor time of this process alone: that of the
process that renders is spent beside it, and holds up nothing here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from frontend.text.template_environment import compile_template, render_template
from frontend.text.template_renderer import RENDERER

TEMPLATES = Path(__file__).resolve().parent.parent / "tests/unit/text/templates"
FAMILIES = ("qwen3", "llama31")
CONVERSATIONS = {"1 message of 500 characters": (1, 500), "20 of 500": (20, 500), "20 of 20000": (20, 20_000)}
REPEATS, BATCH = 31, 20


def variables(num_messages: int, length: int) -> dict[str, Any]:
    """A conversation whose turns alternate."""
    roles = ("user", "assistant")
    messages = [
        {"role": roles[index % 2], "content": ("grüezi und " * length)[:length]}
        for index in range(num_messages)
    ]
    return {"messages": messages, "tools": None, "bos_token": "<s>", "add_generation_prompt": True}


def measure(render: Callable[[], str]) -> dict[str, float]:
    """Wall and processor time of one call, each the median of batches."""
    walls, cpus = [], []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(BATCH):
            render()
        walls.append((time.perf_counter() - wall) / BATCH * 1e6)
        cpus.append((time.process_time() - cpu) / BATCH * 1e6)
    return {"wall": round(statistics.median(walls), 1), "cpu": round(statistics.median(cpus), 1)}


def main() -> None:
    """Measures every family with every conversation; first checks that both ways write the same."""
    options = record.parser(__doc__).parse_args()
    results: dict[str, Any] = {}
    for family in FAMILIES:
        source = (TEMPLATES / f"{family}.jinja").read_text()
        compiled = compile_template(source)
        for name, size in CONVERSATIONS.items():
            given = variables(*size)
            ways = {
                "here": lambda compiled=compiled, given=given: render_template(compiled, given),
                "beside": lambda source=source, given=given: RENDERER.render(source, given),
            }
            texts = {way: render() for way, render in ways.items()}
            assert texts["here"] == texts["beside"]
            results[f"{family}, {name}"] = {way: measure(render) for way, render in ways.items()}
    record.write(options.json, results)


if __name__ == "__main__":
    main()
