"""`pagewire top`: from metrics to figures, and what it says when there are none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pagewire.base.errors import ConfigError, PagewireError, Unauthenticated, Unavailable
from pagewire.cli.scrape import Scraper, Snapshot, Window
from pagewire.cli.top import top

INFO = '{"served_model_names": ["tiny"], "engine": {"device": "cpu", "dtype": "float32"}}'


def metrics(*, tokens: int, observed: tuple[int, int, int], hits: int) -> str:
    counts = "".join(
        f'pagewire:time_to_first_token_seconds_bucket{{le="{bound}"}} {count}\n'
        for bound, count in zip(("0.1", "0.2", "+Inf"), observed, strict=True)
    )
    return f"""# TYPE pagewire:num_requests_running gauge
pagewire:num_requests_running 3
# TYPE pagewire:num_requests_waiting gauge
pagewire:num_requests_waiting 7
# TYPE pagewire:generation_tokens counter
pagewire:generation_tokens_total {tokens}
# TYPE pagewire:request_success counter
pagewire:request_success_total{{finished_reason="stop"}} 2
pagewire:request_success_total{{finished_reason="length"}} 1
# TYPE pagewire:kv_cache_used_blocks gauge
pagewire:kv_cache_used_blocks 25
# TYPE pagewire:kv_cache_blocks gauge
pagewire:kv_cache_blocks 100
# TYPE pagewire:prefix_cache_queries counter
pagewire:prefix_cache_queries_total {2 * hits}
# TYPE pagewire:prefix_cache_hits counter
pagewire:prefix_cache_hits_total {hits}
# TYPE pagewire:time_to_first_token_seconds histogram
{counts}pagewire:time_to_first_token_seconds_sum 1
# TYPE nv_inference_count counter
nv_inference_count 5
"""


def window(before: str, after: str, seconds: float = 2.0) -> Window:
    return Window(Snapshot.parse(before, 10.0), Snapshot.parse(after, 10.0 + seconds))


def test_rates_and_quantiles_are_those_of_the_time_between() -> None:
    between = window(
        metrics(tokens=100, observed=(50, 50, 50), hits=10),
        metrics(tokens=300, observed=(50, 60, 60), hits=20),
    )
    assert between.rate("generation_tokens_total") == 100.0
    assert between.now("request_success_total") == 3.0
    assert between.quantile("time_to_first_token_seconds", 0.5) == pytest.approx(0.15)
    assert between.quantile("inter_token_latency_seconds", 0.5) is None


def test_a_scheduler_that_was_started_again_counts_from_zero() -> None:
    between = window(
        metrics(tokens=100, observed=(50, 50, 50), hits=10), metrics(tokens=40, observed=(0, 10, 10), hits=1)
    )
    assert between.rate("generation_tokens_total") == 20.0
    assert between.quantile("time_to_first_token_seconds", 0.5) == pytest.approx(0.15)


def test_slow_ones_beyond_the_last_bound_are_at_least_that() -> None:
    between = window(
        metrics(tokens=0, observed=(0, 0, 0), hits=0), metrics(tokens=0, observed=(0, 0, 10), hits=0)
    )
    assert between.quantile("time_to_first_token_seconds", 0.99) == 0.2


def test_adapters_in_use_are_those_of_all_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    text = metrics(tokens=1, observed=(1, 1, 1), hits=1) + "".join(
        f'pagewire:lora_requests_info{{replica="{replica}",max_lora="4",running_lora_adapters="{running}",'
        f'waiting_lora_adapters="{waiting}"}} 1.7e9\n'
        for replica, running, waiting in ((0, "sql,chat", ""), (1, "sql,a,b", "chat,late"))
    )
    with answering({"/metrics": (200, text), "/server_info": (200, INFO)}) as url:
        top([url], None, 0.1, True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "adapters 4 (a, b, chat, ...) running, 1 (late) waiting" in shown
    assert Snapshot.parse(metrics(tokens=1, observed=(1, 1, 1), hits=1), 0.0).adapters is None


@contextmanager
def answering(pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = pages.get(self.path, (404, ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_once_prints_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = metrics(tokens=1, observed=(1, 1, 1), hits=1)
    with answering({"/metrics": (200, text), "/server_info": (200, INFO)}) as url:
        top([f"{url}/v1"], None, 0.1, True)
    shown = capsys.readouterr().out
    for expected in ("tiny", "cpu float32", "3 running, 7 waiting", "25 of 100 used", "50 % since the start"):
        assert expected in shown


def test_a_service_without_its_scheduler_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pages = {"/metrics": (200, "pagewire:frontend_scheduler_ready 0\n"), "/server_info": (200, INFO)}
    with answering(pages) as url:
        top([url], None, 0.1, True)
    assert "its scheduler cannot be reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pages", "error", "message"),
    [
        ({}, PagewireError, "answers with status 404; is it a pagewire service"),
        ({"/server_info": (401, "")}, Unauthenticated, "give it with --api-key"),
        ({"/server_info": (200, "<html>")}, PagewireError, "is it a pagewire service"),
        ({"/server_info": (200, INFO), "/metrics": (200, "up 1\n")}, PagewireError, "no metrics of pagewire"),
        ({"/server_info": (200, INFO), "/metrics": (200, "{")}, PagewireError, "no metrics of pagewire"),
    ],
)
def test_what_is_no_service_is_said(
    pages: dict[str, tuple[int, str]], error: type[Exception], message: str
) -> None:
    with answering(pages) as url, pytest.raises(error, match=message):
        top([url], None, 0.1, True)


def test_nothing_there_says_how_to_start_it() -> None:
    with pytest.raises(Unavailable, match=r"nothing answers .* 'pagewire serve MODEL --port PORT' starts"):
        Scraper("127.0.0.1:1", None).snapshot()


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "x:port", "localhost:0"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="give one such as http://localhost:8000"):
        Scraper(url, None)
