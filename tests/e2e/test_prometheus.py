"""deploy/ against a real Prometheus: every query of the dashboard and of the alerts finds its data."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tools.service import Service, free_ports

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS, PROMTOOL = Path("/usr/bin/prometheus"), Path("/usr/bin/promtool")
RULES = DEPLOY / "prometheus" / "pagewire.rules.yml"
READY_SECONDS = 30.0

pytestmark = pytest.mark.skipif(not PROMETHEUS.exists(), reason="needs Debian's package prometheus")

# What finds nothing at a service that is well and has no GPU, by a part of the query.
EMPTY = {
    "pagewire:gpu_": "there is no GPU, or no NVML",
    "pagewire:request_refused_total": "nothing was refused",
    '{outcome=~"PagewireError|Unavailable"}': "nothing failed",
}


def dashboard_queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "pagewire.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 40
    return [query.replace("$__rate_interval", "5s").replace("$instance", ".*") for query in queries]


def alert_queries() -> list[str]:
    """The sides of the comparisons, over shorter times: at a service that is well, no comparison holds."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = [rule["expr"] for group in groups for rule in group["rules"]]
    return [re.sub(r"\[\d+m\]", "[5s]", re.split(r" (?:==|<|>) ", rule)[0]) for rule in rules]


class Prometheus:
    """Scrapes one service four times a second."""

    def __init__(self, directory: Path, service: Service) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        configuration["global"] = {"scrape_interval": "250ms", "evaluation_interval": "1s"}
        configuration["rule_files"] = [str(RULES)]
        (scrape,) = configuration["scrape_configs"]
        scrape["static_configs"] = [{"targets": [service.http_url.removeprefix("http://")]}]
        path = directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(configuration))
        with (directory / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(PROMETHEUS),
                    f"--config.file={path}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )

    def get(self, path: str, **parameters: str) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        answer = response.json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None
            time.sleep(0.1)
        raise AssertionError(f"Prometheus was not ready within {READY_SECONDS} s")

    def has_scraped(self, times: int) -> bool:
        """Whether it has read the service's metrics so often."""
        found = self.get("query", query="sum_over_time(up[1m])")["result"]
        return bool(found) and float(found[0]["value"][1]) >= times


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, null_service: Service) -> Iterator[Prometheus]:
    """It has scraped a service that answered requests meanwhile."""
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), null_service)
    try:
        prometheus.wait_ready()
        body = {"prompt": "Once upon a time " * 20, "max_tokens": 50}
        deadline = time.monotonic() + READY_SECONDS
        while not prometheus.has_scraped(10):  # it looks for its targets only some seconds after it is ready
            assert time.monotonic() < deadline, "Prometheus has not scraped the service"
            httpx.post(f"{null_service.http_url}/v1/completions", json=body, timeout=60).raise_for_status()
            time.sleep(0.15)
        yield prometheus
    finally:
        prometheus.process.terminate()
        prometheus.process.wait(30)


@pytest.mark.slow
def test_every_query_of_the_dashboard_and_the_alerts_finds_data(prometheus: Prometheus) -> None:
    unexpected = []
    for query in [*dashboard_queries(), *alert_queries()]:
        found = prometheus.get("query", query=query)["result"]
        reason = next((reason for part, reason in EMPTY.items() if part in query), None)
        if bool(found) == (reason is not None):
            unexpected.append((query, reason, found))
    assert unexpected == []


@pytest.mark.slow
def test_a_service_that_is_well_sets_off_no_alert(prometheus: Prometheus) -> None:
    (group,) = prometheus.get("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert prometheus.get("alerts")["alerts"] == []


@pytest.mark.slow
def test_names_of_metrics_and_their_types_are_understood(prometheus: Prometheus) -> None:
    metadata = prometheus.get("metadata")
    for name, kind in {
        "pagewire:num_requests_running": "gauge",
        "vllm:num_requests_running": "gauge",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:generation_tokens_total": "counter",
        "nv_inference_request_success": "counter",
    }.items():
        assert [entry["type"] for entry in metadata[name]] == [kind]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "pagewire.rules.yml"),
        ("test", "rules", "pagewire.rules.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_the_files_and_each_alert_fires_when_it_should(arguments: tuple[str, ...]) -> None:
    checked = subprocess.run(
        [str(PROMTOOL), *arguments],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
