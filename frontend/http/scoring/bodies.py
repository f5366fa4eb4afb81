"""The bodies of /v1/rerank (Jina's and Cohere's), /v1/score and /v1/classify (vLLM's)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from frontend.embedding import MAX_INPUTS
from frontend.http.body import Body, Seconds, TokenIdList
from pagewire.base.errors import InvalidRequest

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]


class ScoringBody(Body):
    """What the three have in common."""

    model: str | None = None
    user: str | None = None
    request_id: str | None = None
    truncate_prompt_tokens: int | None = None
    use_activation: bool | None = None
    priority: int | None = None
    timeout: Seconds | None = None


class Document(Body):
    """A document in the form of an object."""

    text: Text


class RerankBody(ScoringBody):
    """POST /v1/rerank."""

    forms: ClassVar = {"documents": f'a list of 1 to {MAX_INPUTS} texts, or objects {{"text": ...}}'}

    query: Text
    documents: Annotated[list[Text | Document], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """The query with each document."""
        texts = (each if isinstance(each, str) else each.text for each in self.documents)
        return [(self.query, text) for text in texts]


class ScoreBody(ScoringBody):
    """POST /v1/score: `text_1` and `text_2`, or `queries` and `documents`, which mean the same."""

    forms: ClassVar = dict.fromkeys(
        ("text_1", "text_2", "queries", "documents"), f"a text, or a list of 1 to {MAX_INPUTS} texts"
    )

    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    queries: Text | Texts | None = None
    documents: Text | Texts | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """One text with each of the second ones, or as many first as second ones with each other.

        Raises:
            InvalidRequest: a side is missing or given twice, or their numbers do not fit.
        """
        given = [name for name in type(self).forms if getattr(self, name) is not None]
        if given not in (["text_1", "text_2"], ["queries", "documents"]):
            raise InvalidRequest("send text_1 and text_2, or queries and documents", param="text_1")
        first, second = (_listed(getattr(self, name)) for name in given)
        if len(first) == 1:
            first *= len(second)
        if len(first) != len(second):
            raise InvalidRequest(
                f"{given[0]} has {len(first)} texts and {given[1]} {len(second)}; it must have 1 or as many",
                param=given[0],
            )
        return list(zip(first, second, strict=True))


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


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
