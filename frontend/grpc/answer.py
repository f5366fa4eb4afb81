"""Answers as messages of the public gRPC API."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.generation.answer import Answer, WholeAnswer, WholeChoice
from frontend.generation.events import (
    Delta,
    Event,
    Finished,
    FinishReason,
    PositionLogprobs,
    PromptRead,
    Usage,
)
from frontend.generation.message_parser import ToolCallDelta
from frontend.text.tokenizer import TextTokenizer
from pagewire.inference.v1 import inference_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


class AnswerMessages:
    """Renders one answer. A request has one prompt, so that `index` counts its completions."""

    def __init__(self, tokenizer: TextTokenizer, answer: Answer, request: pb.GenerateRequest) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._request = request
        self._several = request.sampling.n > 1
        # Used again for every delta that has only text, as nearly all have: a fifth of what making one costs.
        self._plain = pb.GenerateResponse(request_id=answer.request_id)
        self._plain_delta = self._plain.delta
        self._plain_usage = self._plain_delta.usage

    def responses(self, events: Sequence[Event]) -> list[pb.GenerateResponse]:
        """The messages for events that came together, to be written before the next ones are asked for.
        `finished` tells the end of a single completion."""
        if len(events) == 1:
            event = events[0]
            if isinstance(event, Delta) and not (event.logprobs or event.reasoning or event.tool_calls):
                return [self._text_delta(event)]
        return [self._response(event) for event in events if self._several or not isinstance(event, Finished)]

    def finished(self) -> pb.GenerateResponse:
        """The terminal message."""
        assert self._answer.finished is not None
        return pb.GenerateResponse(
            request_id=self._answer.request_id,
            finished=_finished(self._answer.finished, self._answer.usage),
        )

    def whole(self, whole: WholeAnswer) -> pb.GenerateOnceResponse:
        """Everything in one message."""
        first = whole.choices[0]
        ranked = first.finished.score is not None
        more_than_text = self._several or ranked or first.reasoning or first.tool_calls
        return pb.GenerateOnceResponse(
            request_id=self._answer.request_id,
            token_ids=first.token_ids,
            text=first.text,
            logprobs=self._logprobs(first.logprobs),
            finished=_finished(first.finished, whole.usage),
            choices=[self._choice(choice) for choice in whole.choices] if more_than_text else (),
            prompt=self._prompt(whole.prompts[0]) if whole.prompts else None,
        )

    def _response(self, event: Event) -> pb.GenerateResponse:
        response = pb.GenerateResponse(request_id=self._answer.request_id)
        if isinstance(event, Delta):
            response.delta.CopyFrom(self._delta(event))
        elif isinstance(event, Finished):
            response.choice_finished.CopyFrom(_choice_finished(event))
        else:
            response.prompt.CopyFrom(self._prompt(event))
        return response

    def _text_delta(self, event: Delta) -> pb.GenerateResponse:
        delta, usage = self._plain_delta, self._plain_usage
        delta.token_ids[:] = event.token_ids
        delta.text = event.text
        delta.index = event.index
        usage.prompt_tokens = event.usage.prompt_tokens
        usage.cached_tokens = event.usage.cached_tokens
        usage.completion_tokens = event.usage.completion_tokens
        return self._plain

    def _delta(self, delta: Delta) -> pb.Delta:
        message = pb.Delta(
            token_ids=delta.token_ids,
            text=delta.text,
            logprobs=self._logprobs(delta.logprobs),
            usage=_usage(delta.usage),
            index=delta.index,
            reasoning=delta.reasoning,
        )
        for call in delta.tool_calls:
            message.tool_calls.add(
                index=call.index, id=call.id, name=call.name, arguments_json=call.arguments
            )
        return message

    def _choice(self, choice: WholeChoice) -> pb.Choice:
        return pb.Choice(
            index=choice.index,
            token_ids=choice.token_ids,
            text=choice.text,
            logprobs=self._logprobs(choice.logprobs),
            finished=_choice_finished(choice.finished),
            reasoning=choice.reasoning,
            tool_calls=[_call(call) for call in choice.tool_calls],
            score=choice.finished.score,
        )

    def _prompt(self, prompt: PromptRead) -> pb.PromptEcho:
        count = self._request.sampling.prompt_logprobs
        entries = [
            PositionLogprobs(each.token_id, each.logprob, each.top[:count]) for each in prompt.logprobs
        ]
        return pb.PromptEcho(token_ids=prompt.token_ids, text=prompt.text, logprobs=self._logprobs(entries))

    def _logprobs(self, entries: Sequence[PositionLogprobs]) -> list[pb.PositionLogprobs]:
        return [
            pb.PositionLogprobs(
                sampled=None if entry.logprob is None else self._token(entry.token_id, entry.logprob),
                top=[self._token(*candidate) for candidate in entry.top],
            )
            for entry in entries
        ]

    def _token(self, token_id: int, logprob: float) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            text=self._tokenizer.token_text(token_id),
            raw=self._tokenizer.token_bytes(token_id),
        )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _finished(finished: Finished, usage: Usage) -> pb.Finished:
    message = pb.Finished(finish_reason=_REASONS[finished.reason], usage=_usage(usage))
    if finished.stop_string is not None:
        message.stop_string = finished.stop_string
    elif finished.stop_token_id is not None:
        message.stop_token_id = finished.stop_token_id
    return message


def _choice_finished(finished: Finished) -> pb.ChoiceFinished:
    message = pb.ChoiceFinished(index=finished.index, finish_reason=_REASONS[finished.reason])
    if finished.stop_string is not None:
        message.stop_string = finished.stop_string
    elif finished.stop_token_id is not None:
        message.stop_token_id = finished.stop_token_id
    return message


def _call(call: ToolCallDelta) -> pb.ToolCall:
    return pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments)
