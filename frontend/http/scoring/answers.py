"""What the endpoints answer, for /openapi.json; the tests hold the answers to these models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from frontend.http.openai.schemas.answers import EmbeddingUsage


class Classification(BaseModel):
    """The classes of one input."""

    index: int
    label: str = Field(description="The likeliest class.")
    probs: list[float] = Field(description="Of each class; with use_activation false its logit.")
    num_classes: int


class ClassificationList(BaseModel):
    """The answer of POST /v1/classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: EmbeddingUsage


class PairScore(BaseModel):
    """How well the texts of one pair go together."""

    object: Literal["score"]
    index: int
    score: float


class ScoreList(BaseModel):
    """The answer of POST /v1/score."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: EmbeddingUsage


class RankedText(BaseModel):
    """A document as it was sent."""

    text: str


class RankedDocument(BaseModel):
    """One document's place."""

    index: int = Field(description="Among the documents that were sent.")
    relevance_score: float
    document: RankedText | None = Field(default=None, description="Unless return_documents is false.")


class Ranking(BaseModel):
    """The answer of POST /v1/rerank: the most relevant document first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage
