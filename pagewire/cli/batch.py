"""pagewire batch: a file of requests in OpenAI's batch format."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pagewire.base.errors import ConfigError
from pagewire.base.options import examples
from pagewire.batch.lines import read_lines
from pagewire.batch.openai_lines import OPENING, BatchReader, BatchRequest, answered, id_of, refused
from pagewire.batch.results import ResultFile
from pagewire.batch.running import answers
from pagewire.cli.arguments import OWN_SERVER, refuse_engine_options, with_engine_options
from pagewire.cli.file_run import FileRun, Report
from pagewire.hub.names.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from pagewire.batch.sending import Sender

HTTP_URL_HELP = "Address of a running server, such as http://localhost:8000; without it one is started."
Concurrency = Annotated[int, typer.Option(min=1, help="The most requests that are open at a time.")]


EXAMPLES = examples(
    "pagewire batch in.jsonl out.jsonl --model smollm2-135m",
    "pagewire batch in.jsonl out.jsonl --url http://localhost:8000",
)


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("batch", epilog=EXAMPLES)(with_engine_options(batch))


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl",
            exists=True,
            dir_okay=False,
            help='Requests, one a line: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", '
            '"body": {...}}.',
        ),
    ],
    results: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.jsonl", dir_okay=False, help="Answers, one a line, in the order they come."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model to start: a directory, a .gguf file, owner/name on a hub or an alias; with "
            f"--url, what bodies that name no model ask for.  [default: {DEFAULT_MODEL}]"
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What the bodies call the model, if it is not its own name. May be repeated."),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="How embeddings are made, if not as the model was made for: last, mean or cls."),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", metavar="http://HOST:PORT", help=HTTP_URL_HELP)] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PAGEWIRE_API_KEY", help="Key for the server at --url.", show_envvar=True),
    ] = None,
    concurrency: Concurrency = 64,
    retry_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="How long a request is sent again to a server that is full or away, before all ends."
        ),
    ] = 120.0,
    **values: Any,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    What was ended early, by Ctrl-C or kill -9, goes on when the same command is run again: lines that have an
    answer in OUT.jsonl are not asked again.

    Status 0: every line was answered. 1: some lines have errors. 75: it ended before every line was answered.
    """
    if results.exists() and results.samefile(source):
        raise ConfigError(f"{results} is the input; name another file for the answers")
    with ResultFile(results, OPENING) as file:
        work = _Work.find(source, file)
        if work.num_left:
            own = {"served_model_names": tuple(served_model_name or ()), "pooling": pooling}
            with _server(model, url, own, values) as (base_url, name):
                _run(work, file, BatchReader(name), base_url, api_key, concurrency, retry_seconds)
    print(work.summary(f"answered in {results}"), flush=True)
    raise typer.Exit(work.exit_status)


@dataclass(slots=True, kw_only=True)
class _Work(FileRun):
    """What there is to do, and what has come of it.

    Attributes:
        source: the input.
        done: ids of the lines that have an answer.
    """

    source: Path
    done: set[str]

    @classmethod
    def find(cls, source: Path, file: ResultFile) -> _Work:
        """Compares the input with the results that are there.

        Raises:
            ConfigError: they are those of another input.
        """
        asked = {BatchRequest(line, "").id for line in read_lines(source)}
        if not asked:
            raise ConfigError(
                f'{source} is empty; it must have lines such as {{"custom_id": "a", "method": "POST", '
                '"url": "/v1/chat/completions", "body": {"messages": [...]}}'
            )
        done, num_failed = set(), 0
        for line in file.lines():
            done.add(id_of(line))
            num_failed += _failed(line)
        if strange := len(done - asked):
            raise ConfigError(
                f"the results have {strange} answers to lines that {source} does not have, or has elsewhere; "
                "give the input that they are of, or name another file for the answers"
            )
        return cls(
            source=source,
            done=done,
            total=len(asked),
            num_done=len(done),
            num_before=len(done),
            num_failed=num_failed,
        )

    def requests(self, reader: BatchReader) -> Iterator[BatchRequest]:
        """Those to be answered. Every line is read, as names are compared with all those before."""
        for line in read_lines(self.source):
            request = reader.read(line)
            if request.id not in self.done:
                yield request


def _run(
    work: _Work,
    file: ResultFile,
    reader: BatchReader,
    base_url: str,
    api_key: str | None,
    concurrency: int,
    patience: float,
) -> None:
    from pagewire.batch.sending import Sender

    sender = Sender(base_url, api_key, concurrency=concurrency, patience=patience)
    work.run(lambda report: _answer_all(work, file, reader, sender, concurrency, report))


async def _answer_all(
    work: _Work,
    file: ResultFile,
    reader: BatchReader,
    sender: Sender,
    concurrency: int,
    report: Report,
) -> None:
    async def answer(request: BatchRequest) -> tuple[str, bytes, int, bool]:
        if request.error is not None or request.body is None:
            return request.id, refused(request), 0, True
        got = await sender.send(request.url, request.body)
        line = answered(request, got.status, got.request_id, got.body)
        return request.id, line, _num_tokens(got.body), got.status != 200

    come = answers(work.requests(reader), answer, concurrency=concurrency)
    async with sender, aclosing(come):
        await sender.find()
        async for together in come:
            await asyncio.to_thread(file.append, [line for _, line, _, _ in together])
            for id_, _, num_tokens, failed in together:
                work.done.add(id_)
                work.add(1, failed, num_tokens)
            report(work.num_done, work.num_failed)


def _failed(output_line: bytes) -> bool:
    """Whether a line of results is about an error."""
    return b'"response": {"status_code": 200,' not in output_line


def _num_tokens(body: Any) -> int:
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return 0
    return int(usage.get("completion_tokens") or usage.get("output_tokens") or 0)


@contextmanager
def _server(
    model: str | None, url: str | None, own: dict[str, Any], values: dict[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """The address of the server at `url`, or of one started here, and what bodies without a model ask for.

    Args:
        own: settings of a frontend that is started here.
        values: those of an engine.
    """
    given = {name: value for name, value in own.items() if value}
    if url is not None:
        refuse_engine_options(values)
        if given:
            raise ConfigError(
                "--served-model-name and --pooling concern a server started here; the one at --url has its"
                " own"
            )
        yield _base_url(url), model
        return

    import sys

    from pagewire.cli.background import background_service
    from pagewire.cli.service import ServiceConfig

    model = model or DEFAULT_MODEL
    config = ServiceConfig.resolve(model, {**values, **OWN_SERVER, **given})
    print(f"starting {model} ...", file=sys.stderr, flush=True)
    with background_service(config) as service:
        yield f"http://{service.http_address}", service.model


def _base_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"url is {url!r}; a batch is sent over HTTP: give an address such as http://localhost:8000",
            param="url",
        )
    return url.rstrip("/").removesuffix("/v1")
