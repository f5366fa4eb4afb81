"""How many tokens answers took, and how fast they came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class AnswerStats:
    """Of one answer, or of several added up.

    Attributes:
        prompt_tokens, cached_tokens, completion_tokens: as the server counts them; cached ones are part of
            the prompt's.
        first_token_seconds: from the question to the first token; of several answers, added up.
        decode_seconds: from the first token to the last.
        decode_tokens: tokens after the first.
        answers: how many.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    answers: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """The speed after the first token; None where there was no second one."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None

    def add(self, other: AnswerStats) -> None:
        """Adds another's counts to these."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def lines(self) -> list[str]:
        """What people read."""
        speed, count = self.tokens_per_second, max(self.answers, 1)
        average = "" if self.answers == 1 else ", on average"
        return [
            f"prompt               {self.prompt_tokens:,} tokens, {self.cached_tokens:,} of them cached",
            f"answer               {self.completion_tokens:,} tokens",
            f"time to first token  {self.first_token_seconds / count * 1e3:,.0f} ms{average}",
            f"speed                {'-' if speed is None else f'{speed:,.1f} tokens/s'}",
        ]
