"""Requests that are several completions: what goes to the scheduler, and how the events come together."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from frontend.generation.message_parser import MessagePart, ToolCallDelta
from frontend.generation.request import GenerationRequest, TextPrompt
from pagewire.base.errors import Code, Overloaded
from pagewire.client import AsyncClient
from pagewire.inference.v1 import inference_pb2
from pagewire.scheduler.v1 import scheduler_pb2 as pb
from pagewire.wire.sampling_params import BeamSearch, SamplingParams, seed_of_completion
from tests.unit.frontend.conftest import RunningFrontend
from tests.unit.frontend.scripted_scheduler import EOS, ScriptedScheduler, failure, stop

LENGTH = pb.Ended(reason=pb.END_REASON_LENGTH)


@pytest.fixture
async def http(frontend: RunningFrontend):
    async with aiohttp.ClientSession(frontend.url) as session:
        yield session


def asked(http: aiohttp.ClientSession, path: str = "completions", **body: object) -> asyncio.Task:
    """A request under way; it comes to the status and the body."""

    async def ask() -> tuple[int, object]:
        async with http.post(f"/v1/{path}", json=body) as response:
            text = await response.text()
            if not body.get("stream"):
                return response.status, json.loads(text)
            events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
            return response.status, [json.loads(event) for event in events if event != "[DONE]"]

    return asyncio.ensure_future(ask())


def scores(*values: float) -> list[pb.TokenLogprobs]:
    return [pb.TokenLogprobs(logprob=value, top_ids=[97], top_logprobs=[-0.125]) for value in values]


async def say_prompt(scheduler: ScriptedScheduler, handle: int, first: int, *values: float) -> None:
    told = pb.PromptLogprobs(handle=handle, first=first, logprobs=scores(*values))
    await scheduler.send(pb.StepDeltas(prompt_logprobs=[told]))


async def test_every_prompt_gets_n_completions_with_seeds_of_their_own(http, scheduler) -> None:
    asking = asked(http, prompt=["ab", [99, 100]], n=2, seed=7, max_tokens=2)
    await scheduler.submitted(4)
    assert [bytes(submit.token_ids) for submit in scheduler.submits] == [b"ab", b"ab", b"cd", b"cd"]
    other = seed_of_completion(7, 1)
    assert [submit.sampling.seed for submit in scheduler.submits] == [7, other, 7, other]
    first = scheduler.submits[0].request_id
    parts = {submit.part: submit.request_id for submit in scheduler.submits}
    assert parts == {0: first, 1: f"{first}-1", 2: f"{first}-2", 3: f"{first}-3"}
    for submit, text in reversed(list(zip(scheduler.submits, (b"12", b"34", b"56", b"78"), strict=True))):
        await scheduler.say(submit.handle, text, end=LENGTH, cached=1)
    status, body = await asking
    assert status == 200
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "12"),
        (1, "34"),
        (2, "56"),
        (3, "78"),
    ]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 8,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_best_of_takes_the_same_seeds(http, scheduler) -> None:
    scheduler.reply = b"x"
    asking = asked(http, prompt="a", n=1, best_of=3, seed=-3)
    await scheduler.submitted(3)
    asking.cancel()
    expected = [seed_of_completion(-3, number) for number in range(3)]
    assert [submit.sampling.seed for submit in scheduler.submits] == expected


def test_seeds_of_completions_are_64_bits_and_those_of_neighbouring_seeds_have_none_in_common() -> None:
    seeds = [*range(-300, 300), *range(2**63 - 50, 2**63), *range(-(2**63), -(2**63) + 50)]
    all_of_them = [seed_of_completion(seed, number) for seed in seeds for number in range(128)]
    assert len(set(all_of_them)) == len(all_of_them)
    assert all(-(2**63) <= seed < 2**63 for seed in all_of_them)
    assert [seed_of_completion(seed, 0) for seed in seeds] == seeds
    # They stay what they are: somebody may have written a seed down.
    assert seed_of_completion(7, 1) == -8410663441553669497


async def test_completions_of_one_stream_come_by_turns(http, scheduler) -> None:
    asking = asked(http, prompt="p", n=2, stream=True, stream_options={"include_usage": True})
    first, second = await scheduler.submitted(1), await scheduler.submitted(2)
    for text in (b"a", b"b"):
        step = pb.StepDeltas(handles=[first.handle, second.handle], token_ids=[*text, *text.upper()])
        await scheduler.send(step)
        await asyncio.sleep(0.05)
    for submit in (second, first):
        await scheduler.say(submit.handle, [EOS], end=stop(EOS))
    _, chunks = await asking
    *chunks, usage = chunks
    told = [(choice["index"], choice["text"]) for chunk in chunks for choice in chunk["choices"]]
    assert told[:4] == [(0, "a"), (1, "A"), (0, "b"), (1, "B")]
    assert usage["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("streaming", [False, True])
async def test_failure_of_one_completion_fails_all_and_aborts_the_others(http, scheduler, streaming) -> None:
    asking = asked(http, prompt="p", n=3, stream=streaming)
    submits = [await scheduler.submitted(count) for count in (1, 2, 3)]
    await scheduler.say(submits[0].handle, b"a")
    await scheduler.say(submits[1].handle, [], end=failure(Code.RESOURCE_EXHAUSTED, "no room"))
    status, body = await asking
    if streaming:
        assert body[-1]["error"]["message"] == "no room"
    else:
        assert (status, body["error"]["message"]) == (429, "no room")
    for submit in (submits[0], submits[2]):
        await scheduler.aborted(submit.handle)
    assert submits[1].handle not in scheduler.aborts


async def test_cancelled_request_aborts_all_of_its_completions(frontend, scheduler) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        stream = client.generate("p", SamplingParams(n=3), stream=True)
        first = asyncio.ensure_future(anext(stream))
        submits = [await scheduler.submitted(count) for count in (1, 2, 3)]
        await scheduler.say(submits[2].handle, b"a")
        assert ((await first).index, first.result().text) == (2, "a")
        await stream.aclose()
        for submit in submits:
            await scheduler.aborted(submit.handle)


async def test_best_are_chosen_by_mean_log_probability(http, scheduler) -> None:
    asking = asked(http, prompt="p", n=2, best_of=3, max_tokens=2)
    submits = [await scheduler.submitted(count) for count in (1, 2, 3)]
    assert [submit.sampling.logprobs for submit in submits] == [0, 0, 0]
    await scheduler.say(submits[0].handle, b"aa", end=LENGTH, logprobs=scores(-3, -3))
    await scheduler.say(submits[1].handle, [*b"b", EOS], end=stop(EOS), logprobs=scores(-4, -1))
    await scheduler.say(submits[2].handle, b"c", end=LENGTH, logprobs=scores(-1))
    _, body = await asking
    told = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in body["choices"]]
    assert told == [(0, "c", "length"), (1, "b", "stop")]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 5


async def test_prompt_comes_before_its_completions_and_is_read_by_the_first(http, scheduler) -> None:
    asking = asked(http, prompt="abc", n=2, echo=True, logprobs=1, max_tokens=1, stream=True)
    first, second = await scheduler.submitted(1), await scheduler.submitted(2)
    assert first.sampling.prompt_logprobs == 1
    assert not second.sampling.HasField("prompt_logprobs")
    await scheduler.say(second.handle, b"y", end=LENGTH, logprobs=scores(-4))
    await say_prompt(scheduler, first.handle, 1, -1)
    await say_prompt(scheduler, first.handle, 2, -2)
    await scheduler.say(first.handle, b"x", end=LENGTH, logprobs=scores(-3))
    _, chunks = await asking
    for index, (text, logprob) in enumerate((("x", -3), ("y", -4))):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert [part["text"] for part in parts] == ["abc", text, ""]
        assert parts[0]["logprobs"] == {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [None, -1, -2],
            "top_logprobs": [None, {"a": -0.125, "b": -1}, {"a": -0.125, "c": -2}],
            "text_offset": [0, 1, 2],
        }
        assert parts[1]["logprobs"]["token_logprobs"] == [logprob]
        assert parts[1]["logprobs"]["text_offset"] == [3]


async def test_prompt_that_a_second_scheduler_tells_again_is_told_once(http, scheduler) -> None:
    asking = asked(http, prompt="abcd", prompt_logprobs=0, max_tokens=1)
    submit = await scheduler.submitted()
    await say_prompt(scheduler, submit.handle, 1, -1, -2)
    await asyncio.sleep(0.05)
    await scheduler.stop()
    successor = await ScriptedScheduler(scheduler.target.removeprefix("unix:")).start()
    again = await successor.submitted()
    await say_prompt(successor, again.handle, 1, -1, -2, -3)
    await successor.say(again.handle, b"x", end=LENGTH)
    _, body = await asking
    told = body["choices"][0]["prompt_logprobs"]
    assert told[0] is None
    assert [[entry["logprob"] for entry in each.values()] for each in told[1:]] == [[-1], [-2], [-3]]
    await successor.stop()


async def test_prompt_alone_is_scored_without_waiting_for_a_token(http, scheduler) -> None:
    asking = asked(http, prompt="ab", echo=True, logprobs=0, max_tokens=0)
    submit = await scheduler.submitted()
    await say_prompt(scheduler, submit.handle, 1, -2)
    _, body = await asking
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -2]
    assert body["usage"]["completion_tokens"] == 0
    await scheduler.aborted(submit.handle)


async def test_echo_alone_asks_the_scheduler_for_nothing(http, scheduler) -> None:
    _, body = await asked(http, prompt=["ab", [99, 195, 169]], echo=True, max_tokens=0)
    assert [choice["text"] for choice in body["choices"]] == ["ab", "cé"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
    assert scheduler.submits == []


async def test_token_ids_of_held_back_text_are_told_with_the_text_that_follows(http, scheduler) -> None:
    asking = asked(http, prompt="p", return_token_ids=True, stream=True, stop=["zzz"])
    submit = await scheduler.submitted()
    for token in [*"zé".encode(), EOS]:
        end = stop(EOS) if token == EOS else None
        await scheduler.say(submit.handle, [token], end=end)
        await asyncio.sleep(0.02)
    _, chunks = await asking
    parts = [chunk["choices"][0] for chunk in chunks]
    assert parts[0]["prompt_token_ids"] == [112]
    assert "".join(part["text"] for part in parts) == "zé"
    assert [token for part in parts for token in part.get("token_ids", ())] == [*"zé".encode(), EOS]


async def test_every_chunk_has_the_counts_if_wanted(http, scheduler) -> None:
    scheduler.reply, scheduler.pause_between_tokens = b"abc", 0.02
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, chunks = await asked(http, prompt="p", stream=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 4)


async def test_bad_words_are_forbidden_at_the_beginning_and_after_a_space(http, scheduler) -> None:
    scheduler.reply = b"x"
    await asked(http, prompt="p", bad_words=["no", " a"], cache_salt="s")
    submit = scheduler.submits[0]
    assert [bytes(word.ids) for word in submit.bad_words] == [b"no", b" no", b" a", b"a"]
    assert not submit.sampling.bad_words
    assert submit.cache_salt == "s"


async def test_prompts_are_cut_to_their_ends(http, scheduler) -> None:
    scheduler.reply = b"x"
    long = "y" * 300
    _, body = await asked(http, prompt=["abcdef", "a"], truncate_prompt_tokens=2, echo=True)
    assert [bytes(submit.token_ids) for submit in scheduler.submits] == [b"ef", b"a"]
    assert [choice["text"] for choice in body["choices"]] == ["efx", "ax"]
    await asked(http, prompt=long, truncate_prompt_tokens=-1, max_tokens=20)
    assert len(scheduler.submits[-1].token_ids) == 180


async def test_constraint_reaches_the_scheduler(http, scheduler) -> None:
    scheduler.reply = b"x"
    await asked(http, prompt="p", guided_choice=["yes", "no"])
    assert list(scheduler.submits[0].sampling.structured_output.choices.texts) == ["yes", "no"]


async def test_beams_ask_for_one_token_each(http, scheduler) -> None:
    """Two beams over a vocabulary of which "a" and "b" are likely; the second step ends the first beam."""
    asking = asked(http, prompt="p", use_beam_search=True, n=2, max_tokens=2, return_token_ids=True)
    first = await scheduler.submitted()
    assert (first.sampling.max_tokens, first.sampling.logprobs, first.sampling.temperature) == (1, 3, 0)
    top = pb.TokenLogprobs(logprob=-0.5, top_ids=[97, 98, EOS], top_logprobs=[-0.5, -1.0, -9])
    await scheduler.say(first.handle, [97], end=LENGTH, logprobs=[top])
    await scheduler.submitted(3)
    assert [bytes(submit.token_ids) for submit in scheduler.submits[1:]] == [b"pa", b"pb"]
    for submit, best in zip(scheduler.submits[1:], (EOS, 98), strict=True):
        top = pb.TokenLogprobs(logprob=-0.1, top_ids=[best, 99, 100], top_logprobs=[-0.1, -5, -6])
        await scheduler.say(submit.handle, [best], end=LENGTH, logprobs=[top])
    _, body = await asking
    told = [(choice["text"], choice["token_ids"], choice["finish_reason"]) for choice in body["choices"]]
    assert told == [("a", [97, EOS], "stop"), ("bb", [98, 98], "length")]
    assert body["usage"]["completion_tokens"] == 4


async def test_failed_beam_fails_the_request(frontend, scheduler) -> None:
    async with AsyncClient(frontend.target, max_retries=0) as client:
        asking = asyncio.ensure_future(client.generate("p", SamplingParams(n=2, beam_search=BeamSearch())))
        submit = await scheduler.submitted()
        await scheduler.say(submit.handle, [], end=failure(Code.RESOURCE_EXHAUSTED, "full"))
        with pytest.raises(Overloaded, match="full"):
            await asking


class Shouting:
    """A parser that takes capitals for thoughts and digits for a call's arguments."""

    def __init__(self) -> None:
        self._called = False

    def push(self, text: str, *, last: bool) -> MessagePart:
        digits = "".join(filter(str.isdigit, text))
        calls: tuple[ToolCallDelta, ...] = ()
        if digits:
            name = "" if self._called else "dial"
            calls = (ToolCallDelta(0, id=name and "call_1", name=name, arguments=digits),)
            self._called = True
        return MessagePart(
            content="".join(filter(str.islower, text)) + ("!" if last else ""),
            reasoning="".join(filter(str.isupper, text)),
            tool_calls=calls,
        )


