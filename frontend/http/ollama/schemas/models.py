"""POST /api/show and /api/pull."""

from __future__ import annotations

from typing import Any

from frontend.http.body import Body


class OllamaModelBody(Body):
    """A model, by its name; `name` is what older clients call the field."""

    model: str | None = None
    name: str | None = None

    @property
    def asked(self) -> str:
        """The name that was sent, if one was."""
        return self.model or self.name or ""


class OllamaShowBody(OllamaModelBody):
    """POST /api/show. The other fields are older clients', and change nothing."""

    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class OllamaPullBody(OllamaModelBody):
    """POST /api/pull. No registry is asked, so `insecure` changes nothing."""

    stream: bool | None = None
    insecure: bool | None = None
