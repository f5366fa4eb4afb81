"""A model's template that is made to do harm is refused at the start, or ends the render at fault alone."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from frontend.chat.conversation import Conversation
from frontend.text import template_renderer
from frontend.text.chat_template import ChatTemplate
from frontend.text.template_renderer import RENDERER
from pagewire.base.errors import ConfigError, InvalidRequest, Overloaded

DOUBLING = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FORKING = "{% macro f(n) %}{{ f(n + 1) if n < 99 }}{{ f(n + 1) if n < 99 }}{% endmacro %}{{ f(0) }}"
HOSTILE = {
    "nested parentheses": ("{{ " + "(" * 50_000, "nested too deeply"),
    "nested lists": ("{{ " + "[" * 90 + "]" * 90 + " }}" + "{% if x %}" * 4000, "nested too deeply|error"),
    "nested ifs": ("{% if x %}" * 4000 + "{% endif %}" * 4000, "nested too deeply"),
    "a constant power": ("{{ 10**(10**10) }}", "0.5 s of processor time"),
    "a constant text": ("{{ 'x' * 10**10 }}", "MiB of memory"),
    "a constant filter": ("{{ 'x' | center(10**10) }}", "MiB of memory"),
    "a constant format": ("{{ '%9999999999d' % 1 }}", "MiB of memory"),
    "loops": (LOOPS, "0.5 s of processor time for a short"),
    "macros that fork": (FORKING, "0.5 s of processor time for a short"),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls within calls"),
    "a text that doubles": (DOUBLING.replace("[n.x, n.x]", "n.x + n.x") + "{{ n.x }}", "processor|memory"),
    "a list that doubles": (DOUBLING + "{{ n.x }}", "memory|processor time"),
    "a comparison that doubles": (
        DOUBLING + DOUBLING.replace("n = ", "m = ").replace("n.x", "m.x") + "{{ n.x == m.x }}",
        "memory|time",
    ),
    "a long number": ("{{ (messages | length) ** (10 ** 10) }}", "processor|memory|too large"),
    "much text": ("{{ lipsum(n=10**7) }}", "processor|memory"),
    "long output": ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "longer than 16,777,216"),
    "a long source": ("x" * 2**20 + "x", "1048577 characters; at most"),
}


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "CPU_SECONDS", 0.5)


def load(directory: Path, source: str) -> ChatTemplate:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    template = ChatTemplate.load(directory, None)
    assert template is not None
    return template


def say(template: ChatTemplate, text: str) -> str:
    return template.render(Conversation(messages=[{"role": "user", "content": text}]))


def render_processes() -> list[psutil.Process]:
    """Those of RENDERER that live: other tests may have left children of other kinds."""
    found = []
    for process in psutil.Process().children():
        try:
            if "frontend.text.template_process" in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended since it was listed
    return found


@pytest.mark.parametrize(("source", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_at_the_start(tmp_path: Path, source: str, said: str) -> None:
    memory, began = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/tokenizer_config.json: .*({said})"):
        load(tmp_path, source)
    assert time.monotonic() - began < template_renderer._WALL_SECONDS
    assert psutil.Process().memory_info().rss - memory < 100 * 2**20


def test_a_render_that_takes_too_long_ends_alone_while_others_go_on(tmp_path: Path) -> None:
    template = load(tmp_path, "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}done")
    with ThreadPoolExecutor(4) as threads:
        hostile = threads.submit(say, template, "loop")
        answers = [threads.submit(say, template, "hi").result() for _ in range(50)]
        assert answers == ["done"] * 50
        assert not hostile.done(), "the others did not wait for it"
        with pytest.raises(
            InvalidRequest, match=r"took more than 0\.5 s of processor time for this"
        ) as raised:
            hostile.result()
    assert raised.value.param == "messages"
    assert say(template, "hi") == "done"


def test_of_many_slow_renders_most_are_refused_so_that_quick_ones_find_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_renderer, "CPU_SECONDS", 1.0)
    monkeypatch.setattr(template_renderer, "_SLOW_SECONDS", 0.1)
    template = load(tmp_path, "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}done")

    def outcome(_: int) -> type[Exception] | None:
        try:
            say(template, "loop")
        except (InvalidRequest, Overloaded) as error:
            return type(error)
        return None

    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(outcome, range(4)))
    assert sorted(outcomes, key=str) == [InvalidRequest] * 2 + [Overloaded] * 2
    assert say(template, "hi") == "done"


@pytest.mark.parametrize("depth", [*range(960, 1000, 3), 5000])
def test_values_of_any_depth_are_rendered_or_refused(tmp_path: Path, depth: int) -> None:
    nested: list[object] = []
    for _ in range(depth):
        nested = [nested]
    conversation = Conversation(
        messages=[{"role": "user", "content": "hi"}], template_variables={"nested": nested}
    )
    template = load(tmp_path, "{{ nested | length }}")
    try:
        said = template.render(conversation)
    except InvalidRequest as error:
        said = error.message
    assert said in (
        "1",
        "the chat template refused the conversation: it has values that are nested too deeply",
    )


def test_processes_that_died_while_idle_are_replaced(tmp_path: Path) -> None:
    template = load(tmp_path, "done")
    children = render_processes()
    assert children
    for child in children:
        child.kill()
        child.wait()
    assert say(template, "hi") == "done"


def test_keys_in_the_environment_do_not_reach_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_API_KEY", "sesame")
    RENDERER.close()
    assert say(load(tmp_path, "done"), "hi") == "done"
    environments = [process.environ() for process in render_processes()]
    assert environments
    assert not any("PAGEWIRE_API_KEY" in environment for environment in environments)


def test_threads_share_few_processes(tmp_path: Path) -> None:
    template = load(tmp_path, "{{ messages[0].content }}")
    barrier = threading.Barrier(16)

    def ask(index: int) -> list[int]:
        barrier.wait()
        counts = []
        for turn in range(20):
            assert say(template, f"{index} {turn}") == f"{index} {turn}"
            counts.append(len(render_processes()))
        return counts

    with ThreadPoolExecutor(16) as threads:
        counts = [count for counts in threads.map(ask, range(16)) for count in counts]
    assert 1 <= max(counts) <= template_renderer.MAX_PROCESSES
