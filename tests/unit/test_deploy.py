"""The files in deploy/: the chart as Helm renders it, manifests by Kubernetes' schemas, compose, systemd."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml
from helm_python import lint

from pagewire.cli.main import app
from tools.manifests import CHART, MANIFESTS, ROOT, rendered
from tools.manifests import main as manifests_main

DEPLOY = ROOT / "deploy"
KUBERNETES = "1.31"
VALUES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "CPU": {"schedulers": {"tensorParallelSize": 0}},
    "all": {
        "schedulers": {
            "tensorParallelSize": 2,
            "autoscaling": {"enabled": True},
            "extraArgs": ["--target-itl-ms", "50"],
        },
        "frontends": {"extraArgs": ["--otlp-traces-endpoint", "http://collector:4317"]},
        "tlsSecret": "tls",
        "apiKeysSecret": "keys",
        "models": {"existingClaim": "shared"},
        "servedModelName": "chat",
    },
}


def documents(values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What the chart renders to, by kind and the end of the name."""
    found = {}
    for each in yaml.safe_load_all(rendered(values)):
        found[each["kind"], each["metadata"]["name"].rpartition("-")[2]] = each
    return found


def option_names(command: str) -> set[str]:
    """The options of a command of the command line."""
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}


def check_words(words: list[str]) -> None:
    """The words of a command line: a command and options that it has."""
    known = option_names(words[0])
    assert all(word.partition("=")[0] in known for word in words[1:] if word.startswith("--")), words


def test_helm_finds_no_fault() -> None:
    report = lint(CHART)
    assert report["errors"] == []
    assert [each for each in report["messages"] if "icon" not in each["error"]] == []


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_manifests_are_what_kubernetes_takes(values: dict[str, Any]) -> None:
    for document in documents(values).values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_containers_are_started_with_options_that_exist(values: dict[str, Any]) -> None:
    for (kind, _), document in documents(values).items():
        if kind in ("StatefulSet", "Deployment"):
            (container,) = document["spec"]["template"]["spec"]["containers"]
            check_words(container["args"])


def test_selectors_claims_and_names_fit_together() -> None:
    found = documents(VALUES["all"])
    pods = {
        kind: found[kind, name]["spec"]["template"]
        for kind, name in found
        if kind in ("StatefulSet", "Deployment")
    }
    for service, kind in (("pagewire", "Deployment"), ("schedulers", "StatefulSet")):
        document = found["Service", service]
        assert document["spec"]["selector"].items() <= pods[kind]["metadata"]["labels"].items()
        ports = {port["name"] for port in pods[kind]["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in document["spec"]["ports"]} <= ports
    headless = found["Service", "schedulers"]
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is True
    args = pods["Deployment"]["spec"]["containers"][0]["args"]
    assert f"--schedulers=dns:{headless['metadata']['name']}.default.svc:50052" in args
    for pod in pods.values():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = pod["spec"]["containers"][0]["volumeMounts"]
        assert {mount["name"] for mount in mounts} == set(volumes)
        assert volumes["models"]["persistentVolumeClaim"]["claimName"] == "shared"
    assert ("PersistentVolumeClaim", "models") not in found
    scaler = found["HorizontalPodAutoscaler", "schedulers"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["StatefulSet", "schedulers"]["metadata"]["name"]
    assert "replicas" not in found["StatefulSet", "schedulers"]["spec"]
    assert found["StatefulSet", "schedulers"]["spec"]["template"]["spec"]["containers"][0]["resources"][
        "limits"
    ] == {"nvidia.com/gpu": 2}


def test_frontends_are_probed_and_drained() -> None:
    found = documents({})
    pod = found["Deployment", "frontends"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "pagewire"
    check_words(command[1:])
    drain = int(command[-1].rpartition("=")[2])
    assert pod["terminationGracePeriodSeconds"] > drain
    assert f"--socket={_value(container['args'], '--admin-socket')}" in command
    assert found["Service", "pagewire"]["spec"]["type"] == "LoadBalancer"


def _value(words: list[str], option: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"{option}="))


def test_plain_manifests_are_those_of_the_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["manifests", "--check"])
    assert manifests_main() == 0, "run python -m tools.manifests"
    assert MANIFESTS.is_file()


def test_the_inference_pool_selects_whole_services() -> None:
    text = (DEPLOY / "kubernetes" / "inference-pool.yaml").read_text()
    server, pool, route = yaml.safe_load_all(text)
    kubernetes_validate.validate(server, KUBERNETES, strict=True)
    template = server["spec"]["template"]
    check_words(template["spec"]["containers"][0]["args"])
    assert pool["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]


def test_compose_starts_commands_that_exist() -> None:
    path = DEPLOY / "docker" / "compose.yaml"
    services = yaml.safe_load(path.read_text())["services"]
    for service in services.values():
        check_words(service["command"])
    if shutil.which("docker") is not None and _has_compose():
        subprocess.run(["docker", "compose", "-f", str(path), "config", "--quiet"], check=True, timeout=30)


def _has_compose() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30).returncode == 0


@pytest.mark.parametrize("path", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda path: path.stem)
def test_units_start_commands_that_exist(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(path)
    words = shlex.split(unit["Service"]["ExecStart"])
    assert Path(words[0]).name == "pagewire"
    check_words([word for word in words[1:] if not word.startswith("$") or word == "$"])
    variables = set(re.findall(r"\$\{?(\w+)", unit["Service"]["ExecStart"]))
    for variable in variables:
        assert f"{variable}=" in unit["Service"]["Environment"], "without the file of settings it has none"
    assert unit["Service"]["Type"] == "notify"
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        said = subprocess.run(
            [analyze, "verify", str(path)], capture_output=True, text=True, timeout=30
        ).stderr
        assert "Unknown key" not in said


def test_the_image_has_both_targets_and_a_volume_for_models() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    assert re.findall(r"^FROM base AS (\w+)$", text, re.MULTILINE) == ["cpu", "cuda"]
    assert text.count("VOLUME /models") == 2
    warmup = re.search(r"pagewire (warmup .*?) \\$", text, re.MULTILINE)
    assert warmup is not None
    check_words([word for word in shlex.split(warmup[1]) if "$" not in word or word.startswith("--")])
    extras = re.findall(r'pip install "\.\[(.*)\]"', text)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in {each for line in extras for each in line.split(",")}:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
