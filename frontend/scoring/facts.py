"""How a model's logits become probabilities and scores: what config.json and the operator say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from frontend.scoring.template import PairTemplate
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import ConfigError

Numbers = npt.NDArray[np.float32]

_IDENTITY = "Identity"
_ACTIVATIONS = ("Sigmoid", _IDENTITY)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringFacts:
    """What a model classifies and scores with.

    Attributes:
        problem_type: config.json's: "single_label_classification", "multi_label_classification",
            "regression" or empty.
        score_activation: what a cross-encoder's one logit becomes a score by: "Sigmoid" or "Identity".
        template: how a pair of texts is written, or None for the tokenizer's own way.
        tokens: of a generator that scores, the ids of the tokens that say no and yes.
    """

    problem_type: str = ""
    score_activation: str = "Sigmoid"
    template: PairTemplate | None = None
    tokens: tuple[int, int] | None = None

    @classmethod
    def load(
        cls,
        config: Mapping[str, Any],
        tokenizer: TextTokenizer,
        *,
        template: str | None = None,
        tokens: tuple[str, ...] = (),
    ) -> ScoringFacts:
        """Args:
            config: config.json.
            template: see `FrontendConfig.score_template`.
            tokens: see `FrontendConfig.classifier_from_token`.

        Raises:
            ConfigError: config.json names an activation that is not implemented, or a template or token is
                wrong.
        """
        return cls(
            problem_type=str(config.get("problem_type") or ""),
            score_activation=_score_activation(config),
            template=None if template is None else PairTemplate.load(template),
            tokens=_token_ids(tokenizer, tokens) if tokens else None,
        )

    def probabilities(self, logits: Numbers) -> Numbers:
        """A probability for each class; of a regression the numbers themselves."""
        if self.problem_type == "regression":
            return logits
        if self.problem_type == "multi_label_classification" or len(logits) == 1:
            return sigmoid(logits)
        exponents = np.exp(logits.astype(np.float64) - logits.max())
        shares: npt.NDArray[np.float64] = exponents / exponents.sum()
        return shares.astype(np.float32)

    def score(self, logit: float) -> float:
        """What a cross-encoder's logit says of a pair."""
        if self.score_activation == _IDENTITY:
            return logit
        return float(sigmoid(np.array([logit], np.float32))[0])


def sigmoid(logits: Numbers) -> Numbers:
    """1 / (1 + exp(-x)), without overflow."""
    doubled: npt.NDArray[np.float64] = 1.0 + np.tanh(0.5 * logits.astype(np.float64))
    return (0.5 * doubled).astype(np.float32)


def _score_activation(config: Mapping[str, Any]) -> str:
    """The name of a class of torch, which sentence-transformers writes with its modules."""
    nested = config.get("sentence_transformers")
    named = nested.get("activation_fn") if isinstance(nested, dict) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if named is None:
        return "Sigmoid"
    name = str(named).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"config.json: the activation of scores is {named!r}; it must be one of {_ACTIVATIONS}"
        )
    return name


def _token_ids(tokenizer: TextTokenizer, tokens: tuple[str, ...]) -> tuple[int, int]:
    read = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
    wrong = next((token for token, ids in zip(tokens, read, strict=True) if len(ids) != 1), None)
    if wrong is not None:
        raise ConfigError(f"classifier_from_token has {wrong!r}, which is not one token of this model")
    (no,), (yes,) = read
    return no, yes
