"""Models come from a Hugging Face Hub without code and without weights twice, go on where a fetch was broken
off, and stay usable without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagewire.base.errors import ConfigError
from pagewire.hub import list_models, resolve_checkpoint, resolve_model
from pagewire.hub.fetch import transfer
from pagewire.hub.fetch.repository import require_complete
from tests.unit.hub.conftest import BuildGguf
from tests.unit.hub.hub_server import COMMIT, TOKEN, FakeHub, running
from tests.unit.hub.test_gguf_parts import split

LARGE = bytes(range(256)) * 8192  # 2 MiB
FILES = {
    "config.json": b"{}",
    "model.safetensors": LARGE,
    "tokenizer.json": b'{"model": {}}',
    "chat_template.jinja": b"x",
    "pytorch_model.bin": b"the same weights again",
    "pytorch_model.bin.index.json": b"{}",
    "modeling_custom.py": b"code",
    "original/consolidated.safetensors": b"the same weights again",
    "consolidated.safetensors": b"the same weights again",
    "README.md": b"words",
    "1_Pooling/config.json": b'{"pooling": 1}',
    "onnx/config.json": b"{}",
}
NEEDED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "1_Pooling/config.json",
}
NO_NETWORK = "http://127.0.0.1:9"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running(FakeHub({"owner/model": dict(FILES)})) as served:
        yield served


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PAGEWIRE_HUB", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "home"


@pytest.fixture
def ask(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, made the one that huggingface_hub asks: it reads its environment when it is imported."""
    asked(monkeypatch, hub.url, tmp_path)
    return hub


def asked(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> None:
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.01)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # releases before 1.0 have it in both
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def refusal(model: str) -> str:
    with pytest.raises(ConfigError) as error:
        resolve_model(model)
    return error.value.message


def test_only_what_is_needed_is_fetched_and_it_is_there_without_a_network(
    ask: FakeHub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = resolve_model("owner/model")
    assert directory.is_relative_to(home)
    assert directory.name == COMMIT
    assert files_of(directory) == NEEDED
    assert {name for name, _ in ask.fetched} == NEEDED
    assert (directory / "model.safetensors").read_bytes() == LARGE
    ask.fetched.clear()
    assert resolve_model("owner/model") == directory
    assert ask.fetched == []
    asked(monkeypatch, NO_NETWORK, tmp_path)
    assert resolve_model("owner/model") == directory


def test_shards_are_those_of_the_index_and_the_format_is_the_preferred_one(ask: FakeHub) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ask.models["owner/model"] = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
        "model-of-another.safetensors": b"3",
        "pytorch_model.bin": b"4",
    }
    assert files_of(resolve_model("owner/model")) == {
        *("config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors")
    }


def test_weights_of_torch_are_fetched_where_there_are_no_others(ask: FakeHub) -> None:
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    ask.models["owner/model"] = {
        "config.json": b"{}",
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
        "pytorch_model-1.bin": b"1",
        "pytorch_model-2.bin": b"2",
        "training_args.bin": b"3",
    }
    assert files_of(resolve_model("owner/model")) == {
        *("config.json", "pytorch_model.bin.index.json", "pytorch_model-1.bin", "pytorch_model-2.bin")
    }
    with pytest.raises(ConfigError, match="load_format is 'safetensors', and owner/model has none"):
        resolve_checkpoint("owner/model", "safetensors")


