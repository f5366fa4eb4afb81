"""Opens the answer that a request asks for: sampled, the best of several, or searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from frontend.generation.answer import Answer, PromptProgress, SampledAnswer
from frontend.generation.beam_answer import BeamAnswer
from frontend.generation.completion import Completion
from frontend.generation.open_request import Wakeup
from frontend.generation.output_text import OutputText
from frontend.generation.prompts import PromptTokens
from frontend.generation.ranked_answer import RankedAnswer
from frontend.generation.request import GenerationRequest
from frontend.generation.submissions import Submissions, for_choice, to_submit
from frontend.served_model import ServedModel
from frontend.text.tokenizer import TextTokenizer
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2
from pagewire.wire.sampling_params import SamplingParams


def open_answer(
    request: GenerationRequest,
    prompts: Sequence[PromptTokens],
    submissions: Submissions,
    model: ServedModel,
    facts: scheduler_pb2.GetModelResponse,
) -> Answer:
    """Submits a request's parts. All of them are checked before the first is submitted.

    Args:
        request: what was asked for.
        prompts: its prompts' tokens.
        submissions: where to submit.
        model: its text.
        facts: about the model, from the scheduler.

    Raises:
        InvalidRequest: the request does not suit the model.
        Unavailable, Overloaded: see `SchedulerLinks.open`.
    """
    sampling = request.sampling
    tokenizer = model.tokenizer if request.new_parser is None else model.message_tokenizer
    resolved = [to_submit(sampling, prompt.token_ids, facts) for prompt in prompts]
    eos_token_ids = frozenset(facts.eos_token_ids)
    if sampling.beam_search is not None:
        return BeamAnswer(
            request,
            prompts,
            resolved,
            submissions=submissions,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
        )
    if sampling.best_of in (None, sampling.n):
        return _sample(request, sampling, prompts, resolved, submissions, tokenizer, eos_token_ids)
    logprobs = sampling.logprobs or 0
    every = replace(sampling, n=sampling.best_of, best_of=None, logprobs=logprobs)
    for message in resolved:
        message.logprobs = logprobs
    sampled = _sample(request, every, prompts, resolved, submissions, tokenizer, eos_token_ids)
    return RankedAnswer(sampled, best_of=every.n, n=sampling.n, with_logprobs=sampling.logprobs is not None)


def _sample(
    request: GenerationRequest,
    sampling: SamplingParams,
    prompts: Sequence[PromptTokens],
    resolved: Sequence[inference_pb2.SamplingParams],
    submissions: Submissions,
    tokenizer: TextTokenizer,
    eos_token_ids: frozenset[int],
) -> SampledAnswer:
    """Submits `n` completions of each prompt."""
    wakeup = Wakeup()
    completions: list[Completion] = []
    progress: list[PromptProgress] = []
    for number, (prompt, message) in enumerate(zip(prompts, resolved, strict=True)):
        opened = [
            submissions.open(prompt.token_ids, for_choice(message, choice), wakeup)
            for choice in range(sampling.n)
        ]
        progress.append(
            PromptProgress(
                number,
                prompt,
                lead=opened[0],
                wants_logprobs=sampling.prompt_logprobs is not None,
                told=not request.wants_prompts,
            )
        )
        completions += [
            Completion(
                each,
                index=number * sampling.n + choice,
                sampling=sampling,
                text=OutputText(tokenizer, sampling),
                eos_token_ids=eos_token_ids,
                close=submissions.close,
                parser=None if request.new_parser is None else request.new_parser(),
            )
            for choice, each in enumerate(opened)
        ]
    return SampledAnswer(request.request_id, completions=completions, prompts=progress, wakeup=wakeup)
