"""`context` of /api/generate: the next turn of a conversation of which only the tokens are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from frontend.generation.request import Conversation
from frontend.served_model import ServedModel
from frontend.text.rendered_prompt import RenderedPrompt
from pagewire.base.errors import InvalidRequest

_ANSWER = "ANSWER_SO_FAR"
"""Stands for the earlier answer where the template shows what comes behind one."""


def next_turn(model: ServedModel, conversation: Conversation) -> RenderedPrompt:
    """What a chat template writes behind an answer when another turn of the user follows: the end of the
    assistant's turn, and the user's. Slow: runs in a thread.

    Args:
        conversation: ends with the user's new turn. Other turns are not shown: they are in the context.

    Raises:
        InvalidRequest: the template refuses it, or does not show answers as they are.
    """
    assert model.template is not None
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    probe = replace(conversation, messages=[*earlier, conversation.messages[-1]])
    behind = model.template.render_prompt(probe).behind(_ANSWER)
    if behind is None:
        raise InvalidRequest(
            "context cannot be gone on with: the model's chat template does not show earlier answers as they "
            "are; send the conversation to /api/chat",
            param="context",
        )
    return behind


def joined(model: ServedModel, context: Sequence[int], behind: RenderedPrompt) -> list[int]:
    """The tokens of a context and of what comes behind it. An answer that ended by itself ends with the token
    that ends the turn, which the template writes too."""
    more = model.encode_prompt(behind)
    return [*context, *(more[1:] if more[:1] == list(context[-1:]) else more)]
