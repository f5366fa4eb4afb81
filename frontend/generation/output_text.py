"""Turns a request's generated token ids into its text, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.text.detokenizer import IncrementalDetokenizer
from frontend.text.stop_strings import StopStringMatcher
from frontend.text.tokenizer import TextTokenizer
from pagewire.wire.sampling_params import SamplingParams


def whole_text(
    tokenizer: TextTokenizer, sampling: SamplingParams, token_ids: Sequence[int], *, stopped: bool
) -> str:
    """The text of an output that is complete; `stopped` says that its last token ended it."""
    text = OutputText(tokenizer, sampling)
    hidden = 1 if stopped and not sampling.include_stop_str_in_output else 0
    return text.push(token_ids[: len(token_ids) - hidden])[0] + text.finish()


class OutputText:
    """The text of one request. It depends only on the ids, never on how they were grouped on arrival.

    Attributes:
        stop_string: the stop string found, once one is; nothing may be pushed after that.
    """

    def __init__(self, tokenizer: TextTokenizer, sampling: SamplingParams) -> None:
        self._detokenizer: IncrementalDetokenizer = tokenizer.new_detokenizer(
            skip_special_tokens=sampling.skip_special_tokens
        )
        self._matcher = (
            StopStringMatcher(sampling.stop, include_in_output=sampling.include_stop_str_in_output)
            if sampling.stop
            else None
        )
        self._num_before_matching = sampling.min_tokens
        """Tokens still to come whose text is not searched, because the output may not end there yet."""

    @property
    def stop_string(self) -> str | None:
        return None if self._matcher is None else self._matcher.matched

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Takes ids and returns the text they complete, and how many of them belong to the output: fewer
        than given if a stop string ended it."""
        if self._matcher is None:
            return self._detokenizer.push(token_ids), len(token_ids)
        released = []
        for index, token_id in enumerate(token_ids):
            released.append(self._match(self._detokenizer.push((token_id,))))
            if self._matcher.matched is not None:
                return "".join(released), index + 1
            self._num_before_matching -= 1
        return "".join(released), len(token_ids)

    def finish(self) -> str:
        """The text held back so far. It may still complete a stop string."""
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return rest
        released = self._match(rest)
        return released if self._matcher.matched is not None else released + self._matcher.flush()

    def _match(self, text: str) -> str:
        assert self._matcher is not None
        return text if self._num_before_matching > 1 else self._matcher.push(text)
