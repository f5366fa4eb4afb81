"""Applies a model's reply format to a request for a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from frontend.generation.prompts import PromptTokens
from frontend.generation.request import Conversation, GenerationRequest
from frontend.served_model import ServedModel


def to_be_read(
    model: ServedModel, request: GenerationRequest, prompts: Sequence[PromptTokens]
) -> GenerationRequest:
    """The request with what its conversation's tools and the model's thoughts add to it: a constraint, and a
    parser for its completions. Requests to continue a text are left as they are.

    Raises:
        InvalidRequest, Unsupported: see `ReplyFormat.read`.
    """
    conversation = request.prompts[0]
    if not isinstance(conversation, Conversation):
        return request
    reading = model.replies.read(conversation, prompts[0].ending, request.sampling)
    return replace(request, sampling=reading.sampling, new_parser=reading.new_parser)
