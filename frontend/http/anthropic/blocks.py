"""The blocks that a message's content is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from frontend.http.body import Body
from pagewire.base.errors import InvalidRequest, Unsupported

CacheControl = dict[str, Any] | None
"""Where a prefix to be cached ends. It is only taken: here prefixes are cached without being asked for."""


class TextBlock(Body):
    """Text. Citations are those of an earlier answer, and are not shown to the model."""

    passes_nulls: ClassVar = True

    type: Literal["text"]
    text: str
    citations: list[Any] | None = None
    cache_control: CacheControl = None

    def to_text(self, path: str) -> str:
        return self.text


class ImageBlock(Body):
    """An image, which no model reads here."""

    type: Literal["image"]
    source: dict[str, Any] = Field(default_factory=dict)
    transformations: dict[str, Any] | None = None
    cache_control: CacheControl = None

    def to_text(self, path: str) -> str:
        """Raises:
        Unsupported: always.
        """
        raise Unsupported(f"{path} is an image; the model that is served reads text only", param=path)


class DocumentSource(Body):
    """A document's text, or where it is."""

    type: Literal["text", "content", "base64", "url", "file"]
    media_type: str | None = None
    data: str | None = None
    content: str | list[TextBlock] | None = None
    url: str | None = None
    file_id: str | None = None


class DocumentBlock(Body):
    """A document. One that has its text in it is read; a PDF, or one that is elsewhere, is not."""

    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None
    citations: dict[str, Any] | None = None
    cache_control: CacheControl = None

    def to_text(self, path: str) -> str:
        """The title, the context and the text, on lines of their own.

        Raises:
            Unsupported: the text is not in the request.
        """
        source = self.source
        if source.type not in ("text", "content"):
            raise Unsupported(
                f"{path}.source.type is {source.type!r}; the model reads text only: send the document's text "
                'as {"type": "text", "media_type": "text/plain", "data": ...}',
                param=f"{path}.source",
            )
        field = "data" if source.type == "text" else "content"
        text = texts_of(getattr(source, field), f"{path}.source.{field}")
        return joined([self.title, self.context, text])


class SearchResultBlock(Body):
    """What a client's own search has found."""

    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]
    citations: dict[str, Any] | None = None
    cache_control: CacheControl = None

    def to_text(self, path: str) -> str:
        return joined([self.title, self.source, texts_of(self.content, f"{path}.content")])


class ThinkingBlock(Body):
    """What the model thought in an earlier turn. Signatures are not checked, and may be missing."""

    passes_nulls: ClassVar = True

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Body):
    """A call that the model made. Its input should be an object; whatever it is, it is shown."""

    passes_nulls: ClassVar = True

    type: Literal["tool_use"]
    id: str
    name: str
    input: Any = None
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None
    cache_control: CacheControl = None


class ForeignBlock(Body):
    """A block that only Anthropic can read or have made: encrypted thoughts, calls of tools that run on its
    servers, and their results. A conversation that began elsewhere may have them; they are left out."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})

    type: str


_FOREIGN = frozenset(
    f"<{kind}>"
    for kind in (
        "redacted_thinking",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "mcp_tool_use",
        "mcp_tool_result",
        "container_upload",
        "tool_reference",
        "browser_state",
    )
)


def kind_of_content(value: Any) -> str:
    """The tag of a content's form."""
    return "<blocks>" if isinstance(value, list) else "<text>"


def _kind_of_block(value: Any) -> str:
    kind = f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>"
    return "<foreign>" if kind in _FOREIGN else kind


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[SearchResultBlock, Tag("<search_result>")]
    | Annotated[ForeignBlock, Tag("<foreign>")],
    Discriminator(
        _kind_of_block,
        custom_error_type="block",
        custom_error_message="its type must be text, document or search_result",
    ),
]


class ToolResultBlock(Body):
    """What a call returned."""

    passes_nulls: ClassVar = True

    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[ResultBlock], Tag("<blocks>")],
            Discriminator(kind_of_content),
        ]
        | None
    ) = None
    is_error: bool | None = None
    toolset_name: str | None = None
    cache_control: CacheControl = None

    def to_text(self, path: str) -> str:
        """The result as the model is to read it. In the place of an image it is told that there was one: the
        result came from a tool, so that a refusal would end the conversation for good.

        Raises:
            Unsupported: there is a document without its text.
        """
        text = self.content if isinstance(self.content, str) else self._joined(path)
        if self.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        return text

    def _joined(self, path: str) -> str:
        texts: list[str] = []
        for index, block in enumerate(self.content or ()):
            if isinstance(block, ImageBlock):
                texts.append("[an image, which this model cannot see]")
            elif not isinstance(block, ForeignBlock | str):
                texts.append(block.to_text(f"{path}.content[{index}]"))
        return joined(texts)


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[SearchResultBlock, Tag("<search_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ForeignBlock, Tag("<foreign>")],
    Discriminator(
        _kind_of_block,
        custom_error_type="block",
        custom_error_message=(
            "its type must be text, thinking, tool_use, tool_result, document or search_result"
        ),
    ),
]

Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Block], Tag("<blocks>")], Discriminator(kind_of_content)
]

Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Tag("<blocks>")],
    Discriminator(kind_of_content),
]


class MessageBody(Body):
    """One message. A user's may have the results of calls in it."""

    passes_nulls: ClassVar = True

    role: Literal["user", "assistant", "system"]
    content: Content | None = None


def texts_of(content: str | Sequence[TextBlock] | None, path: str) -> str:
    """A content of text alone, its blocks on lines of their own.

    Raises:
        InvalidRequest: there is none.
    """
    if content is None:
        raise InvalidRequest(f"you must provide {path}", param=path)
    return content if isinstance(content, str) else joined([block.text for block in content])


def joined(texts: Sequence[str | None]) -> str:
    """Texts on lines of their own, without those that are empty."""
    return "\n".join(text for text in texts if text)
