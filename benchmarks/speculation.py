"""Speculative decoding beside plain decoding, by turns in one run.

`cpu`: SmolLM2-135M repeats a text with one change, by n-grams. `gpu`: llama8b with dummy weights on one GPU,
whose drafts are accepted with a set probability; one request (W3), and 256 at once (W1), where none should be
proposed.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from benchmarks import record
from pagewire import LLM, SamplingParams
from pagewire.bench.shapes import shape_directory

ROUNDS = 5
TEXT = (
    "The lighthouse stood at the end of the pier, and every evening the keeper climbed its ninety steps to "
    "light the lamp. He carried a can of oil, a box of matches and a small notebook for the names "
    "of the ships that passed. On clear nights he could read the letters on their bows through his brass "
    "telescope. In winter, when the waves broke over the railing, he counted the steps aloud, so as to "
    "not lose his way in the dark. Nobody in the village knew how long he had been there."
)
TASK = "The same text, word for word, with a harbour in place of the pier:"
PROMPT = f"A text:\n\n{TEXT}\n\n{TASK}\n\nThe lighthouse"


def seconds_of(llm: LLM, prompts: list[Any], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """What a batch takes, and its tokens."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    return time.perf_counter() - began, [list(output.outputs[0].token_ids) for output in outputs]


def compare(kinds: dict[str, LLM], prompts: list[Any], params: SamplingParams) -> dict[str, Any]:
    """Medians of tokens a second, and whether the tokens were the same."""
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    tokens: dict[str, list[list[int]]] = {}
    for round_ in range(ROUNDS + 1):
        for kind, llm in kinds.items():
            seconds, tokens[kind] = seconds_of(llm, prompts, params)
            if round_:  # the first one warms up
                rates[kind].append(sum(map(len, tokens[kind])) / seconds)
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    return {
        **{f"{kind} tok/s": round(rate, 1) for kind, rate in medians.items()},
        "ratio": round(medians["drafts"] / medians["plain"], 2),
        "same_tokens": tokens["plain"] == tokens["drafts"],
    }


def on_cpu(num_drafts: int) -> dict[str, Any]:
    """The edit, with drafts and without."""
    config = json.dumps({"method": "ngram", "num_speculative_tokens": num_drafts})
    options: dict[str, Any] = {"device": "cpu", "max_model_len": 1024, "max_num_seqs": 4}
    with (
        LLM("smollm2-135m", **options) as plain,
        LLM("smollm2-135m", **options, speculative_config=config) as drafts,
    ):
        params = SamplingParams(temperature=0.0, max_tokens=110)
        return {"edit": compare({"plain": plain, "drafts": drafts}, [PROMPT], params)}


def on_gpu(num_drafts: int, acceptance: float) -> dict[str, Any]:
    """W3 and W1, first one engine and then the other: both do not fit on a GPU."""
    config = json.dumps({"method": "test", "num_speculative_tokens": num_drafts, "acceptance": acceptance})
    workloads = {"W3": (1, 256), "W1": (256, 512)}
    medians: dict[str, dict[str, float]] = {name: {} for name in workloads}
    for kind, more in (("plain", {}), ("drafts", {"speculative_config": config})):
        with LLM(
            str(shape_directory("llama8b")), load_format="dummy", max_model_len=8192, max_num_seqs=256, **more
        ) as llm:
            for name, (count, length) in workloads.items():
                params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
                rates = []
                for round_ in range(ROUNDS):
                    prompts = [
                        [(7 * i + 13 * j + 101 * round_) % 32000 for j in range(128)] for i in range(count)
                    ]
                    seconds, tokens = seconds_of(llm, prompts, params)
                    rates.append(sum(map(len, tokens)) / seconds)
                medians[name][kind] = statistics.median(rates[1:])
    return {
        name: {
            **{f"{kind} tok/s": round(rate) for kind, rate in found.items()},
            "ratio": round(found["drafts"] / found["plain"], 3),
        }
        for name, found in medians.items()
    }


def main() -> None:
    """Measures and reports."""
    parser = record.parser(__doc__)
    parser.add_argument("device", choices=("cpu", "gpu"))
    parser.add_argument("--drafts", type=int, default=4, help="draft tokens of a request in a step")
    parser.add_argument("--acceptance", type=float, default=0.7, help="of a draft, on the GPU")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        results = on_cpu(arguments.drafts)
    else:
        results = on_gpu(arguments.drafts, arguments.acceptance)
    record.write(arguments.json, results)


if __name__ == "__main__":
    main()
