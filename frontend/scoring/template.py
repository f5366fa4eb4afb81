"""How a pair of texts is written for a model that was trained to read it so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pagewire.base.errors import ConfigError

_PLACES = re.compile(r"\{(query|document)\}")

# https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
_QWEN3_RERANKER = """\
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that \
the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: Given a web search query, retrieve relevant passages that answer the query
<Query>: {query}
<Document>: {document}<|im_end|>
<|im_start|>assistant
<think>

</think>

"""
TEMPLATES = {"qwen3-reranker": _QWEN3_RERANKER}


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """A text with the places {query} and {document}, each once. Other braces are text."""

    text: str

    @classmethod
    def load(cls, given: str) -> PairTemplate:
        """Args:
            given: a name of TEMPLATES, a file, or a template itself.

        Raises:
            ConfigError: it is none of these, or lacks a place.
        """
        text = TEMPLATES.get(given, given)
        if not _PLACES.search(text):
            try:
                text = Path(given).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"score_template is {given!r}; it must be {', '.join(TEMPLATES)}, a file that can be "
                    f"read, or a text with {{query}} and {{document}} in it: {error}"
                ) from error
        if sorted(_PLACES.findall(text)) != ["document", "query"]:
            raise ConfigError("score_template must have {query} and {document} in it, each once")
        return cls(text)

    def write(self, query: str, document: str) -> str:
        """The text of a pair. What the texts themselves say of places is left alone."""
        values = {"query": query, "document": document}
        return _PLACES.sub(lambda place: values[place.group(1)], self.text)
