"""What a beam search costs beside as many samples of the same prompt and length.

A search of width w computes w tokens for each token of its answer, as w samples do. What more it takes is the
price of its steps: every one ends the beams' requests, ranks their candidates and begins others. Both by
turns over SmolLM2, over HTTP; how many steps and tokens the engine computed is read from the metrics.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks import record
from tools.service import Service

WIDTHS = (1, 2, 4, 8)
OUTPUT_TOKENS, ROUNDS = 48, 5
PROMPT = (
    "The history of the city begins with a small settlement of fishermen on the northern bank of the river, "
    "who traded salt and wool with"
)
KINDS: dict[str, dict[str, Any]] = {
    "samples": {"temperature": 1.0},
    "beams": {"temperature": 0.0, "use_beam_search": True},
}


def measure(service: Service, kind: str, width: int, number: int) -> tuple[float, float, float]:
    """Seconds that an answer takes, and the steps and tokens that the engine computes for it."""
    before = service.metrics()
    body = {
        "model": service.model,
        "prompt": f"({number}) {PROMPT}",
        "max_tokens": OUTPUT_TOKENS,
        "n": width,
        "ignore_eos": True,
        **KINDS[kind],
    }
    began = time.perf_counter()
    answer = httpx.post(f"{service.http_url}/v1/completions", json=body, timeout=300)
    seconds = time.perf_counter() - began
    answer.raise_for_status()
    assert len(answer.json()["choices"]) == width
    after = service.metrics()
    steps, tokens = (
        after[name] - before[name] for name in ("pagewire:steps_total", "pagewire:computed_tokens_total")
    )
    return seconds, steps, tokens


def main() -> None:
    """Measures and reports."""
    arguments = record.parser(__doc__).parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, Service(Path(name)) as service:
        for kind in KINDS:
            measure(service, kind, 2, 0)  # warms up
        for width in WIDTHS:
            found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
            for round_ in range(ROUNDS):
                for place, kind in enumerate(KINDS):  # no two prompts are the same
                    found[kind].append(measure(service, kind, width, 1000 * width + 10 * round_ + place))
            medians = {
                kind: [statistics.median(each) for each in zip(*runs, strict=True)]
                for kind, runs in found.items()
            }
            results[f"width {width}"] = {
                **{
                    kind: {"seconds": round(seconds, 3), "steps": steps, "computed_tokens": tokens}
                    for kind, (seconds, steps, tokens) in medians.items()
                },
                "beams_over_samples": round(medians["beams"][0] / medians["samples"][0], 2),
            }
    record.write(arguments.json, {f"answers of {OUTPUT_TOKENS} tokens, medians of {ROUNDS}": results})


if __name__ == "__main__":
    main()
