"""Applies a model's reply format to a request for a message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from frontend.generation.prompts import PromptTokens
from frontend.generation.request import Conversation, GenerationRequest
from frontend.served_model import ServedModel
from pagewire.base.errors import InvalidRequest

_MADE_HERE = re.compile(r"^the (grammar|JSON schema): (at \d+\(\d+\): failed to compile JSON schema: )?")


@contextmanager
def blaming_tools() -> Iterator[None]:
    """Around the check of a constraint that was made of a request's tools, and of nothing else that has not
    been checked: what is wrong with it is wrong with a tool's schema.
    """
    try:
        yield
    except InvalidRequest as error:
        fault = _MADE_HERE.sub("", error.message)
        raise InvalidRequest(f"a tool's parameters cannot be enforced: {fault}", param="tools") from error


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