def test_random_weights_need_none_of_the_hub(
    ask: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, load_format = resolve_checkpoint("owner/model", "dummy")
    assert load_format == "dummy"
    assert files_of(directory) == NEEDED - {"model.safetensors"}
    asked(monkeypatch, NO_NETWORK, tmp_path)
    assert resolve_checkpoint("owner/model", "dummy")[0] == directory


def test_the_token_goes_to_the_hub_and_to_nobody_else(ask: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ask.gated.add("owner/model")
    assert files_of(resolve_model("owner/model")) == NEEDED
    assert ask.hub_tokens == {f"Bearer {TOKEN}"}
    assert ask.cdn_tokens == {None}


def test_a_renamed_model_is_found_with_the_token(ask: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ask.gated.add("owner/model")
    ask.renamed["owner/former"] = "owner/model"
    assert files_of(resolve_model("owner/former")) == NEEDED


def test_a_gated_model_says_what_to_do(ask: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    ask.gated.add("owner/model")
    assert "a gated model; accept its terms at https://huggingface.co/owner/model" in refusal("owner/model")
    assert "set HF_TOKEN" in refusal("owner/model")
    ask.models["owner/model"] = {"tiny-Q4_0.gguf": b"gguf"}  # none of whose files is a small one
    assert "set HF_TOKEN" in refusal("owner/model")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "with the account of your token" in refusal("owner/model")


def test_an_unknown_model_or_revision_is_named(ask: FakeHub) -> None:
    assert "owner/other: no such model on the Hugging Face Hub" in refusal("owner/other")
    assert "owner/model: has no branch, tag or commit 'v9'" in refusal("owner/model@v9")
    assert resolve_model("owner/model@v1.0").name == COMMIT


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "consolidated.00.pth": b""}, "no weights that are read.*consolidated.00.pth"),
        ({"config.json": b"{}", "adapter_model.safetensors": b""}, "it is an adapter"),
        ({"model.safetensors": b""}, "has no config.json"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "gone.st"}}'},
            "names 'gone.st', which is not in the repository",
        ),
        ({"config.json": b"[", "model.safetensors": b""}, r"config\.json is not valid JSON"),
    ],
)
def test_a_repository_without_a_usable_model_says_what_it_has(
    ask: FakeHub, files: dict[str, bytes], said: str
) -> None:
    ask.models["owner/model"] = files
    with pytest.raises(ConfigError, match=said):
        resolve_model("owner/model")


def test_a_hub_that_fails_is_as_one_that_is_not_there(ask: FakeHub) -> None:
    ask.failing = True
    assert "not in the cache, and the Hugging Face Hub cannot be asked" in refusal("owner/model")
    ask.failing = False
    directory = resolve_model("owner/model")
    ask.failing = True
    assert resolve_model("owner/model") == directory


def test_files_of_the_same_content_are_fetched_once(ask: FakeHub) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ask.models["owner/model"] = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": LARGE,
        "model-2.safetensors": LARGE,
    }
    directory = resolve_model("owner/model")
    assert (directory / "model-2.safetensors").read_bytes() == LARGE
    assert sum(name.endswith(".safetensors") for name, _ in ask.fetched) == 1


def test_without_a_network_the_error_says_what_else_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, NO_NETWORK, tmp_path)
    said = refusal("owner/model")
    assert "owner/model: not in the cache, and the Hugging Face Hub cannot be asked" in said
    assert ".gguf file" in said


