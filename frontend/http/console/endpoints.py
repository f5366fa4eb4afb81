"""The console's endpoints."""

from __future__ import annotations

from collections.abc import Mapping

from frontend.config import FrontendConfig
from frontend.generation.pipeline import GenerationPipeline
from frontend.http.console.pages import ConsolePages
from frontend.http.console.watch import EngineWatch
from frontend.http.endpoint import ERRORS_OF_QUESTIONS, Api, Endpoint, Handler
from frontend.metrics import FrontendMetrics

ASSETS = "/assets/"
"""What the paths of the pages' files begin with. They need no key, like the pages themselves."""

_ENDPOINTS = (
    Endpoint(
        name="console",
        method="GET",
        path="/",
        tag="Console",
        summary="Chat, in a browser",
        media_type="text/html",
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="enginePage",
        method="GET",
        path="/engine",
        tag="Console",
        summary="What the engine does, in a browser",
        media_type="text/html",
        errors=(400,),
        needs_key=False,
    ),
    Endpoint(
        name="engineEvents",
        method="GET",
        path="/engine/events",
        tag="Console",
        summary="What the engine does, as events",
        description="A stream that lasts until the client leaves. docs/console.md says what is in an event.",
        media_type="text/event-stream",
        errors=(*ERRORS_OF_QUESTIONS, 429),
    ),
    Endpoint(
        name="consoleFile",
        method="GET",
        path=ASSETS + "{file}",
        tag="Console",
        summary="A file of the pages",
        media_type="text/javascript",
        errors=(400, 404),
        needs_key=False,
    ),
)


def _handlers(
    config: FrontendConfig, pipeline: GenerationPipeline, metrics: FrontendMetrics
) -> Mapping[str, Handler]:
    pages = ConsolePages()
    return {
        "console": pages.chat,
        "enginePage": pages.engine,
        "consoleFile": pages.asset,
        "engineEvents": EngineWatch(pipeline, config.stall_timeout).events,
    }


CONSOLE = Api(_ENDPOINTS, _handlers)
