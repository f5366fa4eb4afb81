"""The scheduler's metrics under the names that vLLM and Triton give them, whose dashboards people have.

They are made from the exposition text: each line of a metric that has such a name is repeated under it. Those
of vLLM have the labels model_name and engine, by which its dashboards choose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CHOICES = ("both", "pagewire", "vllm")
"""Values of --metrics-names."""

_OURS = "pagewire:"
_VLLM = "vllm:"

VLLM_NAMES = {
    "num_requests_running": ("num_requests_running",),
    "num_requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prefix_cache_queries": ("prefix_cache_queries",),
    "prefix_cache_hits": ("prefix_cache_hits",),
    "num_preemptions": ("num_preemptions",),
    "spec_decode_num_drafts": ("spec_decode_num_drafts",),
    "spec_decode_num_draft_tokens": ("spec_decode_num_draft_tokens",),
    "spec_decode_num_accepted_tokens": ("spec_decode_num_accepted_tokens",),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "request_success": ("request_success",),
    "lora_requests_info": ("lora_requests_info",),
    "iteration_tokens_total": ("iteration_tokens_total",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_queue_time_seconds": ("request_queue_time_seconds",),
    "request_prefill_time_seconds": ("request_prefill_time_seconds",),
    "request_decode_time_seconds": ("request_decode_time_seconds",),
    "request_inference_time_seconds": ("request_inference_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
}
"""By our name: vLLM's names, today's first and then those of its earlier releases. Without prefixes."""

_TRITON_NAMES = {
    "gpu_utilization": "nv_gpu_utilization",
    "gpu_memory_used_bytes": "nv_gpu_memory_used_bytes",
    "gpu_memory_total_bytes": "nv_gpu_memory_total_bytes",
}

_SUFFIX = r"(?:_total|_bucket|_sum|_count|_created)?"
# A comment or a sample of ours: what comes before the name, the name, its suffix, labels, the rest.
_LINE = re.compile(rf"(# (?:HELP|TYPE) )?{_OURS}(\w+?)({_SUFFIX})(?:\{{(.*)\}})?( .*)")
# What comes first among the labels where there are several schedulers; vLLM calls them engines.
_REPLICA = re.compile(r'replica="((?:[^"\\]|\\.)*)",?')


def named(exposition: str, names: str, model: str) -> str:
    """The scheduler's exposition under the chosen names.

    Args:
        exposition: in Prometheus text format.
        names: of CHOICES. "vllm" leaves out ours where there is a name of vLLM's.
        model: the served model's first name, for the label model_name.
    """
    if names == "pagewire":
        return exposition
    ours, theirs = [], []
    label = 'model_name="{}"'.format(model.replace("\\", "\\\\").replace('"', '\\"'))
    for line in exposition.splitlines():
        copies = list(_under_vllm_names(line, label))
        theirs += copies
        if not copies or names == "both":
            ours.append(line)
    return "".join(f"{line}\n" for line in (*ours, *_by_name(theirs)))


def triton_gpu_lines(exposition: str) -> str:
    """The GPUs' metrics under Triton's names; empty without GPUs."""
    lines = []
    for line in exposition.splitlines():
        match = _LINE.fullmatch(line)
        name = None if match is None else _TRITON_NAMES.get(match[2] + match[3])
        if match is not None and name is not None:
            lines.append(_written(match[1], name, match[4], match[5]))
    return "".join(f"{line}\n" for line in lines)


def _under_vllm_names(line: str, label: str) -> Iterator[str]:
    match = _LINE.fullmatch(line)
    if match is None:
        return
    before, name, suffix, labels, rest = match.groups()
    whole = name + suffix
    # Some names end like a suffix: iteration_tokens_total is a histogram.
    known = max((each for each in VLLM_NAMES if whole.startswith(each)), key=len, default=None)
    if known is None or not re.fullmatch(_SUFFIX, whole.removeprefix(known)):
        return
    replica = _REPLICA.match(labels or "")
    engine, others = ("0", labels or "") if replica is None else (replica[1], (labels or "")[replica.end() :])
    all_labels = None if before else f'{label},engine="{engine}"' + (f",{others}" if others else "")
    for theirs in VLLM_NAMES[known]:
        yield _written(before, _VLLM + theirs + whole.removeprefix(known), all_labels, rest)


def _written(before: str | None, name: str, labels: str | None, rest: str) -> str:
    return f"{before or ''}{name}{f'{{{labels}}}' if labels else ''}{rest}"


def _by_name(lines: list[str]) -> list[str]:
    """The lines so ordered that those of a metric follow each other, as the format asks for."""
    families: dict[str, list[str]] = {}
    for line in lines:
        words = line.removeprefix("# HELP ").removeprefix("# TYPE ")
        name = re.split(r"[{ ]", words, maxsplit=1)[0]
        base = next(
            (
                each
                for suffix in ("_bucket", "_sum", "_count", "_total", "_created")
                if (each := name.removesuffix(suffix)) in families
            ),
            name,
        )
        families.setdefault(base, []).append(line)
    return [line for family in families.values() for line in family]
