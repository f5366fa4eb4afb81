"""pagewire infer: a conversation, or a data set with results and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pagewire.base.errors import ConfigError
from pagewire.base.options import examples
from pagewire.batch.dataset import OPENING, Sample, read_result, read_sample
from pagewire.batch.lines import read_lines
from pagewire.batch.results import ResultFile
from pagewire.batch.running import answers
from pagewire.cli.arguments import (
    ApiKey,
    MaxTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    Url,
    connected,
    sampling_params,
    with_engine_options,
)
from pagewire.cli.chat import chat
from pagewire.cli.file_run import FileRun, Report
from pagewire.hub.names.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    pass


class Metric(StrEnum):
    """What `--metric` takes."""

    ACC = "acc"
    ROUGE = "rouge"
    PPL = "ppl"


EXAMPLES = examples(
    "pagewire infer smollm2-135m    # a conversation",
    "pagewire infer smollm2-135m --dataset in.jsonl --result-path out.jsonl --metric acc",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("infer", epilog=EXAMPLES)(with_engine_options(infer))


def infer(
    model: Model = DEFAULT_MODEL,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="IN.jsonl",
            exists=True,
            dir_okay=False,
            help='Requests, one a line: {"query": ..., "history": [[query, response], ...], "system": ..., '
            '"response": ...} or {"messages": [...]}. Without it, a conversation begins.',
        ),
    ] = None,
    result_path: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.jsonl", dir_okay=False, help="Where responses go, in the data set's order."
        ),
    ] = None,
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="Compare responses with the data set's: acc, the share that are equal, or rouge. ppl "
            "generates nothing: it is the model's perplexity on the data set's responses, or texts."
        ),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told first, where a line does not say.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    concurrency: Annotated[int, typer.Option(min=1, help="The most requests that are open at a time.")] = 64,
    **values: Any,
) -> None:
    """Talk to a model, or run it over a data set.

    A data set that was ended early, by Ctrl-C or kill -9, goes on when the same command is run again.

    Status 0: every line has a response. 1: some lines have errors. 75: it ended before every line had one.
    """
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    if dataset is None:
        if result_path is not None or metric is not None:
            raise ConfigError("--result-path and --metric are for a data set: give --dataset IN.jsonl, too")
        chat(model=model, url=url, api_key=api_key, system=system, **sampling, **values)
        return
    if result_path is None:
        raise ConfigError("--dataset needs a place for its results: give --result-path OUT.jsonl, too")
    if result_path.exists() and result_path.samefile(dataset):
        raise ConfigError(f"{result_path} is the data set; name another file for the results")
    run = _Run(
        dataset=dataset,
        metric=metric,
        system=system,
        sampling=sampling_params(**sampling),
        concurrency=concurrency,
    )
    with ResultFile(result_path, OPENING) as file:
        run.compare(file)
        if run.num_left:
            with connected(model, url, api_key, values) as (client, name):
                run.run(partial(run.answer_rest, file, client.url, api_key, name))
        print(run.summary(f"in {result_path}"), flush=True)
        if metric is not None and not run.num_left:
            print(_measured(metric, file), flush=True)
    raise typer.Exit(run.exit_status)


@dataclass(slots=True, kw_only=True)
class _Run(FileRun):
    """A data set under way, and how it is asked."""

    dataset: Path
    metric: Metric | None
    system: str | None
    sampling: dict[str, Any]
    concurrency: int

    def samples(self) -> Iterator[Sample]:
        """The lines of the data set."""
        for line in read_lines(self.dataset):
            yield read_sample(line, self.system)

    def compare(self, file: ResultFile) -> None:
        """Finds out what there is to do.

        Raises:
            ConfigError: the results are of something else, or the data set has nothing for the metric.
        """
        results = file.lines()
        num_labelled = 0
        for sample in self.samples():
            self.total += 1
            num_labelled += sample.labels is not None or sample.text is not None
            content = next(results, None)
            if content is None:
                continue
            result = read_result(content, self.total)
            self.num_done += 1
            self.num_failed += "error" in result
            is_scored = "error" in result or "logprob" in result
            if not sample.has_result(result) or (self.metric is Metric.PPL and not is_scored):
                raise ConfigError(
                    f"line {self.total} of the results is not of line {sample.line.number} of {self.dataset} "
                    "with these options; give those of the run before, or name another file for the results"
                )
        self.num_before = self.num_done
        if next(results, None) is not None:
            raise ConfigError(
                f"there are more results than lines in {self.dataset}; name another file for the results"
            )
        if not self.total:
            raise ConfigError(f'{self.dataset} is empty; it must have lines such as {{"query": "Hello"}}')
        if self.metric is not None and not num_labelled:
            raise ConfigError(
                f"--metric {self.metric} needs answers to compare with, and no line of {self.dataset} has a "
                '"response", or messages that end with the assistant\'s'
            )

    async def answer_rest(
        self, file: ResultFile, address: str, api_key: str | None, name: str, report: Report
    ) -> None:
        """Answers the lines that have no result.

        Raises:
            ConfigError: the results cannot be written.
        """
        from pagewire.batch.asking import Asker
        from pagewire.client import AsyncClient

        async with AsyncClient(address, api_key, max_retries=4) as client:
            asker = Asker(client, name, self.sampling)
            ask = asker.score if self.metric is Metric.PPL else asker.respond
            rest = islice(self.samples(), self.num_done, None)
            async with aclosing(answers(rest, ask, concurrency=self.concurrency, in_order=True)) as come:
                async for together in come:
                    await asyncio.to_thread(file.append, [each.line for each in together])
                    for each in together:
                        self.add(1, each.failed, each.num_tokens)
                    report(self.num_done, self.num_failed)


def _measured(metric: Metric, file: ResultFile) -> str:
    """A metric of all results, as one line."""
    from pagewire.batch import metrics

    measure = {Metric.ACC: metrics.accuracy, Metric.ROUGE: metrics.rouge, Metric.PPL: metrics.perplexity}
    results = [read_result(line, number) for number, line in enumerate(file.lines(), 1)]
    used = [
        each
        for each in results
        if "error" not in each and (metric is Metric.PPL or each["labels"] is not None)
    ]
    if not used:
        return f"{metric}: no line has a response to compare"
    found = ", ".join(f"{name} {value:.4f}" for name, value in measure[metric](used).items())
    return f"{found} over {len(used):,} lines"
