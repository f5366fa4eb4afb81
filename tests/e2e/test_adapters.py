"""Adapters over the wire: named by requests, loaded and unloaded while others stream, and there again after a
kill -9 of the worker and of the scheduler."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from pagewire import LLM, SamplingParams
from pagewire.base.errors import ConfigError, InvalidRequest, NotFound, Unauthenticated, Unsupported
from pagewire.cli.main import app
from pagewire.inference.v1 import inference_pb2 as pb
from pagewire.inference.v1 import inference_pb2_grpc
from pagewire.wire.sampling_params import BeamSearch
from tests.e2e.test_deaths import streams
from tools.service import NO_CERTIFICATES, Service

PROMPT = "The capital of France is"
ADMIN = "the-admins-key"
HIDDEN, LAYERS = 576, 30
GREEDY = SamplingParams(temperature=0, max_tokens=16)


def write(directory: Path, seed: int, *, rank: int = 8, strength: float = 0.1) -> Path:
    """A PEFT directory for SmolLM2, written without torch."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", 192)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = generator.normal(0, strength, (rank, HIDDEN))
            tensors[f"{module}.lora_B.weight"] = generator.normal(0, strength, (out, rank))
    save_file(
        {name: tensor.astype(np.float32) for name, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    for seed in range(6):
        write(directory / f"a{seed}", seed)
    return directory


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path, adapters: Path) -> Iterator[Service]:
    """Two slots, two frontends, and an adapter from the start."""
    options = (
        *("--enable-lora", "--lora-modules", f"first={adapters / 'a0'}", "--max-loras", "2"),
        *("--max-lora-rank", "16", "--allow-runtime-lora", "--frontends", "2"),
        *("--admin-api-key", ADMIN),
    )
    with Service(tmp_path_factory.mktemp("service"), options=options) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.http_url, timeout=60, verify=NO_CERTIFICATES) as client:
        yield client


