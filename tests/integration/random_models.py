"""Models of a real shape with few layers and random weights, and what transformers makes of them.

Tolerances come from transformers itself: in float32 it is taken for exact, and its own bfloat16 run shows how
far rounding alone leads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pagewire.bench.shapes import shape_directory
from pagewire.offline.llm import RequestOutput

# An engine may err this many times as much as transformers' own bfloat16 run: it rounds elsewhere, not more.
RMS_FACTOR, WORST_FACTOR = 1.5, 3.0
NUM_TOP = 20
# The least share of tokens that are the exact model's first choice. Logits of random weights have their two
# largest within rounding in a few positions of a hundred; what computes something else has none in common.
LEAST_AGREEMENT = 0.85
# Spread of q.k/sqrt(d) before the softmax: the product of the spreads of queries and keys. Attention is then
# sharp enough for one lost key of 300 to move log probabilities five times as far as rounding does (0.30 rms
# against 0.06, seen on a small model); sharper attention only multiplies the rounding.
SCORE_SPREAD = 2.0
LOGIT_SPREAD = 2.0


def shape_values(name: str, *, num_layers: int) -> dict[str, Any]:
    """config.json of a bundled shape, with fewer layers."""
    directory = shape_directory(name)
    assert directory is not None
    values: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return values | {"num_hidden_layers": num_layers}


def write_random_model(values: dict[str, Any], directory: Path, device: str) -> Reference:
    """Writes a bfloat16 checkpoint with transformers' own save_pretrained; returns the reference for it."""
    config = AutoConfig.for_model(**values)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _randomise(model)
    model.save_pretrained(directory)
    return Reference(copy.deepcopy(model).float(), model)


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Weights that keep activations near 1, as trained ones do, and norms that are not all ones."""
    generator = torch.Generator(model.device).manual_seed(0)
    names = [name for name, _ in model.named_parameters()]
    has_head_norms = any("q_norm" in name for name in names)
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        if parameter.dim() == 1:
            mean = SCORE_SPREAD**0.5 if module in ("q_norm", "k_norm") else 1.0
            parameter.normal_(mean, 0.1, generator=generator)
            continue
        scale = 1.0
        if module in ("q_proj", "k_proj") and not has_head_norms:
            scale = SCORE_SPREAD**0.5
        elif module in ("embed_tokens", "lm_head"):
            scale = LOGIT_SPREAD
        parameter.normal_(0.0, scale * parameter.shape[1] ** -0.5, generator=generator)


class Reference:
    """transformers' answers in float32 and in bfloat16, by teacher forcing."""

    def __init__(self, exact: Any, rounded: Any) -> None:
        self._exact, self._rounded = exact.eval(), rounded.eval()
        self._exact.set_attn_implementation("eager")  # no reduced precision inside

    @classmethod
    def load(cls, directory: Path, device: str) -> Reference:
        """Of a checkpoint with weights in more than bfloat16: its rounded run rounds them as well."""
        exact, rounded = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device)
            for dtype in (torch.float32, torch.bfloat16)
        )
        return cls(exact, rounded)

    def exact(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """The logits that each of these generated tokens was to be chosen from, [tokens, vocab] float32."""
        return _logits(self._exact, prompt, tokens)

    def rounded(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """The same as computed in bfloat16."""
        return _logits(self._rounded, prompt, tokens)

    def tie(self, prompts: Iterable[list[int]]) -> float:
        """Two tokens whose exact logits differ by less may change places in bfloat16.

        With E the largest error that transformers' own bfloat16 run makes in the NUM_TOP likeliest tokens
        after these prompts, two logits may move towards each other by 2 E; an engine gets RMS_FACTOR times
        that.
        """
        worst = 0.0
        for prompt in prompts:
            tokens = prompt[-16:]
            exact = self.exact(prompt, tokens)
            error = (self.rounded(prompt, tokens) - exact).gather(1, exact.topk(NUM_TOP).indices)
            worst = max(worst, float(error.abs().max()))
        return 2 * RMS_FACTOR * worst


@torch.inference_mode()
def _logits(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    logits: torch.Tensor = model(ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return logits.float()


def assert_logprobs_as_good(reference: Reference, outputs: list[RequestOutput]) -> None:
    """The engine's log probabilities are as near to the exact ones as transformers' own in bfloat16."""
    ours, theirs = [], []
    for output in outputs:
        completion = output.outputs[0]
        assert completion.logprobs is not None
        prompt, tokens = output.prompt_token_ids, completion.token_ids
        both = (reference.exact(prompt, tokens), reference.rounded(prompt, tokens))
        ids = torch.tensor([list(entry.top) for entry in completion.logprobs], device=both[0].device)
        given = torch.tensor([list(entry.top.values()) for entry in completion.logprobs], device=ids.device)
        assert ids.shape == (len(tokens), NUM_TOP)
        exact, rounded = (each.log_softmax(-1).gather(1, ids) for each in both)
        ours.append((given - exact).flatten())
        theirs.append((rounded - exact).flatten())
    mine, other = torch.cat(ours), torch.cat(theirs)
    assert mine.isfinite().all()
    rms, their_rms = float(mine.square().mean().sqrt()), float(other.square().mean().sqrt())
    worst, their_worst = float(mine.abs().max()), float(other.abs().max())
    print(f"off by {rms:.4f} rms, {worst:.3f} at worst; transformers by {their_rms:.4f}, {their_worst:.3f}")
    assert their_rms < 0.2, "the yardstick itself is broken"
    assert rms <= RMS_FACTOR * their_rms
    assert worst <= WORST_FACTOR * their_worst


def assert_greedy(reference: Reference, outputs: list[RequestOutput], tie: float) -> None:
    """Every token is the exact model's first choice after what comes before it, or within `tie` of it; almost
    all of them are the first choice."""
    equal, total = 0, 0
    for output in outputs:
        tokens = output.outputs[0].token_ids
        exact = reference.exact(output.prompt_token_ids, tokens)
        chosen = exact.gather(1, torch.tensor(tokens, device=exact.device)[:, None])[:, 0]
        gaps = exact.max(dim=1).values - chosen
        assert float(gaps.max()) <= tie, (
            f"a prompt of {len(output.prompt_token_ids)} tokens: token {int(gaps.argmax())} is "
            f"{float(gaps.max()):.3f} below the first choice; only {tie:.3f} is rounding"
        )
        equal += int((gaps == 0).sum())
        total += len(tokens)
    print(f"{equal} of {total} tokens are the exact first choice; ties within {tie:.3f}")
    assert equal >= LEAST_AGREEMENT * total
