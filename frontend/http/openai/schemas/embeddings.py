"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from frontend.caller import client_of
from frontend.embedding import EmbeddingRequest
from frontend.http.body import Body, Seconds, TokenIdList
from frontend.pooled import inputs_of


class EmbeddingBody(Body):
    """POST /v1/embeddings. OpenAI's fields, and behind `user` further ones."""

    defaults: ClassVar = {"encoding_format": "float", "priority": 0}
    forms: ClassVar = {"input": "a string, a list of token ids, or a list of either"}

    model: str | None = None
    input: (
        str
        | TokenIdList
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIdList], Field(fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    request_id: str | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    pooling: str | None = None
    normalize: bool | None = None
    priority: int | None = None
    timeout: Seconds | None = None

    def to_embed(self, request_id: str) -> EmbeddingRequest:
        """The request in the pipeline's form.

        Raises:
            InvalidRequest: see the messages.
        """
        return EmbeddingRequest(
            request_id=request_id,
            model=self.model or "",
            inputs=inputs_of(self.input, add_special_tokens=self.add_special_tokens),
            pooling=self.pooling,
            normalize=self.normalize,
            dimensions=self.dimensions,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            priority=self.priority or 0,
            client=client_of(self.user),
            timeout=self.timeout,
        )