def offline(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", wanted)
    getattr(utils, "reset_sessions", lambda: None)()  # which keep it, before 1.0


def test_offline_nothing_is_asked(ask: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, True)
    assert "HF_HUB_OFFLINE forbids it" in refusal("owner/model")
    offline(monkeypatch, False)
    directory = resolve_model("owner/model")
    ask.hub_tokens.clear()
    offline(monkeypatch, True)
    assert resolve_model("owner/model") == directory
    assert not ask.hub_tokens
    (directory / "model.safetensors").unlink()
    said = refusal("owner/model")
    offline(monkeypatch, False)
    assert "owner/model: has neither model.safetensors" in said
    assert "HF_HUB_OFFLINE forbids it" in said


def test_a_broken_connection_goes_on_from_the_byte_where_it_broke(ask: FakeHub) -> None:
    ask.cut_after = [700_000, 300_000]
    directory = resolve_model("owner/model")
    assert (directory / "model.safetensors").read_bytes() == LARGE
    assert ask.started_at("model.safetensors") == [0, 700_000, 1_000_000]


def test_a_file_that_is_not_what_the_hub_says_is_removed(ask: FakeHub, home: Path) -> None:
    blobs = home / "huggingface" / "models--owner--model" / "blobs"
    ask.cut_after = [10, 0, 0, 0, 0, 0]
    with pytest.raises(ConfigError, match="cannot be asked"):
        resolve_model("owner/model")
    [partial] = blobs.glob("*.incomplete")
    partial.write_bytes(b"not its ten")
    with pytest.raises(ConfigError, match=r"has the sha256 .* and not"):
        resolve_model("owner/model")
    assert not partial.exists()
    assert (resolve_model("owner/model") / "model.safetensors").read_bytes() == LARGE


def test_a_full_disk_is_said_before_anything_large_is_fetched(
    ask: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "fetching owner/model needs 2 MB in" in refusal("owner/model")
    assert ask.started_at("model.safetensors") == []


def test_a_disk_that_fills_up_meanwhile_is_said(ask: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pagewire.hub.fetch.transfer._fetch_rest", full)
    assert "no space is left in" in refusal("owner/model")
    assert "the same command goes on from there" in refusal("owner/model")


def test_a_model_that_another_program_has_fetched_is_not_fetched_again(
    ask: FakeHub, home: Path, tmp_path: Path
) -> None:
    directory = resolve_model("owner/model")
    theirs = tmp_path / "theirs"
    shutil.move(home / "huggingface", theirs)
    ask.fetched.clear()
    assert resolve_model("owner/model") == theirs / directory.relative_to(home / "huggingface")
    assert ask.fetched == []


def resolving(hub: FakeHub, home: Path, **environment: str) -> subprocess.Popen[str]:
    """In a process of its own, with the environment that users set."""
    script = (
        "import sys; from pagewire.hub import resolve_model; from pagewire.base.errors import ConfigError\n"
        "try: print(resolve_model('owner/model', progress=True))\n"
        "except ConfigError as error: sys.exit(f'ConfigError: {error}')"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "theirs"),
        "PAGEWIRE_HOME": str(home),
        "PYTHONPATH": os.getcwd(),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def test_a_killed_process_loses_nothing_that_had_arrived(
    ask: FakeHub, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask.hold_after = 1_500_000
    process = resolving(ask, home)
    assert ask.held.wait(60)
    blobs = home / "huggingface" / "models--owner--model" / "blobs"
    deadline = time.monotonic() + 30
    while sum(file.stat().st_size for file in blobs.glob("*.incomplete")) < 1_500_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [entry] = list_models()
    assert entry.name == "owner/model"
    assert "not all of it: 'pagewire pull owner/model' goes on" in entry.source
    ask.hold_after = None
    ask.fetched.clear()
    directory = resolve_model("owner/model", progress=True)
    assert (directory / "model.safetensors").read_bytes() == LARGE
    assert ask.started_at("model.safetensors") == [1_500_000]
    said = capfd.readouterr().err
    assert "Fetching owner/model: 1.5 of 2.1 MB are here, going on from there" in said
    assert "Fetching owner/model: 0%" not in said


def test_the_environment_names_the_hub_and_can_forbid_it(hub: FakeHub, home: Path) -> None:
    stdout, stderr = resolving(hub, home).communicate(timeout=60)
    assert Path(stdout.strip()).name == COMMIT, stderr
    assert "Fetching owner/model: 0% of 2 MB" in stderr
    requests = len(hub.fetched)
    again, stderr = resolving(hub, home, HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert again == stdout, stderr
    assert len(hub.fetched) == requests


@pytest.fixture
def gguf_hub(ask: FakeHub, build_gguf: BuildGguf) -> FakeHub:
    content = build_gguf().read_bytes()
    ask.models["owner/tiny-GGUF"] = {
        "README.md": b"",
        "tiny-Q4_K_M.gguf": content,
        "tiny-Q8_0.gguf": content,
        "mmproj-tiny-F16.gguf": b"",
        "BF16/tiny-BF16-00001-of-00003.gguf": b"",
        "BF16/tiny-BF16-00003-of-00003.gguf": b"",
        "UD/tiny-UD-Q4_K_XL.gguf": content,
    }
    return ask


@pytest.mark.parametrize(
    ("file", "fetched"),
    [
        ("Q4_K_M", "tiny-Q4_K_M.gguf"),
        ("q8_0", "tiny-Q8_0.gguf"),
        ("tiny-Q8_0.gguf", "tiny-Q8_0.gguf"),
        ("UD/tiny-UD-Q4_K_XL.gguf", "UD/tiny-UD-Q4_K_XL.gguf"),
        ("tiny-UD-Q4_K_XL.gguf", "UD/tiny-UD-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "UD/tiny-UD-Q4_K_XL.gguf"),
    ],
)
def test_one_gguf_file_of_a_repository_is_chosen_fetched_and_converted(
    gguf_hub: FakeHub, file: str, fetched: str
) -> None:
    directory = resolve_model(f"owner/tiny-GGUF:{file}")
    assert (directory / "config.json").is_file()
    assert {name for name, _ in gguf_hub.fetched} == {fetched}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("owner/tiny-GGUF", r"several \.gguf files; name one as owner/tiny-GGUF:Q4_K_M or with --file, of: "),
        ("owner/tiny-GGUF:Q5_K_M", r"no \.gguf file 'Q5_K_M'.* of: BF16/.*00001.*UD/tiny-UD-Q4_K_XL"),
        ("owner/tiny-GGUF:Q4_K", r"has no \.gguf file 'Q4_K'"),
        ("owner/tiny-GGUF:BF16", "1 of its model's 3 parts are missing: BF16/tiny-BF16-00002-of-00003"),
        ("owner/model:Q4_K_M", r"has no \.gguf files"),
    ],
)  # fmt: skip
def test_an_unclear_choice_of_a_gguf_file_lists_them(gguf_hub: FakeHub, model: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_model(model)


@pytest.mark.parametrize("file", ["", ":Q8_0", ":Q8_0/tiny-00001-of-00003.gguf", ":tiny-00003-of-00003.gguf"])
def test_all_parts_of_a_gguf_model_are_fetched_whichever_is_named(
    ask: FakeHub, build_gguf: BuildGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    parts = split(build_gguf(), tmp_path)
    files = {f"Q8_0/{part.name}": part.read_bytes() for part in parts}
    ask.models["owner/parts-GGUF"] = {"README.md": b"", **files}
    directory = resolve_model(f"owner/parts-GGUF{file}")
    assert (directory / "model.safetensors").is_file()
    assert {name for name, _ in ask.fetched} == files.keys()
    asked(monkeypatch, NO_NETWORK, tmp_path)
    assert resolve_model("owner/parts-GGUF") == directory
    next((tmp_path / "home").rglob(f"snapshots/*/Q8_0/{parts[1].name}")).unlink()
    assert f"1 of its model's 3 parts are missing: Q8_0/{parts[1].name}" in refusal("owner/parts-GGUF")


def test_the_only_gguf_file_need_not_be_named_and_is_there_without_a_network(
    gguf_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = gguf_hub.models["owner/tiny-GGUF"]
    gguf_hub.models["owner/tiny-GGUF"] = {name: files[name] for name in ("README.md", "tiny-Q8_0.gguf")}
    directory, load_format = resolve_checkpoint("owner/tiny-GGUF", "gguf")
    assert load_format == "auto"
    asked(monkeypatch, NO_NETWORK, tmp_path)
    assert resolve_model("owner/tiny-GGUF") == directory
    assert resolve_model("owner/tiny-GGUF:Q8_0") == directory
    assert "has no .gguf file 'Q4_0'" in refusal("owner/tiny-GGUF:Q4_0")


def test_a_snapshot_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        require_complete(tmp_path, "m")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        require_complete(tmp_path, "m")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(ConfigError, match=r"missing: 2\.safetensors"):
        require_complete(tmp_path, "m")
    (tmp_path / "2.safetensors").touch()
    assert require_complete(tmp_path, "m") == tmp_path
