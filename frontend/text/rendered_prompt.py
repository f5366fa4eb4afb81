"""A rendered conversation, with what of it is control tokens.

A model's own template writes control tokens as their texts, and the tokenizer finds them there, also in what
a user wrote. The templates that come with pagewire set them between marks that are drawn for each prompt, so
that no content can hold one: such tokens go to the model by their ids, and all else is text.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from frontend.text.tokenizer import TextTokenizer

CONTROL_MARK = "control_mark"
"""The template's variable with the mark: it stands before and behind the text of a token, or its id as in
#195. Two marks with nothing between them end a text: what follows is encoded apart."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Attributes:
    text: all that was written, control tokens too.
    parts: in turns a text and the name of a control token, beginning and ending with a text, any of which may
        be empty; None where the tokenizer is to find control tokens in the text.
    """

    text: str
    parts: tuple[str, ...] | None = None

    def behind(self, text: str) -> RenderedPrompt | None:
        """What follows the first place where a text is written; None if it is nowhere."""
        _, found, rest = self.text.partition(text)
        if self.parts is None:
            return RenderedPrompt(rest) if found else None
        for index, part in enumerate(self.parts):
            _, found, rest = part.partition(text)
            if found and index % 2 == 0:
                parts = (rest, *self.parts[index + 1 :])
                return RenderedPrompt("".join(parts), parts)
        return None


def draw_mark() -> str:
    """A text that is in no conversation."""
    return f"<{secrets.token_hex(16)}>"


def split_at_marks(rendered: str, mark: str) -> RenderedPrompt:
    """What a template wrote, with its marks."""
    parts = tuple(rendered.split(mark))
    assert len(parts) % 2, "a template of ours sets marks in pairs"
    return RenderedPrompt("".join(parts), parts)


def encode_prompt(
    prompt: RenderedPrompt, tokenizer: TextTokenizer, content_tokenizer: TextTokenizer
) -> list[int]:
    """The ids of a rendered conversation.

    Args:
        content_tokenizer: the same, but with control tokens in a text being text.

    Raises:
        InvalidRequest: the text is not valid Unicode.
    """
    if prompt.parts is None:
        return tokenizer.encode(prompt.text, add_special_tokens=False)
    ids: list[int] = []
    for index, part in enumerate(prompt.parts):
        if not part:
            continue
        if index % 2 == 0:
            ids += content_tokenizer.encode(part, add_special_tokens=False)
        elif part.startswith("#"):
            ids.append(int(part[1:]))
        else:
            token_id = tokenizer.token_id(part)
            assert token_id is not None, f"the tokenizer has no {part}, which its template names"
            ids.append(token_id)
    return ids
