"""What can be typed for a model on a hub, and the words of ms-swift's guides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.hub import pull, resolve_model
from pagewire.hub.names.model_name import default_model_name
from pagewire.hub.names.model_types import MODEL_TYPES
from pagewire.hub.names.reference import ModelReference, is_repository_id, located


@pytest.fixture(autouse=True)
def no_hub_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGEWIRE_HUB", raising=False)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", True),
        ("a/b", True),
        ("a/b/c", False),
        ("../b", False),
        ("a/..", False),
        ("/a", False),
        ("a", False),
        ("", False),
    ],
)
def test_ids_have_an_owner_and_a_name(model: str, expected: bool) -> None:
    assert is_repository_id(model) is expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("huggingface", "owner/name", None, None)),
        ("owner/name:Q4_K_M", ("huggingface", "owner/name", None, "Q4_K_M")),
        ("owner/name:sub/a b.gguf", ("huggingface", "owner/name", None, "sub/a b.gguf")),
        ("owner/name@v1.0", ("huggingface", "owner/name", "v1.0", None)),
        ("owner/name@refs/pr/3:Q8_0", ("huggingface", "owner/name", "refs/pr/3", "Q8_0")),
        ("modelscope:owner/name@v1", ("modelscope", "owner/name", "v1", None)),
        ("qwen-7b-chat", ("huggingface", "Qwen/Qwen-7B-Chat", None, None)),
        ("modelscope:yi-6b-chat", ("modelscope", "01ai/Yi-6B-Chat", None, None)),
    ],
)
def test_a_reference_names_hub_model_revision_and_file(text: str, parts: tuple[str | None, ...]) -> None:
    reference = ModelReference.parse(text)
    assert reference is not None
    assert (reference.hub, reference.repository, reference.revision, reference.file) == parts
    assert ModelReference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text", ["", "name", "/a/b", "./a/b", "a/b/c", "a/../b", "gitee:a/b", "a/b:", "a/b@", "a/b@..", "a/b:x:y"]
)
def test_other_words_are_no_references(text: str) -> None:
    assert ModelReference.parse(text) is None


def test_options_say_the_same_as_the_word() -> None:
    assert located("owner/name") == "owner/name"
    assert located("owner/name", revision="v1") == "huggingface:owner/name@v1"
    assert located("yi-6b-chat", hub="modelscope") == "modelscope:yi-6b-chat"
    assert located("owner/name:Q4_0", file="Q8_0") == "huggingface:owner/name:Q8_0"
    with pytest.raises(ConfigError, match="hub is 'gitee'; it must be one of huggingface, modelscope"):
        located("owner/name", hub="gitee")
    with pytest.raises(ConfigError, match="are for models on a hub"):
        located("model.gguf", revision="v1")
    with pytest.raises(ConfigError, match="has characters that none has on a hub"):
        located("owner/name", revision="a b")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/name", "owner/name"),
        ("modelscope:owner/name@v1:Q4_K_M", "owner/name"),
        ("owner/name:a.gguf", "owner/name"),
        ("modelscope:qwen-7b-chat", "qwen-7b-chat"),
        ("/models/tiny.gguf", "tiny"),
    ],
)
def test_requests_call_a_model_by_its_name_without_where_it_is(model: str, name: str) -> None:
    assert default_model_name(model) == name


@pytest.mark.parametrize(
    ("word", "huggingface", "modelscope"),
    [
        ("qwen-7b-chat", "Qwen/Qwen-7B-Chat", "Qwen/Qwen-7B-Chat"),
        ("qwen-1_8b-chat-int4", "Qwen/Qwen-1_8B-Chat-Int4", "Qwen/Qwen-1_8B-Chat-Int4"),
        ("qwen-7b-chat-int4", "Qwen/Qwen-7B-Chat-Int4", "Qwen/Qwen-7B-Chat-Int4"),
        (
            *("qwen1half-7b-chat-int4", "Qwen/Qwen1.5-7B-Chat-GPTQ-Int4"),
            "Qwen/Qwen1.5-7B-Chat-GPTQ-Int4",
        ),
        ("qwen1half-0_5b-chat-awq", "Qwen/Qwen1.5-0.5B-Chat-AWQ", "Qwen/Qwen1.5-0.5B-Chat-AWQ"),
        ("qwen2-1_5b-instruct", "Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-1.5B-Instruct"),
        ("qwen2_5-72b-instruct-awq", "Qwen/Qwen2.5-72B-Instruct-AWQ", "Qwen/Qwen2.5-72B-Instruct-AWQ"),
        ("yi-6b-chat", "01-ai/Yi-6B-Chat", "01ai/Yi-6B-Chat"),
        ("chatglm3-6b", "THUDM/chatglm3-6b", "ZhipuAI/chatglm3-6b"),
        ("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", "modelscope/Llama-2-7b-chat-ms"),
        ("llama3_2-1b", "meta-llama/Llama-3.2-1B", "LLM-Research/Llama-3.2-1B"),
        ("baichuan-7b", "baichuan-inc/Baichuan-7B", "baichuan-inc/baichuan-7B"),
        ("baichuan2-7b-chat", "baichuan-inc/Baichuan2-7B-Chat", "baichuan-inc/Baichuan2-7B-Chat"),
        (
            *("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.1"),
            "AI-ModelScope/Mistral-7B-Instruct-v0.1",
        ),
        (
            *("mixtral-moe-7b-instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
            "AI-ModelScope/Mixtral-8x7B-Instruct-v0.1",
        ),
        ("gemma-2b-instruct", "google/gemma-2b-it", "AI-ModelScope/gemma-2b-it"),
        ("gemma2-9b-instruct", "google/gemma-2-9b-it", "LLM-Research/gemma-2-9b-it"),
        ("phi3-4b-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", "LLM-Research/Phi-3-mini-4k-instruct"),
    ],
)  # fmt: skip
def test_the_guides_words_stand_for_the_model_on_each_hub(
    word: str, huggingface: str, modelscope: str
) -> None:
    assert (MODEL_TYPES[word].huggingface, MODEL_TYPES[word].modelscope) == (huggingface, modelscope)


def test_every_alias_is_a_word_and_stands_for_ids() -> None:
    for word, model_type in MODEL_TYPES.items():
        assert "/" not in word
        assert is_repository_id(model_type.huggingface), word
        assert is_repository_id(model_type.modelscope), word


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("qwen-7b-chatt", "qwen-7b-chat"),
        ("Qwen1half-7b-chat-int4", "qwen1half-7b-chat-int4"),
        ("smolm2-135m", "smollm2-135m"),
    ],
)
def test_a_word_that_is_nearly_an_alias_gets_the_alias_suggested(word: str, meant: str) -> None:
    for ask in (resolve_model, pull):
        with pytest.raises(ConfigError, match=f"did you mean .*'{meant}'"):
            ask(word)


def test_a_word_that_is_like_nothing_gets_no_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown model 'zzzzzz'; name a directory"):
        resolve_model("zzzzzz")


def test_the_documented_aliases_are_those_that_work() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "models-from-hubs.md").read_text()
    rows = re.findall(r"^\| (`[a-z][^|/]*-[^|/]*`) \| (`[^|]+`) \| ([^|]+) \|$", docs, re.MULTILINE)
    assert len(rows) == 7
    for words, huggingface, modelscope in rows:
        types = [MODEL_TYPES[word] for word in re.findall(r"`([^`]+)`", words)]
        assert [each.huggingface for each in types] == re.findall(r"`([^`]+)`", huggingface)
        expected = huggingface if modelscope == "the same" else modelscope
        assert [each.modelscope for each in types] == re.findall(r"`([^`]+)`", expected)