def post(client: httpx.Client, path: str, body: dict[str, Any], key: str = ADMIN) -> httpx.Response:
    return client.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def load(client: httpx.Client, name: str, path: Path, **more: Any) -> httpx.Response:
    return post(client, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return post(client, "/v1/unload_lora_adapter", {"lora_name": name})


def text(client: httpx.Client, model: str, **more: Any) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def models(client: httpx.Client) -> dict[str, Any]:
    return {each["id"]: each for each in client.get("/v1/models").json()["data"]}


def test_a_request_s_model_is_the_base_or_an_adapter(client: httpx.Client, adapters: Path) -> None:
    assert load(client, "second", adapters / "a1").status_code == 200
    listed = models(client)
    assert listed["second"]["parent"] == "smollm2-135m"
    assert listed["second"]["root"] == str(adapters / "a1")
    assert listed["smollm2-135m"]["parent"] is None
    texts = {model: text(client, model) for model in ("smollm2-135m", "first", "second")}
    assert len(set(texts.values())) == 3
    assert {model: text(client, model) for model in reversed(list(texts))} == texts
    chat = {"model": "first", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert client.post("/v1/chat/completions", json=chat).json()["model"] == "first"
    assert client.post("/v1/messages", json=chat).status_code == 200
    assert client.post(
        "/api/generate",
        json={"model": "second", "prompt": PROMPT, "stream": False, "options": {"num_predict": 4}},
    ).is_success
    triton = {"text_input": PROMPT, "max_tokens": 16, "exclude_input_in_output": True}
    for model, expected in (*texts.items(), ("ensemble", texts["smollm2-135m"])):
        answer = client.post(f"/v2/models/{model}/generate", json=triton)
        assert answer.json()["text_output"] == expected, answer.text
    metrics = client.get("/metrics").text
    assert 'pagewire:adapter_requests_total{adapter="second"}' in metrics
    assert re.search(r'^vllm:lora_requests_info\{.*max_lora="2"', metrics, re.MULTILINE)
    assert unload(client, "second").status_code == 200
    gone = client.post("/v1/completions", json={"model": "second", "prompt": PROMPT})
    assert gone.status_code == 404
    assert "this server has 'smollm2-135m', 'first'" in gone.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}, "max_tokens": 12},
        {"logprobs": 2},
        {"use_beam_search": True, "n": 2},
        {"prompt_logprobs": 1},
        {"temperature": 0.9, "seed": 3, "n": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_way_of_asking_works_with_an_adapter_and_tells_it_from_the_base(
    client: httpx.Client, fields: dict[str, Any]
) -> None:
    answers = []
    for model in ("first", "smollm2-135m", "first"):
        body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        answers.append([(each["text"], each.get("logprobs")) for each in answer.json()["choices"]])
    assert answers[0] == answers[2] != answers[1]


def test_more_adapters_than_slots_are_served_at_once(client: httpx.Client, adapters: Path) -> None:
    names = ["first"]
    for seed in range(1, 5):
        assert load(client, f"n{seed}", adapters / f"a{seed}").is_success
        names.append(f"n{seed}")
    alone = {name: text(client, name) for name in names}

    async def together() -> list[str]:
        async with httpx.AsyncClient(
            base_url=str(client.base_url), timeout=60, verify=NO_CERTIFICATES
        ) as own:
            bodies = [
                {"model": name, "prompt": PROMPT, "max_tokens": 16, "temperature": 0} for name in names * 2
            ]
            answers = await asyncio.gather(*(own.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    assert asyncio.run(together()) == [alone[name] for name in names * 2]
    for name in names[1:]:
        assert unload(client, name).is_success


def test_an_adapter_put_in_another_s_place_is_another_for_the_prefix_cache_too(
    client: httpx.Client, adapters: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(adapters / "a1", tmp_path / "place"))
    assert load(client, "place", place).is_success
    former = text(client, "place")
    assert text(client, "place") == former
    shutil.copytree(adapters / "a2", place, dirs_exist_ok=True)
    taken = load(client, "place", place)
    assert taken.status_code == 400
    assert "is loaded already; set load_inplace" in taken.json()["error"]["message"]
    assert load(client, "place", place, load_inplace=True).is_success
    assert load(client, "like-it", adapters / "a2").is_success
    assert text(client, "place") == text(client, "like-it") != former
    assert unload(client, "place").is_success
    assert unload(client, "like-it").is_success


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "there is no such directory"),
        (lambda d: write(d, 1, rank=32), "has rank 32; max_lora_rank allows 16"),
        (lambda d: misshape(d), "is for a matrix of 575 inputs"),
        (lambda d: poison(d), "not finite"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"no"), "cannot be read as safetensors"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_a_400_that_says_why(
    client: httpx.Client, adapters: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    directory = Path(shutil.copytree(adapters / "a1", tmp_path / "spoilt"))
    spoil(directory)
    answer = load(client, "spoilt", directory)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert "spoilt" not in models(client)


def misshape(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(
        {name: tensor[:, :575] if "lora_A" in name else tensor for name, tensor in load_file(path).items()},
        path,
    )


def poison(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, path)


def test_loading_takes_the_admin_s_key(client: httpx.Client, adapters: Path) -> None:
    body = {"lora_name": "x", "lora_path": str(adapters / "a1")}
    assert post(client, "/v1/load_lora_adapter", body, "another").status_code == 401
    assert post(client, "/v1/unload_lora_adapter", {"lora_name": "first"}, "another").status_code == 401
    assert unload(client, "nobody").status_code == 404
    assert load(client, "smollm2-135m", adapters / "a1").status_code == 400


def test_grpc_loads_lists_and_unloads(service: Service, adapters: Path) -> None:
    admin, key = ("authorization", f"Bearer {ADMIN}"), ("authorization", "Bearer another")
    with grpc.insecure_channel(service.grpc_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.LoadAdapterRequest(lora_name="grpc", lora_path=str(adapters / "a3"))
        with pytest.raises(grpc.RpcError) as refused:
            stub.LoadAdapter(request, metadata=(key,))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stub.LoadAdapter(request, metadata=(admin,))
        listed = {each.id: each for each in stub.ListModels(pb.ListModelsRequest()).models}
        assert listed["grpc"].parent == "smollm2-135m"
        stub.UnloadAdapter(pb.UnloadAdapterRequest(lora_name="grpc"), metadata=(admin,))
        with pytest.raises(grpc.RpcError) as unknown:
            stub.GenerateOnce(pb.GenerateRequest(model="grpc", text="x"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def request(model: str, seed: int, max_tokens: int = 40) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=seed, ignore_eos=True)
    return pb.GenerateRequest(model=model, text=f"{PROMPT} {seed}", sampling=sampling)


@pytest.mark.parametrize("role", ["engine-worker", pytest.param("scheduler", marks=pytest.mark.slow)])
async def test_streams_with_adapters_keep_every_token_over_a_kill(
    service: Service, client: httpx.Client, adapters: Path, role: str
) -> None:
    """Of the adapters one was there from the start; one was loaded while the service ran, and another has
    been put
    in its place since: the stream that began with the former ends with it."""
    names = ["first", "smollm2-135m", "late", "first"]
    assert load(client, "late", adapters / "a1").is_success
    requests = [request(name, seed) for seed, name in enumerate(names)]
    async with streams(service, requests) as opened:
        expected = [finished for finished in await opened.outcomes() if isinstance(finished, pb.Finished)]
        tokens = opened.received
    assert len(expected) == len(names)
    async with streams(service, requests) as opened:
        await opened.until_each_has(5)
        replaced = await asyncio.to_thread(load, client, "late", adapters / "a4", load_inplace=True)
        assert replaced.is_success
        os.kill(service.processes()[role].pid, signal.SIGKILL)
        await opened.outcomes()
        assert opened.received == tokens
    assert unload(client, "late").is_success


@pytest.mark.slow
async def test_loading_goes_on_beside_streams(service: Service, client: httpx.Client, adapters: Path) -> None:
    requests = [request("first", seed, max_tokens=120) for seed in range(2)]
    async with streams(service, requests) as opened:
        await opened.outcomes()
        expected = opened.received
    async with streams(service, requests) as opened:
        await opened.until_each_has(2)
        assert (await asyncio.to_thread(load, client, "beside", adapters / "a5")).is_success
        assert min(map(len, opened.received)) < 120, "it came too late"
        assert await asyncio.to_thread(text, client, "beside", max_tokens=2)
        await opened.outcomes()
        assert opened.received == expected
    assert unload(client, "beside").is_success


def test_an_llm_computes_prompts_with_adapters_as_a_service_does(
    client: httpx.Client, adapters: Path, tmp_path: Path
) -> None:
    """Three adapters in two slots, in one batch; loaded at the start and later, and forgotten."""
    paths = {f"n{seed}": adapters / f"a{seed}" for seed in range(3)}
    for name, path in paths.items():
        assert load(client, name, path).is_success
    with LLM(
        "smollm2-135m",
        enable_lora=True,
        lora_modules={name: paths[name] for name in ("n0", "n1")},
        max_loras=2,
        max_lora_rank=16,
        max_model_len=256,
        kv_cache_memory=1 << 28,
    ) as llm:
        llm.load_lora("n2", paths["n2"])
        assert llm.loras == ("n0", "n1", "n2")
        names = [None, "n0", "n1", "n2", "n0", None]
        outputs = llm.generate([PROMPT] * len(names), GREEDY, lora=names)
        expected = {name: text(client, name or "smollm2-135m") for name in dict.fromkeys(names)}
        assert len(set(expected.values())) == 4
        assert [output.outputs[0].text for output in outputs] == [expected[name] for name in names]
        streamed = "".join(piece.text for piece in llm.stream(PROMPT, GREEDY, lora="n2"))
        assert streamed == expected["n2"]

        beams = SamplingParams(max_tokens=4, beam_search=BeamSearch(width=2), n=2)
        alone, with_one = llm.generate([PROMPT, PROMPT], beams, lora=[None, "n1"])
        assert [each.token_ids for each in alone.outputs] != [each.token_ids for each in with_one.outputs]
        question = [{"role": "user", "content": "Name the capital of France."}]
        said = [llm.chat(question, GREEDY, lora=name)[0].outputs[0].text for name in (None, "n0", None)]
        assert said[0] == said[2] != said[1]

        with pytest.raises(InvalidRequest, match="loaded already"):
            llm.load_lora("n2", paths["n1"])
        with pytest.raises(InvalidRequest, match="max_lora_rank allows 16"):
            llm.load_lora("large", write(tmp_path / "large", 1, rank=32))
        with pytest.raises(InvalidRequest, match="2 adapters for 1 prompts"):
            llm.generate(PROMPT, GREEDY, lora=["n0", "n1"])
        llm.unload_lora("n0")
        with pytest.raises(NotFound, match="there is no adapter 'n0'; there is 'n1', 'n2'"):
            llm.generate(PROMPT, GREEDY, lora="n0")
        llm.load_lora("n0", paths["n1"])  # another one of the name
        assert llm.generate(PROMPT, GREEDY, lora="n0")[0].outputs[0].text == expected["n1"]
    for name in paths:
        assert unload(client, name).is_success


def test_an_llm_without_adapters_says_how_to_have_them(smollm2_dir: Path, adapters: Path) -> None:
    with pytest.raises(ConfigError, match="lora_modules takes enable_lora=True"):
        LLM("smollm2-135m", lora_modules={"n0": adapters / "a0"})
    with LLM("smollm2-135m", engine="null") as llm:
        with pytest.raises(Unsupported, match="open it with enable_lora=True"):
            llm.load_lora("n0", adapters / "a0")
        with pytest.raises(Unsupported, match="open it with enable_lora=True"):
            llm.generate(PROMPT, lora="n0")


def test_the_command_loads_lists_and_unloads(
    service: Service, client: httpx.Client, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapters)
    monkeypatch.delenv("PAGEWIRE_API_KEY", raising=False)
    monkeypatch.setenv("PAGEWIRE_ADMIN_API_KEY", ADMIN)

    def command(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["lora", *arguments, "--url", service.http_url])

    assert command("load", "typed", "./a1").stdout == "typed is loaded\n"
    listed = [line.split() for line in command("list").stdout.splitlines()]
    assert listed[0] == ["NAME", "MODEL", "PATH"]
    assert ["typed", "smollm2-135m", str(adapters / "a1")] in listed
    assert "is loaded already; set load_inplace" in str(command("load", "typed", "./a2").exception)
    assert command("load", "typed", "./a2", "--in-place").exit_code == 0
    assert models(client)["typed"]["root"] == str(adapters / "a2")
    assert command("unload", "typed").stdout == "typed is unloaded\n"
    assert "there is no adapter 'typed'; there is 'first'" in str(command("unload", "typed").exception)
    another = command("unload", "first", "--api-key", "another")
    assert isinstance(another.exception, Unauthenticated)
    assert "first" in models(client)


@pytest.mark.slow
def test_several_workers_compute_with_adapters_what_one_does(smollm2_dir: Path, adapters: Path) -> None:
    """Each rank has its part of every adapter; three adapters and the base are in two slots."""
    names = [None, "n0", "n1", "n2"]
    texts: list[list[str]] = []
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2)):
        with LLM(
            "smollm2-135m",
            enable_lora=True,
            lora_modules={name: adapters / f"a{name[1:]}" for name in names if name},
            max_loras=2,
            max_lora_rank=16,
            max_model_len=256,
            kv_cache_memory=1 << 28,
            device="cpu",
            dtype="float32",
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
        ) as llm:
            outputs = llm.generate([PROMPT] * len(names), GREEDY, lora=names)
            texts.append([output.outputs[0].text for output in outputs])
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == len(names)
