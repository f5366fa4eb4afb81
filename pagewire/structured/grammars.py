"""Compiled constraints over one model's vocabulary, and the matchers of the requests that use them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from pagewire.base.errors import ConfigError, InvalidRequest, PagewireError
from pagewire.structured.checker import ConstraintChecker
from pagewire.structured.translate import complaint, parser_limits
from pagewire.structured.vocabulary import Vocabulary
from pagewire.wire.sampling_params import StructuredOutput

Mask = npt.NDArray[np.uint32]
"""Which tokens may come next, [ceil(vocab_size / 32)]: token i may if bit i % 32 of word i // 32 is set."""

_MAX_GRAMMARS = 256
_MAX_GRAMMAR_BYTES = 512 << 20


class Matcher:
    """How far one request's text is in its constraint. Not for several threads at once."""

    def __init__(self, structured: StructuredOutput, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self._structured = structured
        self._vocab_size = vocabulary.vocab_size
        self._ends = vocabulary.eos_token_ids
        self._matcher = matcher

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes the text's next tokens.

        Raises:
            PagewireError: a mask did not allow them.
            InvalidRequest: the constraint has become too complex to go on with.
        """
        if self._matcher.consume_tokens(list(token_ids)):
            return
        error = self._matcher.get_error()
        if "doesn't satisfy the grammar" in error or "not allowed" in error:
            raise PagewireError(f"the output left its constraint: {error.splitlines()[0]}")
        raise complaint(self._structured, error)

    def mask(self) -> Mask | None:
        """Which tokens may come next; None if only the end may.

        Raises:
            InvalidRequest: the constraint has become too complex to go on with, or nothing satisfies it.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return None
        words = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: -(-self._vocab_size // 32)].copy()
        if self._matcher.is_error():
            raise complaint(self._structured, self._matcher.get_error())
        if self._vocab_size % 32:
            words[-1] &= (1 << self._vocab_size % 32) - 1
        return words if self._goes_on(words) else None

    def _goes_on(self, words: Mask) -> bool:
        """Whether a mask allows anything but the end."""
        num_allowed = int(np.bitwise_count(words).sum()) if hasattr(np, "bitwise_count") else _count(words)
        return num_allowed > sum(int(words[end // 32]) >> end % 32 & 1 for end in self._ends)


def _count(words: Mask) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


@dataclass(slots=True)
class _Grammar:
    """A compiled constraint. Its matcher is at the beginning, and is copied for each request."""

    matcher: LLMatcher
    num_bytes: int


class Grammars:
    """A model's vocabulary and the constraints compiled over it, of which those used lately are kept.

    Blocking: `load` and `compile` take from under a millisecond to seconds and must not run on an event loop.
    `compile` is called from one thread at a time, the others from any.
    """

    def __init__(self, model: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """
        Args:
            model: the model's directory, as WorkerFacts.model says.
            vocab_size: the model's, which may be larger than its tokenizer's.
            eos_token_ids: tokens that end a text.
        """
        self._settings = {"model_dir": model, "vocab_size": vocab_size, "eos_token_ids": eos_token_ids}
        self._vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self._checker = ConstraintChecker(self._settings)
        self._vocabulary: Vocabulary | None = None
        self._model = model
        self._grammars: OrderedDict[StructuredOutput, _Grammar] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def matcher(self, structured: StructuredOutput) -> Matcher | None:
        """A new matcher at the beginning of a text; None if the constraint has to be compiled first."""
        with self._lock:
            grammar = self._grammars.get(structured)
            if grammar is None:
                return None
            assert self._vocabulary is not None
            self._grammars.move_to_end(structured)
            return Matcher(structured, self._vocabulary, grammar.matcher.deep_copy())

    def compile(self, structured: StructuredOutput) -> Matcher:
        """A new matcher at the beginning of a text.

        Raises:
            InvalidRequest: the constraint is wrong or not supported, or the model has no tokenizer.
            Unavailable: it could not be tried.
        """
        if (matcher := self.matcher(structured)) is not None:
            return matcher
        vocabulary = self.load()
        verdict = self._checker.check(structured)
        compiled = LLMatcher(vocabulary.tokenizer, verdict.grammar, log_level=0, limits=parser_limits())
        if compiled.is_error():
            raise complaint(structured, compiled.get_error())
        with self._lock:
            self._grammars[structured] = _Grammar(compiled, verdict.num_bytes)
            self._shrink()
        return Matcher(structured, vocabulary, compiled.deep_copy())

    def load(self) -> Vocabulary:
        """Reads the model's tokenizer, unless that was done. It takes tenths of a second, in which most other
        threads stand still: the libraries hold on to the interpreter's lock.

        Raises:
            InvalidRequest: the model has none.
        """
        with self._loading:
            if self._vocabulary is None:
                try:
                    self._vocabulary = Vocabulary.load(
                        Path(self._model), self._vocab_size, self._eos_token_ids
                    )
                except ConfigError as error:
                    raise InvalidRequest(
                        f"structured output needs the model's tokenizer, but {error.message}",
                        param="structured_output",
                    ) from error
            return self._vocabulary

    def _shrink(self) -> None:
        """Forgets what was not used for longest until the rest is within bounds."""
        while len(self._grammars) > 1 and (
            len(self._grammars) > _MAX_GRAMMARS
            or sum(each.num_bytes for each in self._grammars.values()) > _MAX_GRAMMAR_BYTES
        ):
            self._grammars.popitem(last=False)

    def close(self) -> None:
        """Ends the process that tries constraints."""
        self._checker.close()
