"""Opens the answer that a request asks for: sampled, the best of several, or searched for."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.answer import Answer, PromptProgress, SampledAnswer
from frontend.completion import Completion
from frontend.generation_request import GenerationRequest
from frontend.open_request import Wakeup
from frontend.output_text import OutputText
from frontend.prompts import PromptTokens
from frontend.served_model import ServedModel
from frontend.submissions import Submissions, for_choice, to_submit
from pagewire.errors import Unsupported
from pagewire.scheduler.v1 import scheduler_pb2


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
        Unavailable, Overloaded: see `SchedulerLink.open`.
    """
    sampling = request.sampling
    for name in ("best_of", "beam_search"):
        if getattr(sampling, name) is not None:
            raise Unsupported(f"{name} is not supported by this server yet", param=name)
    resolved = [to_submit(sampling, prompt.token_ids, facts) for prompt in prompts]
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
                text=OutputText(model.tokenizer, sampling),
                eos_token_ids=frozenset(facts.eos_token_ids),
                close=submissions.close,
                parser=None if request.new_parser is None else request.new_parser(),
            )
            for choice, each in enumerate(opened)
        ]
    return SampledAnswer(request.request_id, completions=completions, prompts=progress, wakeup=wakeup)
