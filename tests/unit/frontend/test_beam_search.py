"""The search's decisions, against transformers' own beams over a small random model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from frontend.generation.beam_search import BeamSearcher
from pagewire.wire.sampling_params import BeamSearch, SamplingParams

VOCAB = 24
PROMPTS = ([3, 7, 11, 2], [20, 4, 4])
MAX_TOKENS = 14


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().double()


@torch.no_grad()
def search(
    model: LlamaForCausalLM, prompt: list[int], searcher: BeamSearcher
) -> list[tuple[list[int], float]]:
    """Runs the search with the model's own probabilities."""
    while not searcher.is_over:
        sequences = torch.tensor([[*prompt, *beam.token_ids] for beam in searcher.beams])
        logprobs = model(sequences).logits[:, -1].log_softmax(-1)
        values, ids = logprobs.topk(min(searcher.num_candidates, VOCAB))
        searcher.advance(
            [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        )
    return [(list(found.beam.token_ids), found.score) for found in searcher.best]


@torch.no_grad()
def reference(
    model: LlamaForCausalLM, prompt: list[int], eos: list[int], width: int, **settings: object
) -> list[tuple[list[int], float]]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        eos_token_id=eos or None,
        pad_token_id=VOCAB - 1,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    found = []
    for sequence, score in zip(
        output.sequences[:, len(prompt) :].tolist(), output.sequences_scores, strict=True
    ):
        ends = [place for place, token_id in enumerate(sequence) if token_id in eos]
        found.append((sequence[: ends[0] + 1] if ends else sequence, float(score)))
    return found


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize(("eos", "min_tokens"), [([5], 0), ([5, 9, 13], 0), ([5, 9], 5), ([], 0)])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beams_are_those_of_transformers(
    model, width, length_penalty, eos, min_tokens, early_stopping
) -> None:
    beams = BeamSearch(width=width, length_penalty=length_penalty, early_stopping=early_stopping)
    sampling = SamplingParams(beam_search=beams, min_tokens=min_tokens)
    for prompt in PROMPTS:
        searcher = BeamSearcher(sampling, eos_token_ids=frozenset(eos), max_tokens=MAX_TOKENS)
        found = search(model, prompt, searcher)
        expected = reference(
            model,
            prompt,
            eos,
            width,
            max_new_tokens=MAX_TOKENS,
            min_new_tokens=min_tokens or None,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        assert [ids for ids, _ in found] == [ids for ids, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)
