"""Models come from ModelScope as from the Hugging Face Hub, and are found where its library keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.hub import list_models, pull, resolve_model
from pagewire.hub.fetch import transfer
from tests.unit.hub.conftest import BuildGguf
from tests.unit.hub.hub_server import TOKEN, FakeHub, running

LARGE = bytes(range(256)) * 8192  # 2 MiB
FILES = {
    "config.json": b"{}",
    "configuration.json": b'{"framework": "pytorch"}',
    "model.safetensors": LARGE,
    "pytorch_model.bin": b"the same weights again",
    "qwen.tiktoken": b"tokens",
    "modeling_custom.py": b"code",
    "README.md": b"words",
}
NEEDED = {"config.json", "configuration.json", "model.safetensors", "qwen.tiktoken"}
MODEL = "modelscope:owner/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "theirs"))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.01)
    with running(FakeHub({"owner/model": dict(FILES)})) as served:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", served.url)
        yield served


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_only_what_is_needed_is_fetched_and_it_is_there_without_a_network(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = resolve_model(MODEL)
    assert directory == tmp_path / "home/modelscope/models/owner--model/snapshots/master"
    assert files_of(directory) == {name for name, _ in hub.fetched} == NEEDED
    assert (directory / "model.safetensors").read_bytes() == LARGE
    hub.fetched.clear()
    assert resolve_model(MODEL) == directory
    assert hub.fetched == []
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model(MODEL) == directory
    [entry] = list_models()
    assert (entry.name, entry.source) == (MODEL, "ModelScope")


def test_the_environment_makes_it_the_hub_of_every_name(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_HUB", "modelscope")
    hub.models["qwen/Qwen-7B-Chat"] = hub.models["Qwen/Qwen-7B-Chat"] = dict(FILES)
    assert files_of(pull("qwen-7b-chat", progress=False)) == NEEDED
    assert files_of(resolve_model("owner/model")) == NEEDED
    monkeypatch.setenv("PAGEWIRE_HUB", "gitee")
    with pytest.raises(
        ConfigError, match="PAGEWIRE_HUB is 'gitee'; it must be one of huggingface, modelscope"
    ):
        resolve_model("owner/model")


def test_revisions_lie_side_by_side(hub: FakeHub) -> None:
    assert resolve_model(f"{MODEL}@v1.0").name == "v1.0"
    assert resolve_model(MODEL).name == "master"


def test_a_branch_that_moved_on_is_fetched_as_far_as_it_changed(hub: FakeHub) -> None:
    directory = resolve_model(MODEL)
    hub.fetched.clear()
    hub.models["owner/model"]["config.json"] = b"[]"  # as long as it was
    with pytest.raises(ConfigError, match=r"config\.json holds a JSON list"):
        resolve_model(MODEL)
    hub.models["owner/model"]["config.json"] = b'{"changed": true}'
    assert resolve_model(MODEL) == directory
    assert (directory / "config.json").read_bytes() == b'{"changed": true}'
    assert hub.fetched == [("config.json", 0), ("config.json", 0)]


def test_a_broken_connection_goes_on_from_the_byte_where_it_broke(hub: FakeHub) -> None:
    hub.cut_after = [700_000, 300_000]
    assert (resolve_model(MODEL) / "model.safetensors").read_bytes() == LARGE
    assert hub.started_at("model.safetensors") == [0, 700_000, 1_000_000]


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("owner/model")
    with pytest.raises(ConfigError, match=r"owner/model: may not be read.*set MODELSCOPE_API_TOKEN"):
        resolve_model(MODEL)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    hub.hub_tokens.clear()
    assert files_of(resolve_model(MODEL)) == NEEDED
    assert hub.hub_tokens == {f"Bearer {TOKEN}"}
    assert hub.cdn_tokens == {None}


def test_an_unknown_model_or_revision_is_named(hub: FakeHub) -> None:
    for model in ("modelscope:owner/other", f"{MODEL}@v9"):
        with pytest.raises(ConfigError, match="no such model on ModelScope, or it has no revision"):
            resolve_model(model)


def test_without_a_network_the_error_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="not in the cache, and ModelScope cannot be asked: HF_HUB_OFFLINE"):
        resolve_model(MODEL)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="not in the cache, and ModelScope cannot be asked"):
        resolve_model(MODEL)


def test_an_answer_that_is_no_list_of_files_is_refused(hub: FakeHub) -> None:
    hub.models["owner/model"] = {"../outside.json": b"{}", **FILES}
    with pytest.raises(ConfigError, match=r"'\.\./outside\.json', which would lie outside"):
        resolve_model(MODEL)


def test_a_gguf_file_is_chosen_by_its_quantization(hub: FakeHub, build_gguf: BuildGguf) -> None:
    hub.models["owner/tiny-GGUF"] = {
        "tiny-q4_0.gguf": build_gguf().read_bytes(),
        "tiny-q8_0.gguf": b"",
        "configuration.json": b"{}",
    }
    assert (resolve_model("modelscope:owner/tiny-GGUF:Q4_0") / "config.json").is_file()
    assert [name for name, _ in hub.fetched] == ["tiny-q4_0.gguf"]


@pytest.mark.parametrize(
    "folder",
    [
        "models/owner--model.5/snapshots/master",
        "models/owner/model___5",
        "hub/models/owner/model___5",
        "hub/owner/model___5",
        "owner/model___5",
    ],
)
def test_what_modelscopes_library_fetched_is_served_from_its_cache(
    hub: FakeHub, tmp_path: Path, folder: str
) -> None:
    theirs = tmp_path / "theirs" / folder
    theirs.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (theirs / name).write_bytes(FILES[name])
    assert resolve_model("modelscope:owner/model.5") == theirs
    assert hub.fetched == []


def test_what_modelscopes_library_fetched_without_weights_is_fetched_again(
    hub: FakeHub, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs" / "hub/owner/model"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_bytes(b"{}")
    assert resolve_model(MODEL).is_relative_to(tmp_path / "home")
