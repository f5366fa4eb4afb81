"""How one model's replies are written: its calls and its thoughts.

It is decided once, by the operator or the model's chat template, and applied to every conversation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from frontend.chat.conversation import Conversation
from frontend.chat.grammar import Marks, behind_thoughts, constrained, without_thoughts
from frontend.chat.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningSplitter, Thoughts
from frontend.chat.reply import ReplyParser
from frontend.chat.settings import ChatSettings
from frontend.chat.tool_parsers.forced import FramedParser, NamedCallParser, RequiredCallsParser
from frontend.chat.tool_parsers.protocol import ToolParser
from frontend.chat.tool_parsers.registry import find_tool_parser
from frontend.chat.tools import forced_calls
from frontend.generation.message_parser import NewParser
from pagewire.base.errors import ConfigError, InvalidRequest, Unsupported
from pagewire.wire.sampling_params import SamplingParams, StructuredOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """How a request's completions are to be generated and read.

    Attributes:
        sampling: the request's, with what its tools add to it.
        new_parser: makes what reads a completion; None if its text is its content.
    """

    sampling: SamplingParams
    new_parser: NewParser | None = None


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """Immutable; shared by all requests.

    Attributes:
        tools: reads calls; None if it is not known how this model writes them.
        reasoning: how it marks its thoughts, if it has any.
        special_ids: the tokenizer's special tokens, by text.
    """

    tools: type[ToolParser] | None = None
    reasoning: ReasoningFormat | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def choose(
        cls,
        template: str,
        special_ids: Mapping[str, int],
        settings: ChatSettings,
    ) -> ReplyFormat:
        """The format that the operator named or, with "auto", the template speaks of.

        Args:
            template: the source of the model's chat template.

        Raises:
            ConfigError: there is no parser of a name, or a plugin cannot be loaded.
        """
        return cls(
            find_tool_parser(settings.tool_call_parser, template, settings.tool_parser_plugin),
            _reasoning(settings.reasoning_parser, template),
            special_ids,
        )

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that parsers must see, even where they are special tokens."""
        thoughts = () if self.reasoning is None else (self.reasoning.opening, self.reasoning.closing)
        return thoughts if self.tools is None else (*thoughts, *self.tools.markers)

    def read(self, conversation: Conversation, prompt_end: str, sampling: SamplingParams) -> Reading:
        """What a conversation's tools and the model's thoughts mean for its completions.

        Args:
            prompt_end: the end of the rendered prompt; the assistant's turn, if it is begun, must be in it.

        Raises:
            InvalidRequest: the tools and the constraint asked for cannot both be had.
            Unsupported: the model's format cannot do what the tools need.
        """
        calling = bool(conversation.tools) and conversation.tool_choice.kind != "none"
        thoughts = self._thoughts(conversation, prompt_end)
        if calling:
            self._check_calling(conversation, sampling)
        try:
            constraint = self._constraint(conversation, sampling, calling, thoughts)
        except RecursionError as error:
            raise InvalidRequest("a tool's parameters are nested too deeply", param="tools") from error
        if calling and self.tools is not None and not conversation.tool_choice.forced:
            sampling = replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *self.tools.stops))))
        return Reading(
            sampling if constraint is None else replace(sampling, structured_output=constraint),
            self._parser_factory(conversation, calling, thoughts),
        )

    @property
    def is_generic(self) -> bool:
        """Whether the model must be told in the prompt how to call tools."""
        return self.tools is not None and self.tools.is_generic

    def may_hold(self, conversation: Conversation) -> bool:
        """Whether a conversation's tools may hold its reply to a form."""
        if not conversation.tools or conversation.tool_choice.kind == "none":
            return False
        any_strict = any(tool.strict for tool in conversation.tools)
        return conversation.tool_choice.forced or any_strict or self.is_generic

    def _check_calling(self, conversation: Conversation, sampling: SamplingParams) -> None:
        choice = conversation.tool_choice
        if choice.forced and sampling.structured_output is not None:
            raise InvalidRequest(
                f"tool_choice is {choice.kind}, which decides what the answer looks like; it cannot be "
                "combined with response_format or other structured output",
                param="tool_choice",
            )
        if choice.forced or self.tools is not None:
            return
        raise Unsupported(
            "tools with tool_choice auto need to know how this model writes its calls, but this server was "
            "started with --tool-call-parser none; set tool_choice to none, required or a function",
            param="tool_choice",
        )

    def _parser_factory(
        self, conversation: Conversation, calling: bool, thoughts: Thoughts
    ) -> NewParser | None:
        reads_all = self.tools is not None and self.tools.reads_all
        if not calling and not reads_all and self.reasoning is None:
            return None

        def new_parser() -> ReplyParser:
            return ReplyParser(
                reasoning=None if self.reasoning is None else ReasoningSplitter(self.reasoning, thoughts),
                tools=self._tool_parser(conversation, calling) if calling or reads_all else None,
                parallel=conversation.parallel_tool_calls,
                include_reasoning=conversation.include_reasoning,
            )

        return new_parser

    def _tool_parser(self, conversation: Conversation, calling: bool) -> ToolParser:
        choice = conversation.tool_choice
        if not calling or not choice.forced:
            assert self.tools is not None
            return self.tools([tool.name for tool in conversation.tools] if calling else [])
        forced = NamedCallParser(choice.name) if choice.kind == "named" else RequiredCallsParser()
        if self.tools is None or not self.tools.reads_all:
            return forced
        return FramedParser(self.tools(()), forced)

    def _constraint(
        self,
        conversation: Conversation,
        sampling: SamplingParams,
        calling: bool,
        thoughts: Thoughts,
    ) -> StructuredOutput | None:
        """What the whole reply must look like, thoughts included; None for anything."""
        choice, tools = conversation.tool_choice, conversation.tools
        answer = sampling.structured_output
        if calling and choice.forced:
            answer = forced_calls(tools, choice, parallel=conversation.parallel_tool_calls)
        elif calling and (
            answer is not None
            or any(tool.strict for tool in tools)
            or (self.is_generic and sampling.takes_constraint)
        ):
            reply, rules = self._answer_or_calls(conversation, answer)
            return self._whole(reply, rules, thoughts)
        if answer is None:
            return None
        frame, rules = self._frame()
        if frame:
            return self._whole(f"{frame} ({constrained(answer)})", rules, thoughts)
        if self.reasoning is None or thoughts is Thoughts.OVER:
            return answer
        if answer.grammar is not None and thoughts is Thoughts.AHEAD:
            return answer  # the model answers at once
        return self._whole(constrained(answer), "", thoughts)

    def _answer_or_calls(
        self, conversation: Conversation, answer: StructuredOutput | None
    ) -> tuple[str, str]:
        """A rule's right side, and the rules that it uses: an answer, constrained or not, or calls."""
        assert self.tools is not None
        marks = Marks(self.special_ids)
        rules = self.tools.grammar(
            conversation.tools,
            marks,
            parallel=conversation.parallel_tool_calls,
            alone=answer is not None,
        )
        if rules is None:
            raise Unsupported(
                f"calls as this model writes them ({self.tools.name}) cannot be held to a schema unless "
                "tool_choice is required or a function; leave out strict and response_format",
                param="tools",
            )
        if answer is None:
            return "text | calls", rules
        return f"{self._frame()[0]} ({constrained(answer)}) | calls", rules

    def _frame(self) -> tuple[str, str]:
        """See `ToolParser.frame`."""
        return ("", "") if self.tools is None else self.tools.frame(Marks(self.special_ids))

    def _whole(self, reply: str, rules: str, thoughts: Thoughts) -> StructuredOutput:
        if self.reasoning is None or thoughts is Thoughts.OVER:
            return StructuredOutput(grammar=without_thoughts(reply, rules))
        marks = Marks(self.special_ids)
        return StructuredOutput(grammar=behind_thoughts(reply, rules, self.reasoning, marks, thoughts))

    def _thoughts(self, conversation: Conversation, prompt_end: str) -> Thoughts:
        if self.reasoning is None:
            return Thoughts.OVER
        continued = None
        if conversation.continue_final_message:
            content = conversation.messages[-1]["content"]
            continued = content if isinstance(content, str) else content[-1]["text"]
        return self.reasoning.at_begin(prompt_end, continued)


def _reasoning(name: str, template: str) -> ReasoningFormat | None:
    if name == "none":
        return None
    if name != "auto":
        if name not in REASONING_FORMATS:
            raise ConfigError(
                f"reasoning_parser is {name!r}; it must be auto, none, {', '.join(REASONING_FORMATS)}"
            )
        return REASONING_FORMATS[name]
    found = next((each for each, form in REASONING_FORMATS.items() if form.closing in template), None)
    if found is None:
        return None
    logger.info("thoughts are read as %s", found)
    return REASONING_FORMATS[found]
