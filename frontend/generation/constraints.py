"""What the answers to a request are held to: made of what it asks for and of its tools, and tried."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from frontend.chat.reply_reading import to_be_read
from frontend.chat.settings import ConstraintSettings
from frontend.chat.tools import ANY_ARGUMENTS, Tool
from frontend.generation.prompts import PromptTokens
from frontend.generation.request import Conversation, GenerationRequest
from frontend.served_model import ServedModel
from pagewire.base.errors import InvalidRequest, Overloaded
from pagewire.structured.checker import ConstraintChecker
from pagewire.structured.closing import with_closed_objects
from pagewire.structured.relaxing import relaxed
from pagewire.wire.sampling_params import StructuredOutput

logger = logging.getLogger(__name__)

MAX_CHECKING = 64
"""Constraints being checked or waiting for it; beyond it new requests with one are refused."""

_FAULTS_SECONDS = 5.0
"""How long the tools at fault are looked for, one by one; those not tried by then count as at fault."""

_MAX_LINE = 2048
"""Characters. Clients and proxies take no headers of more than 4 or 8 KiB in all."""


class Constraints:
    """Owns the thread and the process in which constraints are made and tried. They have a thread of their
    own: one that takes long makes no prompt wait."""

    def __init__(self, settings: ConstraintSettings) -> None:
        self._settings = settings
        self._checker = ConstraintChecker()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._num_checking = 0

    def close(self) -> None:
        """Lets the thread and the process end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._checker.close()

    async def apply(
        self, model: ServedModel, request: GenerationRequest, prompts: Sequence[PromptTokens]
    ) -> GenerationRequest:
        """The request with what its answers are held to, and with what reads them. A constraint that cannot
        be compiled is refused before the scheduler hears of it.

        Raises:
            InvalidRequest: the constraint, or a tool's schema, is wrong, not supported, or too much.
            Unsupported: see `ReplyFormat.read`.
            Overloaded: too many wait to be checked.
        """
        [conversation, *_] = request.prompts
        holds = isinstance(conversation, Conversation) and model.replies.may_hold(conversation)
        if request.sampling.structured_output is None and not holds:
            return to_be_read(model, request, prompts)
        if self._num_checking >= MAX_CHECKING:
            raise Overloaded(f"{MAX_CHECKING} constraints wait to be checked; try again later")
        self._num_checking += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._apply, model, request, prompts)
        finally:
            self._num_checking -= 1

    def _apply(
        self, model: ServedModel, request: GenerationRequest, prompts: Sequence[PromptTokens]
    ) -> GenerationRequest:
        request = self._with_what_was_asked(request)
        conversation = request.prompts[0]
        if not (isinstance(conversation, Conversation) and model.replies.may_hold(conversation)):
            return self._read(model, request, prompts)
        tools = conversation.tools
        if not self._settings.open_schemas:
            tools = [tool.closed() for tool in tools]
        request = _with_tools(request, tools)
        try:
            return self._read(model, request, prompts)
        except _ToolsAtFault as error:
            whole = error.fault
        held = _held(replace(conversation, tools=tools))
        faults = self._faults(held)
        if self._settings.relax_tool_schemas:
            return self._relaxed(model, request, prompts, [tool.name for tool in held], faults)
        for name, fault in faults.items():
            raise InvalidRequest(f"tool {name!r} cannot be enforced: {fault}", param="tools")
        raise InvalidRequest(f"the tools cannot be enforced together: {whole}", param="tools")

    def _with_what_was_asked(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the constraint that it asks for by itself, which was tried.

        Raises:
            InvalidRequest: it is wrong, not supported, or too much.
        """
        asked = request.sampling.structured_output
        dropped: Sequence[str] = ()
        if asked is None:
            return request
        if not self._settings.open_schemas:
            asked = with_closed_objects(asked)
        if self._settings.relax_schemas and not request.strict_schema and asked.json_schema is not None:
            asked, dropped = relaxed(asked, self._checker.check)
            _log(request, dropped, "keywords of its schema")
        else:
            self._checker.check(asked)
        sampling = replace(request.sampling, structured_output=asked)
        return replace(
            request, sampling=sampling, relaxed=tuple(f"response_format.{keyword}" for keyword in dropped)
        )

    def _read(
        self, model: ServedModel, request: GenerationRequest, prompts: Sequence[PromptTokens]
    ) -> GenerationRequest:
        """The request with what its tools and the model's thoughts add to it, which was tried.

        Raises:
            _ToolsAtFault: a constraint that was made of the tools, and of nothing that was not tried, is.
            InvalidRequest, Unsupported: see `ReplyFormat.read`.
        """
        asked = request.sampling.structured_output
        try:
            read = to_be_read(model, request, prompts)
        except InvalidRequest as error:
            if asked is None and error.param == "structured_output":
                raise _ToolsAtFault(error) from error
            raise
        constraint = read.sampling.structured_output
        if constraint is not None and constraint != asked:
            try:
                self._checker.check(constraint)
            except InvalidRequest as error:
                raise _ToolsAtFault(error) from error
        return read

    def _faults(self, tools: Sequence[Tool]) -> Mapping[str, str]:
        """What is wrong with the schema of each tool that is at fault by itself, by its name; of the first
        alone if none is to be relaxed."""
        faults: dict[str, str] = {}
        until = time.monotonic() + _FAULTS_SECONDS
        for tool in tools:
            if time.monotonic() > until:
                faults[tool.name] = "the tools before it took too long to compile"
                continue
            try:
                self._checker.check(StructuredOutput(json_schema=json.dumps(tool.schema, ensure_ascii=False)))
            except InvalidRequest as error:
                faults[tool.name] = _bare(error.message)
                if not self._settings.relax_tool_schemas:
                    break
        return faults

    def _relaxed(
        self,
        model: ServedModel,
        request: GenerationRequest,
        prompts: Sequence[PromptTokens],
        held: Sequence[str],
        faults: Collection[str],
    ) -> GenerationRequest:
        """The request with any arguments for the tools at fault or, if that is not enough, for all.

        Args:
            held: the tools whose schemas hold the reply.
        """
        [conversation] = request.prompts
        assert isinstance(conversation, Conversation)
        for names in (faults, held) if faults else (held,):
            tools = [
                replace(tool, held_to=ANY_ARGUMENTS) if tool.name in names else tool
                for tool in conversation.tools
            ]
            try:
                read = self._read(model, _with_tools(request, tools), prompts)
            except _ToolsAtFault as error:
                fault = error.fault
            else:
                _log(request, names, "arguments of tools")
                return replace(read, relaxed=(*request.relaxed, *(f"tools.{name}" for name in names)))
        raise InvalidRequest(f"the tools cannot be enforced: {fault}", param="tools")


class _ToolsAtFault(Exception):
    """A constraint that was made of tools cannot be compiled."""

    def __init__(self, error: InvalidRequest) -> None:
        super().__init__(error.message)
        self.fault = _bare(error.message)


def _held(conversation: Conversation) -> list[Tool]:
    """The tools whose schemas hold the reply."""
    choice = conversation.tool_choice
    if choice.kind == "named":
        return [tool for tool in conversation.tools if tool.name == choice.name]
    return [tool for tool in conversation.tools if choice.forced or tool.strict]


def _with_tools(request: GenerationRequest, tools: Sequence[Tool]) -> GenerationRequest:
    [conversation] = request.prompts
    assert isinstance(conversation, Conversation)
    return replace(request, prompts=[replace(conversation, tools=tools)])


def _bare(message: str) -> str:
    """A complaint without what it says of a constraint that the client did not write."""
    for made_here in ("the JSON schema: ", "the grammar: "):
        message = message.removeprefix(made_here)
    _, found, rest = message.partition("failed to compile JSON schema: ")
    return rest if found else message


def _log(request: GenerationRequest, names: Collection[str], what: str) -> None:
    if names:
        logger.warning("request %s: %s that are not enforced: %s", request.request_id, what, in_a_line(names))


def in_a_line(names: Collection[str]) -> str:
    """What is not enforced, for a header or the log: "..." stands for what is too much."""
    told = ", ".join(names)
    return told if len(told) <= _MAX_LINE else f"{told[:_MAX_LINE].rpartition(', ')[0]}, ..."
