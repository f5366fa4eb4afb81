"""What transformers makes of the same weights, in float32."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch


@functools.cache
def reference_model(directory: Path) -> Any:
    """transformers' model in float32, read once by each process that runs tests. Nothing may change it."""
    from transformers import AutoModelForCausalLM  # takes seconds

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


class Reference:
    """transformers' model and tokenizer."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.model = reference_model(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    @torch.inference_mode()
    def beams(self, text: str, width: int, **settings: Any) -> list[tuple[list[int], float]]:
        """Every beam's tokens, up to the end of sequence, and its score."""
        ids = self.tokenizer(text, return_tensors="pt")
        output = self.model.generate(
            **ids,
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        eos = self.model.generation_config.eos_token_id
        found = []
        for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
            tokens = sequence[ids.input_ids.shape[1] :].tolist()
            found.append((tokens[: tokens.index(eos) + 1] if eos in tokens else tokens, float(score)))
        return found

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Log probabilities of every next token after every prefix, [len(ids), vocabulary]."""
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
