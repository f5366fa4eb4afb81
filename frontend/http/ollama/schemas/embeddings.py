"""POST /api/embed and its predecessor, POST /api/embeddings."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from frontend.caller import client_of
from frontend.embedding import EmbeddingRequest
from frontend.generation.request import TextPrompt
from frontend.http.body import Body
from frontend.http.ollama.schemas.options import OllamaOptions


class OllamaEmbedBody(Body):
    """POST /api/embed; and `pooling`, which models need that are not made for embeddings."""

    forms: ClassVar = {"input": "a string or a list of strings"}

    model: str | None = None
    input: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=0)] | None = None
    keep_alive: float | str | None = None
    options: OllamaOptions | None = None
    pooling: str | None = None

    def inputs(self) -> list[str]:
        """What to embed; nothing where only the model is to be loaded."""
        if isinstance(self.input, list):
            return self.input
        return [self.input] if self.input else []

    def to_embed(self, request_id: str, model: str) -> EmbeddingRequest:
        """The request in the pipeline's form: vectors of length 1, of long inputs' beginnings.

        Raises:
            InvalidRequest: see the messages.
        """
        return EmbeddingRequest(
            request_id=request_id,
            model=model,
            inputs=[TextPrompt(text=text) for text in self.inputs()],
            pooling=self.pooling,
            normalize=True,
            dimensions=self.dimensions or None,
            truncate_prompt_tokens=None if self.truncate is False else -1,
            client=client_of(None),
        )


class OllamaEmbeddingsBody(Body):
    """POST /api/embeddings; and `pooling`, as of /api/embed."""

    model: str | None = None
    prompt: str | None = None
    keep_alive: float | str | None = None
    options: OllamaOptions | None = None
    pooling: str | None = None

    def to_embed(self, request_id: str, model: str) -> EmbeddingRequest:
        """The request in the pipeline's form: one vector, as long as it is.

        Raises:
            InvalidRequest: see the messages.
        """
        return EmbeddingRequest(
            request_id=request_id,
            model=model,
            inputs=[TextPrompt(text=self.prompt or "")],
            pooling=self.pooling,
            normalize=False,
            truncate_prompt_tokens=-1,
            client=client_of(None),
        )
