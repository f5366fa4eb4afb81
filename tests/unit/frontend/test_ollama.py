"""Ollama's API through its own Python client, against a scripted scheduler."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import httpx
import ollama
import pydantic
import pytest

from pagewire.scheduler.v1 import scheduler_pb2
from tests.unit.frontend.conftest import CHATML, FrontendFactory, RunningFrontend
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, failure

USER = {"role": "user", "content": "hi"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CUT_OFF = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zür'
THOUGHT = "<think>\nHm.\n</think>\n\n"
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def get_weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: where.
    """
    return f"sunny in {city}"


@pytest.fixture
async def frontend(scheduler: ScriptedScheduler, start_frontend: FrontendFactory) -> RunningFrontend:
    scheduler.max_model_len = 4000
    template = CHATML + "{# tool_calls enable_thinking reasoning_effort #}"
    return await start_frontend(chat_template=template, tool_call_parser="hermes", reasoning_parser="qwen3")


@pytest.fixture
async def client(frontend: RunningFrontend):
    client = ollama.AsyncClient(frontend.url)
    yield client
    await client.close()


@pytest.fixture
async def http(frontend: RunningFrontend):
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


def text_of(token_ids: list[int]) -> str:
    """The tests' tokens are bytes."""
    return bytes(token_id for token_id in token_ids if token_id < EOS).decode()


def prompt_of(scheduler: ScriptedScheduler, number: int = -1) -> str:
    submit = scheduler.submits[number]
    return text_of(list(submit.token_ids[: submit.num_prompt_tokens]))


def in_order(answer: Any) -> bool:
    """Whether the parts of an answer's time are positive and within the whole."""
    total, *parts = (answer[name] for name in DURATIONS)
    return min(parts) > 0 and sum(parts) <= total + 3


# Chat


