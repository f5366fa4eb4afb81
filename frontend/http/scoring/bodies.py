"""The bodies of /v1/rerank (Jina's and Cohere's), /v1/score and /v1/classify (vLLM's)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from frontend.caller import client_of
from frontend.http.body import Body, Seconds, TokenIdList
from frontend.pooled import MAX_INPUTS, TextPair, inputs_of
from frontend.scoring.classification import ClassificationRequest
from frontend.scoring.score import ScoreRequest, pair_up
from pagewire.base.errors import InvalidRequest

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]


class ScoringBody(Body):
    """What the three have in common."""

    defaults: ClassVar = {"use_activation": True, "priority": 0}

    model: str | None = None
    user: str | None = None
    request_id: str | None = None
    truncate_prompt_tokens: int | None = None
    use_activation: bool | None = None
    priority: int | None = None
    timeout: Seconds | None = None

    def _common(self, request_id: str) -> dict[str, Any]:
        """The fields of a request that all have."""
        return {
            "request_id": request_id,
            "model": self.model or "",
            "use_activation": self.use_activation is not False,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "priority": self.priority or 0,
            "client": client_of(self.user),
            "timeout": self.timeout,
        }


class PairsBody(ScoringBody):
    """A body with pairs of texts."""

    def pairs(self) -> list[TextPair]:
        """The texts that are to be compared."""
        raise NotImplementedError

    def to_score(self, request_id: str) -> ScoreRequest:
        """The request in the pipeline's form.

        Raises:
            InvalidRequest: see the messages.
        """
        return ScoreRequest(inputs=self.pairs(), **self._common(request_id))


class Document(Body):
    """A document in the form of an object."""

    text: Text


class RerankBody(PairsBody):
    """POST /v1/rerank."""

    forms: ClassVar = {"documents": f'a list of 1 to {MAX_INPUTS} texts, or objects {{"text": ...}}'}

    query: Text
    documents: Annotated[list[Text | Document], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None

    def texts(self) -> list[str]:
        """The documents."""
        return [each if isinstance(each, str) else each.text for each in self.documents]

    def pairs(self) -> list[TextPair]:
        """The query with each document."""
        return [TextPair(first=self.query, second=text) for text in self.texts()]


class ScoreBody(PairsBody):
    """POST /v1/score: `text_1` and `text_2`, or `queries` and `documents`, which mean the same."""

    forms: ClassVar = dict.fromkeys(
        ("text_1", "text_2", "queries", "documents"), f"a text, or a list of 1 to {MAX_INPUTS} texts"
    )

    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    queries: Text | Texts | None = None
    documents: Text | Texts | None = None

    def pairs(self) -> list[TextPair]:
        """One text with each of the second ones, or as many first as second ones with each other.

        Raises:
            InvalidRequest: a side is missing or given twice, or their numbers do not fit.
        """
        given = [name for name in type(self).forms if getattr(self, name) is not None]
        if given not in (["text_1", "text_2"], ["queries", "documents"]):
            raise InvalidRequest("send text_1 and text_2, or queries and documents", param="text_1")
        first, second = (_listed(getattr(self, name)) for name in given)
        return pair_up(first, second, (given[0], given[1]))


class ClassifyBody(ScoringBody):
    """POST /v1/classify."""

    forms: ClassVar = {"input": "a string, a list of token ids, or a list of either"}

    input: (
        str
        | TokenIdList
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIdList], Field(fail_fast=True)]
    )
    add_special_tokens: bool = True

    def to_classify(self, request_id: str) -> ClassificationRequest:
        """The request in the pipeline's form.

        Raises:
            InvalidRequest: see the messages.
        """
        inputs = inputs_of(self.input, add_special_tokens=self.add_special_tokens)
        return ClassificationRequest(inputs=inputs, **self._common(request_id))


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
