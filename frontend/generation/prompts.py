"""From what a client sent to the tokens of a prompt. Slow: runs in threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from frontend.generation.request import (
    Conversation,
    GenerationRequest,
    Prompt,
    TokenPrompt,
)
from frontend.served_model import ServedModel
from frontend.text.rendered_prompt import RenderedPrompt
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import InvalidRequest

_ENDING_CHARACTERS = 256
"""Enough for the marks that a template may write at the beginning of a reply."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as tokens.

    Attributes:
        token_ids: what the model reads.
        text: the same as text, if it was asked for.
        offsets: where in `text` each token begins, in characters.
        ending: a conversation's last characters, as they were rendered.
    """

    token_ids: Sequence[int]
    text: str = ""
    offsets: Sequence[int] = ()
    ending: str = ""

    def last(self, count: int) -> PromptTokens:
        """The prompt's last `count` tokens."""
        surplus = len(self.token_ids) - count
        if surplus <= 0:
            return self
        if not self.offsets:
            return replace(self, token_ids=self.token_ids[surplus:])
        begin = self.offsets[surplus]
        offsets = [offset - begin for offset in self.offsets[surplus:]]
        return PromptTokens(self.token_ids[surplus:], self.text[begin:], offsets, self.ending)


def is_tokens(prompt: Prompt) -> bool:
    """Whether a prompt needs no tokenizing."""
    return isinstance(prompt, TokenPrompt)


def read_request(
    model: ServedModel, request: GenerationRequest, max_model_len: int
) -> tuple[list[PromptTokens], list[list[int]]]:
    """The tokens of a request's prompts, cut to what the request wants to keep, and those of its bad words.

    Raises:
        InvalidRequest: see `read_prompt`.
    """
    kept = num_kept(request.truncate_prompt_tokens, request.sampling.max_tokens, max_model_len)
    limit = max_model_len if kept is None else None
    prompts = [read_prompt(model, prompt, limit, with_text=request.echo) for prompt in request.prompts]
    if kept is not None:
        prompts = [prompt.last(kept) for prompt in prompts]
    return prompts, bad_word_ids(model.tokenizer, request.sampling.bad_words)


def num_kept(truncate_prompt_tokens: int | None, max_tokens: int | None, max_model_len: int) -> int | None:
    """How many tokens at a prompt's end are kept; None for all. -1 keeps what has room beside max_tokens."""
    if truncate_prompt_tokens != -1:
        return truncate_prompt_tokens
    return max_model_len - min(max_tokens or 1, max_model_len - 1)


def read_prompt(
    model: ServedModel, prompt: Prompt, max_tokens: int | None = None, *, with_text: bool = False
) -> PromptTokens:
    """The tokens of a prompt.

    Args:
        model: whose template and tokenizer are used.
        prompt: in any form.
        max_tokens: refuse a text that cannot but have more tokens than this.
        with_text: whether text and offsets are wanted.

    Raises:
        InvalidRequest: the template refuses the conversation, or the text is so long that it cannot but
            have more than `max_tokens` tokens; that is found without tokenizing it.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, TokenPrompt):
        token_ids = prompt.token_ids
        if not with_text:
            return PromptTokens(token_ids)
        shown, offsets = _written(tokenizer, token_ids, [0] * len(token_ids))
        return PromptTokens(token_ids, shown, offsets)
    if isinstance(prompt, Conversation):
        return _read_conversation(model, prompt, max_tokens, with_text=with_text)
    text = prompt.text
    _check_length(text, tokenizer.longest_token, max_tokens)
    if not with_text:
        return PromptTokens(tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens))
    token_ids, added = tokenizer.encode_marked(text, add_special_tokens=prompt.add_special_tokens)
    return _with_text(tokenizer, PromptTokens(token_ids, text), added)


def _read_conversation(
    model: ServedModel, conversation: Conversation, max_tokens: int | None, *, with_text: bool
) -> PromptTokens:
    """See `read_prompt`. The template writes what the model expects around a text."""
    rendered = _render(model, conversation)
    text = rendered.text
    _check_length(text, model.tokenizer.longest_token, max_tokens)
    prompt = PromptTokens(model.encode_prompt(rendered), text, ending=text[-_ENDING_CHARACTERS:])
    if not with_text:
        return replace(prompt, text="")
    return _with_text(model.tokenizer, prompt, [0] * len(prompt.token_ids))


def _with_text(tokenizer: TextTokenizer, prompt: PromptTokens, added: Sequence[int]) -> PromptTokens:
    """A prompt with the offsets of its tokens, of which some were added to the text."""
    _, offsets = _written(tokenizer, prompt.token_ids, added)
    return replace(prompt, offsets=[min(offset, len(prompt.text)) for offset in offsets])


def bad_word_ids(tokenizer: TextTokenizer, words: Sequence[str]) -> list[list[int]]:
    """The token sequences that write these words at the beginning of a text and within one, after a space."""
    sequences: list[list[int]] = []
    for word in words:
        bare = word.lstrip(" ") or word
        for text in (word, bare, " " + bare):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in sequences:
                sequences.append(ids)
    return sequences


def _render(model: ServedModel, conversation: Conversation) -> RenderedPrompt:
    if model.template is None:
        raise InvalidRequest("the model has no chat template; send a text prompt instead", param="messages")
    return model.template.render_prompt(conversation, tools_as_text=model.replies.is_generic)


def _written(
    tokenizer: TextTokenizer, token_ids: Sequence[int], added: Sequence[int]
) -> tuple[str, list[int]]:
    """The text that a prompt's tokens stand for, special ones shown, and where in it each begins: at the
    first character that is not whole before it. Added tokens are no part of what was written."""
    detokenizer = tokenizer.new_detokenizer(skip_special_tokens=False)
    offsets, pieces, length = [], [], 0
    for token_id, is_added in zip(token_ids, added, strict=True):
        offsets.append(length)
        if not is_added:
            pieces.append(detokenizer.push((token_id,)))
            length += len(pieces[-1])
    return "".join(pieces) + detokenizer.flush(), offsets


def _check_length(text: str, longest_token: int, max_tokens: int | None) -> None:
    """Refuses a text that has too many tokens even if each were the longest there is."""
    if max_tokens is not None and len(text) > max_tokens * longest_token:
        raise InvalidRequest(
            f"the prompt has {len(text)} characters, which is more than the model's context of {max_tokens} "
            "tokens can hold",
            param="prompt",
        )
