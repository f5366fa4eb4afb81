"""What `LLM.stream` and a streamed `LLM.infer` yield."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from pagewire.offline.jobs import Job
from pagewire.offline.outputs import StreamOutput
from pagewire.wire.query_history import QueryRequest, QueryResponse, to_answer
from scheduler.step import StepOutput


class Follower:
    """Finds what each step has added to jobs."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._places = {id(job): place for place, job in enumerate(jobs)}

    def news(self, step: StepOutput) -> list[StreamOutput]:
        """What a step, which the jobs have taken already, has added to them."""
        jobs = {id(request.owner): request.owner for request in (*step.requests, *step.ended)}
        news = []
        for key, job in jobs.items():
            place = self._places.get(key)
            if place is not None:  # not of requests that were aborted before
                assert isinstance(job, Job)
                news += [StreamOutput(place, *piece) for piece in job.pieces()]
        return news


def cumulative(
    requests: Sequence[QueryRequest], steps: Generator[list[StreamOutput], None, None]
) -> Generator[list[QueryResponse], None, None]:
    """All answers as far as they have come, after each step that added something. Of several completions of a
    request, the first is its answer."""
    responses = [""] * len(requests)
    with closing(steps):
        for news in steps:
            for piece in news:
                if piece.index == 0:
                    responses[piece.prompt_index] += piece.text
            if news:
                yield [to_answer(*each) for each in zip(requests, responses, strict=True)]
