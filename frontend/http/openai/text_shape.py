"""/v1/completions: the answer's shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

from frontend.generation.answer import WholeChoice
from frontend.generation.events import Delta, Finished, PositionLogprobs, PromptRead
from frontend.http.openai.shapes import ResponseShape
from frontend.text.detokenizer import IncrementalDetokenizer
from frontend.text.tokenizer import TextTokenizer


class TextShape(ResponseShape):
    """A text for each choice, with its prompt before it if that was asked for."""

    _whole_object = "text_completion"
    _chunk_object = "text_completion"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._offsets: dict[int, TextOffsets] = {}

    def _opening(self, index: int, prompt: PromptRead | None) -> str:
        if prompt is None:
            return ""
        facts = self._of_prompt(prompt)
        text = encode_basestring(prompt.text) if self._options.echo else '""'
        logprobs = self._echoed(index, prompt)
        rendered = "null" if logprobs is None else json.dumps(logprobs, ensure_ascii=False)
        further = f", {json.dumps(facts, ensure_ascii=False)[1:-1]}" if facts else ""
        return self._chunk(index, text, rendered, "null", further + self._rendered_ids(()))

    def _said(self, delta: Delta, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs]) -> str:
        rendered = "null"
        if logprobs:
            rendered = json.dumps(self._columns(delta.index, logprobs), ensure_ascii=False)
        text = encode_basestring(delta.text)
        return self._chunk(delta.index, text, rendered, "null", self._rendered_ids(token_ids))

    def _ending(self, finished: Finished) -> str:
        return self._chunk(finished.index, '""', "null", self._reasons(finished))

    def _chunk(self, index: int, text: str, logprobs: str, reason: str, further: str = "") -> str:
        choice = f'"text": {text}, "logprobs": {logprobs}, "finish_reason": {reason}{further}'
        return self._frame(index, choice)

    def _content(self, choice: WholeChoice, prompt: PromptRead | None) -> dict[str, Any]:
        before = None if prompt is None else self._echoed(choice.index, prompt)
        logprobs = self._columns(choice.index, choice.logprobs) if choice.logprobs else None
        if before is not None:
            logprobs = (
                before if logprobs is None else {name: before[name] + logprobs[name] for name in before}
            )
        text = choice.text
        if prompt is not None and self._options.echo:
            text = prompt.text + text
        return {"text": text, "logprobs": logprobs, **({} if prompt is None else self._of_prompt(prompt))}

    def _of_prompt(self, prompt: PromptRead) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self._options.return_token_ids:
            facts["prompt_token_ids"] = list(prompt.token_ids)
        if self._options.prompt_logprobs is not None:
            facts["prompt_logprobs"] = self._prompt_logprobs(prompt)
        return facts

    def _echoed(self, index: int, prompt: PromptRead) -> dict[str, list[Any]] | None:
        """The log probabilities of a prompt that is a part of the text, and where the rest of it begins."""
        if not self._options.echo:
            return None
        self._offsets[index] = TextOffsets(
            self._tokenizer.new_detokenizer(skip_special_tokens=self._skip_special_tokens), len(prompt.text)
        )
        if self._options.logprobs is None:
            return None
        return self._table(prompt.logprobs, prompt.offsets)

    def _columns(self, index: int, positions: Sequence[PositionLogprobs]) -> dict[str, list[Any]]:
        offsets = self._offsets.get(index)
        if offsets is None:
            offsets = self._offsets[index] = TextOffsets(
                self._tokenizer.new_detokenizer(skip_special_tokens=self._skip_special_tokens)
            )
        return self._table(positions, [offsets.place(position.token_id) for position in positions])

    def _table(self, positions: Sequence[PositionLogprobs], offsets: Sequence[int]) -> dict[str, list[Any]]:
        """Columns. A position's likeliest tokens include the one that is there, as with OpenAI."""
        count = self._options.logprobs or 0
        names = [token_name(self._tokenizer, position.token_id) for position in positions]
        return {
            "tokens": names,
            "token_logprobs": [position.logprob for position in positions],
            "top_logprobs": [
                None if position.logprob is None else self._top(position, name, count)
                for position, name in zip(positions, names, strict=True)
            ],
            "text_offset": list(offsets),
        }

    def _top(self, position: PositionLogprobs, name: str, count: int) -> dict[str, Any]:
        top = {token_name(self._tokenizer, token_id): value for token_id, value in position.top[:count]}
        return top if name in top else {**top, name: position.logprob}


class TextOffsets:
    """Where in a text each of its tokens begins: at the first character that is not whole before it."""

    def __init__(self, detokenizer: IncrementalDetokenizer, begin: int = 0) -> None:
        self._detokenizer = detokenizer
        self._length = begin

    def place(self, token_id: int) -> int:
        """The offset of the next token, in characters."""
        offset = self._length
        self._length += len(self._detokenizer.push((token_id,)))
        return offset


def token_name(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token's text; as OpenAI does, its bytes where they are not whole characters, so that no two tokens of
    different bytes have one name."""
    data = tokenizer.token_bytes(token_id)
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