async def test_a_chat_is_answered_with_a_message_counts_and_durations(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"Hello!"
    answer = await client.chat("bytes", [USER])
    assert (answer.message.role, answer.message.content) == ("assistant", "Hello!")
    assert (answer.model, answer.done, answer.done_reason) == ("bytes", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (len("<user>hi<assistant>"), 7)
    assert prompt_of(scheduler) == "<user>hi<assistant>"
    assert in_order(answer)


async def test_a_chat_streams_lines_of_text_and_ends_with_the_counts(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = 'Zür"ich'.encode()
    parts = [part async for part in await client.chat("bytes:latest", [USER], stream=True)]
    *texts, last = parts
    assert "".join(part.message.content for part in texts) == 'Zür"ich'
    assert [(part.model, part.done) for part in texts] == [("bytes:latest", False)] * len(texts)
    assert all(name not in part for part in texts for name in ("done_reason", *DURATIONS))
    assert (last.message.content, last.done, last.done_reason) == ("", True, "stop")
    assert (last.prompt_eval_count, last.eval_count) == (len("<user>hi<assistant>"), 9)
    assert in_order(last)


async def test_the_client_that_is_not_async_works_too(
    frontend: RunningFrontend, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"Hello!"

    def talk() -> tuple[str, str]:
        with ollama.Client(frontend.url) as client:
            whole = client.chat("bytes", [USER]).message.content
            parts = client.generate("bytes", "hi", stream=True)
            return whole, "".join(part.response for part in parts)

    assert await asyncio.to_thread(talk) == ("Hello!", "Hello!")


async def test_a_stream_is_the_default_and_is_lines_of_json(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"ab"
    async with http.post("/api/chat", json={"model": "bytes", "messages": [USER]}) as response:
        assert response.content_type == "application/x-ndjson"
        body = await response.read()
    first, *_, last = map(json.loads, body.splitlines())
    assert body.endswith(b"}\n")
    assert list(first) == ["model", "created_at", "message", "done"]
    assert first["message"]["role"] == "assistant"
    assert last["done"] is True


async def test_a_limit_is_the_reason_length(client: ollama.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"Hello!"
    answer = await client.chat("bytes", [USER], options={"num_predict": 3})
    assert (answer.message.content, answer.done_reason, answer.eval_count) == ("Hel", "length", 3)


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_and_calls_are_parts_of_the_message(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler, stream: bool
) -> None:
    scheduler.reply = f"{THOUGHT}I look.\n{CALL}\n{CALL}".encode()
    asked = await client.chat("bytes", [USER], tools=[get_weather], think=True, stream=stream)
    parts = [part async for part in asked] if stream else [asked]
    assert "".join(part.message.thinking or "" for part in parts) == "Hm."
    assert "".join(part.message.content for part in parts) == "I look."
    calls = [call.function for part in parts for call in part.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", {"city": "Zürich"})] * 2
    assert parts[-1].done_reason == "stop"


async def test_calls_have_an_id_and_a_number(http, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = f"{CALL}\n{CALL}".encode()
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    body = {"messages": [USER], "tools": tools, "stream": False}
    async with http.post("/api/chat", json=body) as response:
        calls = (await response.json())["message"]["tool_calls"]
    assert [call["function"]["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_was_cut_off_is_text_as_nobody_may_execute_it(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler, stream: bool
) -> None:
    scheduler.reply = CUT_OFF.encode()
    options = {"num_predict": len(CUT_OFF.encode())}
    asked = await client.chat("bytes", [USER], tools=[get_weather], options=options, stream=stream)
    parts = [part async for part in asked] if stream else [asked]
    assert not any(part.message.tool_calls for part in parts)
    content = "".join(part.message.content for part in parts)
    assert content == '{"name": "get_weather", "arguments": {"city": "Zür'
    assert parts[-1].done_reason == "length"


async def test_an_answer_and_the_results_of_its_calls_are_taken_back(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = f"{THOUGHT}{CALL}".encode()
    answer = await client.chat("bytes", [USER], tools=[get_weather])
    result = {"role": "tool", "tool_name": "get_weather", "content": "sunny"}
    scheduler.reply = b"It is sunny."
    again = await client.chat("bytes", [USER, answer.message, result], tools=[get_weather])
    assert again.message.content == "It is sunny."
    assert "<tool>sunny<assistant>" in prompt_of(scheduler)


async def test_think_goes_to_the_template_and_hides_thoughts_when_it_is_false(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    shown = "{{ enable_thinking }},{{ reasoning_effort }}|"
    frontend = await start_frontend(chat_template=shown + CHATML, reasoning_parser="qwen3")
    client = ollama.AsyncClient(frontend.url)
    scheduler.reply = f"{THOUGHT}Yes.".encode()
    seen = {}
    for think in (None, True, False, "low"):
        answer = await client.chat("bytes", [USER], think=think)
        seen[think] = (prompt_of(scheduler).partition("|")[0], answer.message.thinking)
        assert answer.message.content == "Yes."
    assert seen == {
        None: (",", "Hm."),
        True: ("True,", "Hm."),
        False: ("False,", None),
        "low": ("True,low", "Hm."),
    }


class Answer(pydantic.BaseModel):
    """What tests hold answers to."""

    city: str
    population: int


async def test_format_is_json_or_a_schema_as_pydantic_writes_it(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b'{"city":"Bern","population":134000}'
    answer = await client.chat("bytes", [USER], format=Answer.model_json_schema())
    assert Answer.model_validate_json(answer.message.content).city == "Bern"
    await client.generate("bytes", "hi", format="json")
    await client.chat("bytes", [USER], format="")
    schema, json_object, nothing = (submit.sampling.structured_output for submit in scheduler.submits)
    assert "population" in str(schema)
    assert "object" in str(json_object)
    assert not nothing.ByteSize()
    with pytest.raises(ollama.ResponseError, match="invalid format"):
        await client._request(
            ollama.ChatResponse, "POST", "/api/chat", json={"messages": [USER], "format": "x"}
        )


async def test_log_probabilities_are_told_token_by_token(http, scheduler: ScriptedScheduler) -> None:
    body = {"messages": [USER], "logprobs": True, "top_logprobs": 1}
    asked = asyncio.create_task(http.post("/api/chat", json=body))
    submit = await scheduler.submitted()
    assert submit.sampling.logprobs == 1
    logprobs = scheduler_pb2.TokenLogprobs(logprob=-0.5, top_ids=[65], top_logprobs=[-0.25])
    end = scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_LENGTH)
    await scheduler.say(submit.handle, [66], logprobs=[logprobs], end=end)
    response = await asked
    first, last = map(json.loads, (await response.read()).splitlines())
    top = {"token": "A", "logprob": -0.25, "bytes": [65]}
    assert first["logprobs"] == [{"token": "B", "logprob": -0.5, "bytes": [66], "top_logprobs": [top]}]
    assert "logprobs" not in last


# Options


def sampled(scheduler: ScriptedScheduler) -> Mapping[str, Any]:
    sampling = scheduler.submits[-1].sampling
    return {field.name: value for field, value in sampling.ListFields()}


async def test_defaults_are_ollamas(client: ollama.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"x"
    await client.chat("bytes", [USER])
    found = sampled(scheduler)
    assert found["temperature"] == pytest.approx(0.8)
    assert (found["top_k"], found["top_p"]) == (40, pytest.approx(0.9))
    assert found["max_tokens"] == 4000 - len("<user>hi<assistant>")


async def test_every_option_of_ollamas_documentation_is_taken(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"x"
    options = {
        "num_keep": 5,
        "seed": 42,
        "num_predict": 100,
        "top_k": 20.0,
        "top_p": 0.5,
        "min_p": 0.25,
        "typical_p": 0.7,
        "repeat_last_n": 33.0,
        "temperature": 0.5,
        "repeat_penalty": 1.25,
        "presence_penalty": 1.5,
        "frequency_penalty": 1.0,
        "mirostat": 1,
        "mirostat_tau": 0.8,
        "mirostat_eta": 0.6,
        "penalize_newline": True,
        "stop": ["\n", "user:"],
        "numa": False,
        "num_ctx": 1024,
        "num_batch": 2,
        "num_gpu": 1,
        "main_gpu": 0,
        "low_vram": False,
        "vocab_only": False,
        "use_mmap": True,
        "use_mlock": False,
        "num_thread": 8,
    }
    await client.generate("bytes", "hi", options=options)
    found = sampled(scheduler)
    assert (found["seed"], found["max_tokens"], found["top_k"], found["top_p"]) == (42, 100, 20, 0.5)
    assert (found["min_p"], found["temperature"], found["repetition_penalty"]) == (0.25, 0.5, 1.25)
    assert (found["presence_penalty"], found["frequency_penalty"]) == (1.5, 1.0)


@pytest.mark.parametrize("num_predict", [-1, -2, 0])
async def test_an_answer_without_a_limit_goes_on_to_the_end_of_the_context(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler, num_predict: int
) -> None:
    scheduler.reply = b"x"
    await client.generate(
        "bytes", "hi", raw=True, options={"num_predict": num_predict, "seed": -1, "top_p": 0}
    )
    assert sampled(scheduler)["max_tokens"] == 4000 - 2
    assert sampled(scheduler)["top_k"] == 1


async def test_stop_strings_end_an_answer(client: ollama.AsyncClient, scheduler: ScriptedScheduler) -> None:
    scheduler.reply = b"one, two, three"
    answer = await client.generate("bytes", "count", options={"stop": ["two"]})
    assert (answer.response, answer.done_reason) == ("one, ", "stop")


# Generate


async def test_a_prompt_is_a_users_turn_unless_it_is_raw(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.reply = b"Hello!"
    answer = await client.generate("bytes", "hi", system="Be kind.")
    assert (answer.response, answer.done_reason) == ("Hello!", "stop")
    assert prompt_of(scheduler) == "<system>Be kind.<user>hi<assistant>"
    assert in_order(answer)
    raw = await client.generate("bytes", "hi", raw=True)
    assert prompt_of(scheduler) == "hi"
    assert raw.context is None


@pytest.mark.parametrize("stream", [False, True])
async def test_context_is_the_conversation_and_is_taken_back(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler, stream: bool
) -> None:
    scheduler.reply = f"{THOUGHT}Hello!".encode()
    asked = await client.generate("bytes", "hi", stream=stream)
    last = [part async for part in asked][-1] if stream else asked
    assert text_of(last.context) == f"<user>hi<assistant>{THOUGHT}Hello!"
    assert last.context[-1] == EOS
    scheduler.reply = f"{THOUGHT}Bye!".encode()
    again = await client.generate("bytes", "bye", context=last.context)
    assert (again.response, again.thinking) == ("Bye!", "Hm.")
    submit = scheduler.submits[-1]
    assert list(submit.token_ids[: len(last.context)]) == list(last.context)
    assert prompt_of(scheduler) == f"<user>hi<assistant>{THOUGHT}Hello!<user>bye<assistant>"
    assert again.context[: len(last.context)] == last.context


async def test_the_end_of_a_turn_is_not_written_twice_behind_a_context(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}<assistant>"
    client = ollama.AsyncClient((await start_frontend(chat_template=turns)).url)
    scheduler.reply = b"Hello!"
    ended = await client.generate("bytes", "hi")
    cut_off = await client.generate("bytes", "hi", options={"num_predict": 2})
    for answer in (ended, cut_off):
        await client.generate("bytes", "bye", context=answer.context)
        submit = scheduler.submits[-1]
        assert list(submit.token_ids[: submit.num_prompt_tokens]).count(EOS) == 3


async def test_a_model_without_a_template_continues_prompts(
    scheduler: ScriptedScheduler, start_frontend: FrontendFactory, model_dir, tmp_path
) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    client = ollama.AsyncClient((await start_frontend(model=str(tmp_path))).url)
    scheduler.reply = b"Hello!"
    answer = await client.generate("bytes", "hi, ", system="Be kind.")
    assert prompt_of(scheduler) == "Be kind.\n\nhi, "
    await client.generate("bytes", "bye", context=answer.context)
    assert prompt_of(scheduler) == "Be kind.\n\nhi, Hello!bye"


# Loading


@pytest.mark.parametrize("stream", [False, True])
async def test_an_empty_request_says_that_the_model_is_loaded_or_unloaded(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler, stream: bool
) -> None:
    async def reason(asked: Any) -> str:
        answer = await asked
        parts = [part async for part in answer] if stream else [answer]
        assert parts[-1].done
        return parts[-1].done_reason

    assert await reason(client.chat("bytes", [], stream=stream)) == "load"
    assert await reason(client.generate("bytes", "", keep_alive="5m", stream=stream)) == "load"
    assert await reason(client.chat("bytes", [], keep_alive=0, stream=stream)) == "unload"
    assert await reason(client.generate("bytes", keep_alive="0s", stream=stream)) == "unload"
    assert await reason(client.generate("bytes", keep_alive=-1, stream=stream)) == "load"
    assert not scheduler.submits


# Embeddings


async def test_embeddings_have_length_1_and_the_older_ones_that_of_the_states(
    frontend: RunningFrontend, start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    client = ollama.AsyncClient((await start_frontend(pooling="mean")).url)
    scheduler.pool = lambda submit: [3, 4, 0, len(submit.token_ids) - 2]
    one = await client.embed("bytes", "hi")
    assert (one.embeddings[0], one.prompt_eval_count) == (pytest.approx([0.6, 0.8, 0, 0]), 2)
    several = await client.embed("bytes", ["hi", "hi"], dimensions=1)
    assert several.embeddings == [[1.0], [1.0]]
    assert len((await client.embed("bytes", "hi", dimensions=99)).embeddings[0]) == 4
    assert (await client.embed("bytes", "")).embeddings == []
    assert (await client.embeddings("bytes", "hi")).embedding == [3, 4, 0, 0]
    assert (await client.embeddings("bytes", "")).embedding == []


async def test_long_inputs_are_truncated_unless_that_is_not_wanted(
    start_frontend: FrontendFactory, scheduler: ScriptedScheduler
) -> None:
    client = ollama.AsyncClient((await start_frontend(pooling="mean")).url)
    scheduler.pool = lambda submit: [1, 0, 0, 0]
    assert (await client.embed("bytes", "x" * 300)).prompt_eval_count == 200
    with pytest.raises(ollama.ResponseError, match="at most 200") as caught:
        await client.embed("bytes", "x" * 300, truncate=False)
    assert caught.value.status_code == 400


async def test_a_model_not_made_for_embeddings_says_so(client: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError, match="not made for embeddings") as caught:
        await client.embed("bytes", "hi")
    assert caught.value.status_code == 400


# Models


async def test_models_are_listed_shown_and_running(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    (listed,) = (await client.list()).models
    assert listed.model == "bytes:latest"
    assert len(listed.digest) == 64
    assert listed.modified_at.year > 2000
    (running,) = (await client.ps()).models
    assert (running.model, running.context_length) == ("bytes:latest", 4000)
    shown = await client.show(listed.model)
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["general.architecture"] == "unknown"
    assert shown.modelinfo["unknown.context_length"] == 4000
    assert shown.template.startswith(CHATML)
    assert shown.modelfile.startswith("FROM bytes:latest\n")
    await scheduler.lose_engine()
    while (await client.ps()).models:
        await asyncio.sleep(0.01)


async def test_capabilities_are_what_the_model_has(start_frontend: FrontendFactory) -> None:
    client = ollama.AsyncClient((await start_frontend(pooling="last")).url)
    assert (await client.show("bytes")).capabilities == ["completion", "embedding", "tools"]


async def test_pulling_the_served_model_succeeds_and_others_are_not_found(client: ollama.AsyncClient) -> None:
    assert (await client.pull("bytes")).status == "success"
    assert [part.status async for part in await client.pull("bytes:latest", stream=True)] == ["success"]
    with pytest.raises(ollama.ResponseError, match="model 'llama3' not found") as caught:
        await client.pull("llama3")
    assert caught.value.status_code == 404


async def test_models_are_not_changed(client: ollama.AsyncClient) -> None:
    for asked in (
        client.create("mine", from_="bytes"),
        client.copy("bytes", "mine"),
        client.push("bytes"),
        client.delete("bytes"),
    ):
        with pytest.raises(ollama.ResponseError, match="is not served: this server has the model") as caught:
            await asked
        assert caught.value.status_code == 400


async def test_probes_of_clients_are_answered(frontend: RunningFrontend) -> None:
    async with httpx.AsyncClient(base_url=frontend.url) as http:
        assert (await http.head("/")).status_code == 200
        assert (await http.head("/api/tags")).status_code == 200
        version = (await http.get("/api/version")).json()["version"]
    assert all(part.isdigit() for part in version.split("."))


# Errors


@pytest.mark.parametrize("name", ["llama3", "bytes:7b"])
async def test_an_unknown_model_is_not_found_everywhere(client: ollama.AsyncClient, name: str) -> None:
    for asked in (
        client.chat(name, [USER]),
        client.chat(name, []),
        client.generate(name, "hi"),
        client.embed(name, "hi"),
        client.embeddings(name, "hi"),
        client.show(name),
    ):
        with pytest.raises(ollama.ResponseError, match=f"^model '{name}' not found") as caught:
            await asked
        assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat", {"messages": [{**USER, "images": ["aGk="]}]}, "images are not served"),
        ("chat", {"messages": [{"role": "robot"}]}, "messages[0].role is 'robot'"),
        ("chat", {"messages": [USER], "think": "deeply"}, "think is 'deeply'"),
        ("chat", {"messages": [USER], "keep_alive": "soon"}, "keep_alive is 'soon'"),
        ("chat", {"messages": [USER], "options": {"temprature": 1}}, "options.temprature"),
        ("chat", {"messages": [USER], "options": {"num_predict": "1"}}, "options.num_predict"),
        ("chat", {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "logprobs is 21"),
        ("generate", {"prompt": "hi", "images": ["aGk="]}, "images are not served"),
        ("generate", {"prompt": "hi", "suffix": "x"}, "suffix is not served"),
        ("generate", {"prompt": "hi", "template": "{{ .Prompt }}"}, "template is not served"),
        ("generate", {"prompt": "hi", "system": "x", "raw": True}, "raw mode does not support"),
        ("generate", {"prompt": "hi", "context": [999]}, "token id 999"),
        ("embed", {"input": [1]}, "input must be a string or a list of strings"),
        ("pull", {"model": 1}, "model"),
    ],
)
async def test_what_is_not_served_is_a_400_that_says_so(http, path: str, body: Any, message: str) -> None:
    async with http.post(f"/api/{path}", json=body) as response:
        answer = await response.json()
    assert (response.status, list(answer)) == (400, ["error"])
    assert message in answer["error"]


async def test_a_model_that_does_not_think_says_so(frontend: FrontendFactory, start_frontend) -> None:
    client = ollama.AsyncClient((await start_frontend()).url)
    with pytest.raises(ollama.ResponseError, match='"bytes" does not support thinking') as caught:
        await client.chat("bytes", [USER], think=True)
    assert caught.value.status_code == 400


async def test_errors_under_the_prefix_have_one_form_and_others_openais(http) -> None:
    async with http.post("/api/nothing") as response:
        assert response.status == 404
        assert isinstance((await response.json())["error"], str)
    async with http.get("/api/chat") as response:
        assert response.status == 405
        assert isinstance((await response.json())["error"], str)
    async with http.post("/apix") as response:
        assert "message" in (await response.json())["error"]


@pytest.mark.parametrize("path", ["chat", "generate"])
async def test_a_full_queue_is_503_as_with_ollama(http, scheduler: ScriptedScheduler, path: str) -> None:
    body = {"messages": [USER]} if path == "chat" else {"prompt": "hi"}
    asked = asyncio.create_task(http.post(f"/api/{path}", json=body))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [], end=failure(8, "too much is waiting"))
    response = await asked
    assert (response.status, await response.json()) == (503, {"error": "too much is waiting"})
    assert response.headers["Retry-After"]


@pytest.mark.parametrize("path", ["chat", "generate"])
async def test_an_error_in_a_stream_that_has_begun_is_its_last_line(
    http, scheduler: ScriptedScheduler, path: str
) -> None:
    body = {"messages": [USER]} if path == "chat" else {"prompt": "hi"}
    asked = asyncio.create_task(http.post(f"/api/{path}", json=body))
    submit = await scheduler.submitted()
    await scheduler.say(submit.handle, [104])
    response = await asked
    await scheduler.say(submit.handle, [], end=failure(14, "the engine is gone"))
    first, last = map(json.loads, (await response.read()).splitlines())
    assert first["done"] is False
    assert last == {"error": "the engine is gone"}


async def test_an_answer_that_the_servers_end_cuts_off_is_an_error(
    client: ollama.AsyncClient, scheduler: ScriptedScheduler
) -> None:
    asked = asyncio.create_task(client.generate("bytes", "hi"))
    submit = await scheduler.submitted()
    end = scheduler_pb2.Ended(reason=scheduler_pb2.END_REASON_ABORT)
    await scheduler.say(submit.handle, [104], end=end)
    with pytest.raises(ollama.ResponseError, match="shutting down") as caught:
        await asked
    assert caught.value.status_code == 503