async def test_message_parser_reads_each_completion_by_itself(frontend, scheduler) -> None:
    request = GenerationRequest(
        request_id="r",
        model="",
        prompts=[TextPrompt(text="p")],
        sampling=SamplingParams(n=2),
        new_parser=Shouting,
    )

    async def ask() -> object:
        async with frontend.pipeline.start(request) as answer:
            return await answer.whole()

    asking = asyncio.ensure_future(ask())
    first, second = await scheduler.submitted(1), await scheduler.submitted(2)
    await scheduler.say(first.handle, b"Aa1")
    await asyncio.sleep(0.02)
    await scheduler.say(first.handle, [*b"2", EOS], end=stop(EOS))
    await scheduler.say(second.handle, [*b"Bb", EOS], end=stop(EOS))
    one, two = (await asking).choices
    assert (one.text, one.reasoning, one.finished.reason.value) == ("a!", "A", "tool_calls")
    assert one.tool_calls == [ToolCallDelta(0, "call_1", "dial", "12")]
    assert (two.text, two.reasoning, two.finished.reason.value) == ("b!", "B", "stop")


async def test_grpc_tells_of_the_prompt_each_end_and_the_whole(frontend, scheduler) -> None:
    params = SamplingParams(n=2, prompt_logprobs=1)
    async with AsyncClient(frontend.target, max_retries=0) as client:

        async def play(start: int) -> None:
            first, second = await scheduler.submitted(start), await scheduler.submitted(start + 1)
            await say_prompt(scheduler, first.handle, 1, -2)
            await scheduler.say(second.handle, b"y", end=LENGTH, cached=2)
            await scheduler.say(first.handle, [*b"x", 98], end=stop(98), cached=0)

        playing = asyncio.ensure_future(play(1))
        events = [event async for event in client.events("ab", params, echo=True)]
        await playing
        assert events[0].prompt.text == "ab"
        assert list(events[0].prompt.token_ids) == [97, 98]
        assert not events[0].prompt.logprobs[0].HasField("sampled")
        assert events[0].prompt.logprobs[1].sampled.logprob == -2
        ends = {
            event.choice_finished.index: event.choice_finished
            for event in events
            if event.WhichOneof("event") == "choice_finished"
        }
        assert ends[0].stop_token_id == 98
        assert ends[1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert events[-1].finished.usage == inference_pb2.Usage(prompt_tokens=2, completion_tokens=3)
        playing = asyncio.ensure_future(play(3))
        whole = await client.generate("ab", params, echo=True)
        await playing
        assert [choice.text for choice in whole.choices] == ["x", "y"]
        assert whole.text == "x"
        assert whole.prompt == events[0].prompt


async def test_request_that_is_refused_in_part_leaves_nothing_behind(
    frontend, scheduler, monkeypatch
) -> None:
    """The third submission does not fit: the two before it go too."""
    monkeypatch.setattr("frontend.scheduler_link.MAX_UNSENT", 2)
    async with AsyncClient(frontend.target, max_retries=0) as client:
        with pytest.raises(Overloaded):
            await client.generate("p", SamplingParams(n=3))
    assert scheduler.submits == []
    assert frontend.link.links[0]._open == {}
