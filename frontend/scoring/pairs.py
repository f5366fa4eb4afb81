"""From pairs of texts to tokens: as the tokenizer joins two texts, or by a template. Runs in threads."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.pooled import PooledRequest, TextPair, check_tokens, read_inputs, require_fitting
from frontend.scoring.template import PairTemplate
from frontend.text.tokenizer import TextTokenizer
from pagewire.base.errors import InvalidRequest

_MAX_CUTS = 8


def read_pairs(
    tokenizer: TextTokenizer,
    template: PairTemplate | None,
    request: PooledRequest[TextPair],
    limit: int,
    vocab_size: int,
) -> list[Sequence[int]]:
    """Every pair's tokens. What is too long and may be cut loses the end of its second text.

    Raises:
        InvalidRequest: one is too long.
    """
    if template is None:
        return read_inputs(tokenizer, request, limit, vocab_size)
    kept = request.num_kept(limit)
    read: list[Sequence[int]] = []
    for number, pair in enumerate(request.inputs):
        name = "input" if len(request.inputs) == 1 else f"input[{number}]"
        if kept is None:
            require_fitting(pair.first, limit, tokenizer, name)
            require_fitting(pair.second, limit, tokenizer, name)
            ids: Sequence[int] = tokenizer.encode(template.write(pair.first, pair.second))
        else:
            ids = _cut(tokenizer, template, pair, kept, name)
        check_tokens(ids, limit, vocab_size, name)
        read.append(ids)
    return read


def _cut(
    tokenizer: TextTokenizer, template: PairTemplate, pair: TextPair, kept: int, name: str
) -> Sequence[int]:
    """The tokens with as much of the second text as there is room for. Within the whole, a text that was cut
    may have a token more than by itself, so it is tried."""
    require_fitting(pair.first, kept, tokenizer, name)
    second = pair.second[: kept * tokenizer.longest_token]
    for _ in range(_MAX_CUTS):
        ids = tokenizer.encode(template.write(pair.first, second))
        surplus = len(ids) - kept
        if surplus <= 0:
            return ids
        own = tokenizer.encode(second, add_special_tokens=False)
        if surplus >= len(own):
            break
        second = tokenizer.decode(own[:-surplus], skip_special_tokens=False).rstrip(
            "\N{REPLACEMENT CHARACTER}"
        )
    raise InvalidRequest(
        f"{name} has no room for its second text within {kept} tokens: the first one and the template fill "
        "them; raise truncate_prompt_tokens or shorten the first text",
        param=name,
    )
