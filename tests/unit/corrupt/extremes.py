"""Files made to do harm: each asks for something beyond all bounds, or leads somewhere else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from tests.unit.corrupt.mutations import gguf_fields
from tests.unit.corrupt.samples import write_directory, write_gguf
from tests.unit.corrupt.sandbox import (
    Load,
    load_engine,
    load_gguf,
    load_streamed,
    load_text,
    run_case,
    warm_up,
)
from tests.unit.engine.tiny_model import tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TERABYTE = 2**40
GIGABYTE = 2**30
NAME = "model.norm.weight"
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@dataclass(frozen=True)
class Extreme:
    """One case.

    Attributes:
        load: who reads it.
        write: makes the model in an empty directory, and returns what is to be loaded.
        said: part of the refusal; "" if it is to be loaded.
    """

    load: Load
    write: Callable[[Path], Path]
    said: str


def _changed(change: Callable[[Path], Any], **options: Any) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        change(write_directory(directory, **options))
        return directory

    return write


def _with_config(**values: Any) -> Callable[[Path], Path]:
    return _with_json("config.json", **values)


def _with_json(name: str, **values: Any) -> Callable[[Path], Path]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))

    return _changed(change)


def _with_content(name: str, content: bytes) -> Callable[[Path], Path]:
    return _changed(lambda directory: (directory / name).write_bytes(content))


def _with_holes(name: str, size: int = TERABYTE) -> Callable[[Path], Path]:
    """A huge file that takes no room on the disk."""

    def change(directory: Path) -> None:
        with (directory / name).open("ab") as file:
            file.truncate(size)

    return _changed(change)


def _with_pipe(name: str) -> Callable[[Path], Path]:
    """A pipe, which is never read to its end."""

    def change(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return _changed(change)


def _with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], Path]:
    """Weights whose header is changed, and whose bytes are as they were."""

    def apply(directory: Path) -> None:
        data = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (directory / WEIGHTS).write_bytes(_safetensors(text) + data[8 + length :])

    return _changed(apply)


def _safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _shared_bytes(header: dict[str, Any]) -> None:
    first, second = (name for name in header if name.endswith("layernorm.weight") and ".0." in name)
    header[first]["data_offsets"] = header[second]["data_offsets"]


def _many_names() -> bytes:
    entries = ",".join(f'"{number}":{EMPTY}' for number in range(150_000))
    return _safetensors(f"{{{entries}}}".encode())


def _twice(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = json.loads(header)[NAME]
    text = header[:-1] + f',"{NAME}":{json.dumps(entry)}}}'.encode()
    (directory / WEIGHTS).write_bytes(_safetensors(text) + data[8 + length :])


def _weights_like(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], Path]:
    def apply(directory: Path) -> None:
        weights = tensors(json.loads((directory / "config.json").read_bytes()))
        change(weights)
        save_file(weights, directory / WEIGHTS)

    return _changed(apply)


def _not_numbers(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.fill_(float("nan"))


def _integers(weights: dict[str, torch.Tensor]) -> None:
    weights[NAME] = weights[NAME].to(torch.int64)


def _complex(header: dict[str, Any]) -> None:
    header[NAME].update(dtype="C64", shape=[header[NAME]["shape"][0] // 2])


class _Harm:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._directory / "harm done"),)


def _only_pickles(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm(directory)))


def _saved_by_torch(
    make: Callable[[Path], bytes], compression: int = zipfile.ZIP_STORED
) -> Callable[[Path], Path]:
    """A file of torch.save with this pickle in place of its own."""

    def change(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        with zipfile.ZipFile(directory / "pytorch_model.bin", "w", compression) as archive:
            archive.writestr("archive/data.pkl", make(directory))

    return _changed(change)


def _unpickled_harm(directory: Path) -> bytes:
    return pickle.dumps({"a": _Harm(directory)}, protocol=2)


def _endless_memo(_directory: Path) -> bytes:
    """Tells the unpickler to make room for four billion objects, and for a text of four gigabytes."""
    return b"\x80\x02}r\xff\xff\xff\xffX\xff\xff\xff\xff"


def _nested(_directory: Path) -> bytes:
    return b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."


def _zeros(_directory: Path) -> bytes:
    return bytes(GIGABYTE // 2)


def _indexed(name: str) -> Callable[[Path], Path]:
    return _with_content(INDEX, json.dumps({"weight_map": {NAME: name}}).encode())


def _linked_out(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    (directory / WEIGHTS).rename(outside)
    (directory / WEIGHTS).symlink_to(outside)


def _linked_into_the_hubs_cache(directory: Path) -> None:
    blob = directory.parent / "models--owner--name" / "blobs" / "0123abcd"
    blob.parent.mkdir(parents=True)
    (directory / WEIGHTS).rename(blob)
    (directory / WEIGHTS).symlink_to(blob)


def _linked_to_itself(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(WEIGHTS)


def _with_vocabulary(**ids: int) -> Callable[[Path], Path]:
    def change(directory: Path) -> None:
        path = directory / "tokenizer.json"
        content = json.loads(path.read_bytes())
        content["model"]["vocab"].update(ids)
        path.write_text(json.dumps(content))

    return _changed(change)


def _with_model(change: Callable[[dict[str, Any]], None], *, escaped: bool = False) -> Callable[[Path], Path]:
    """A tokenizer that is changed."""

    def apply(directory: Path) -> None:
        content = json.loads((directory / "tokenizer.json").read_bytes())
        change(content)
        text = json.dumps(content)
        if escaped:
            text = text.replace("continuing", "\\u0063ontinuing")
        (directory / "tokenizer.json").write_text(text)

    return _changed(apply)


def _unprefixed(tokenizer: dict[str, Any]) -> None:
    """Cutting one byte from "é" leaves half a character."""
    model = tokenizer["model"]
    model["vocab"] |= {"é": 400, "ü": 401, "éü": 402}
    model["merges"] = [["é", "ü"]]
    model["continuing_subword_prefix"] = "x"


def _without_template_token(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] = "<gone>"


def _gguf(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        path = write_gguf(directory / "tiny.gguf")
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return write


def _gguf_number(at: int, value: int, width: int = 8) -> Callable[[Path], Path]:
    def change(data: bytearray) -> bytearray:
        data[at : at + width] = value.to_bytes(width, "little")
        return data

    return _gguf(change)


def _gguf_value(key: str, value: int, *, skip: int = 12, width: int = 4) -> Callable[[Path], Path]:
    """Overwrites what follows a key: its type (4 bytes) and, of an array, the type and number of elements."""

    def change(data: bytearray) -> bytearray:
        at = data.index(key.encode()) + len(key) + skip
        data[at : at + width] = value.to_bytes(width, "little")
        return data

    return _gguf(change)


def _gguf_nested(data: bytearray) -> bytes:
    """One key, whose value is an array of arrays of arrays ..."""
    array = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    return b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + key + array * 100_000


def _gguf_many_keys(data: bytearray) -> bytes:
    """A key of no characters, a million times."""
    count = 1_000_000
    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + count.to_bytes(8, "little")
    return head + bytes(13) * count


def _gguf_with_holes(directory: Path) -> Path:
    """A gigabyte of nothing, of which the first string of an array claims half."""
    path = directory / "tiny.gguf"
    header = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    path.write_bytes(header + key + (2**40).to_bytes(8, "little") + (2**29).to_bytes(8, "little"))
    os.truncate(path, GIGABYTE)
    return path


def _gguf_in_one_place(directory: Path) -> Path:
    """A hundred thousand tensors that are all the same bytes."""
    path = directory / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((256, 256), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    name = len("token_embd.weight")
    begin = data.index(b"token_embd.weight") - 8
    info = data[begin : begin + 8 + name + 4 + 2 * 8 + 4 + 8]
    infos = b"".join(
        info[:8] + f"blk.{number:04}.weight....".encode()[:name] + info[8 + name :]
        for number in range(10_000)
    )
    rest = data[begin + len(info) :]
    path.write_bytes(data[:8] + (10_000).to_bytes(8, "little") + data[16:begin] + infos + rest + bytes(64))
    return path


def _last_field(data: bytes) -> int:
    return gguf_fields(data)[-1][0]


def _gguf_far_offset(data: bytearray) -> bytearray:
    at = _last_field(bytes(data))
    data[at : at + 8] = (2**63).to_bytes(8, "little")
    return data


_HUGE = {"hidden_size": 2**20, "intermediate_size": 2**22, "head_dim": 2**14, "num_hidden_layers": 1024}

EXTREMES = {
    # Weights
    "a header longer than the file": Extreme(
        load_engine, _with_content(WEIGHTS, (2**20).to_bytes(8, "little") + b"{}"), "invalid header length"
    ),
    "a header of exabytes": Extreme(
        load_streamed,
        _with_content(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"),
        "at most 33554432 are read",
    ),
    "a header of brackets": Extreme(
        load_engine, _with_content(WEIGHTS, _safetensors(b"[" * 2**24)), "its header is not JSON"
    ),
    "a header of 150,000 tensors": Extreme(
        load_engine, _with_content(WEIGHTS, _many_names()), "150000 tensors; at most 131072"
    ),
    "a shape of a million dimensions": Extreme(
        load_streamed,
        _with_header(lambda header: header[NAME].update(shape=[1] * 10**6 + [32])),
        "1000001 dimensions; at most 8",
    ),
    "a shape that overflows": Extreme(
        load_engine,
        _with_header(lambda header: header[NAME].update(shape=[2**32, 2**32, 2**32])),
        "overflow computing buffer size",
    ),
    "tensors that share bytes": Extreme(
        load_engine, _with_header(_shared_bytes), "invalid offset for tensor"
    ),
    "offsets beyond the file": Extreme(
        load_streamed,
        _with_header(lambda header: header[NAME].update(data_offsets=[2**60, 2**60 + 128])),
        "invalid",
    ),
    "a tensor twice": Extreme(load_engine, _changed(_twice), "'model.norm.weight' twice"),
    "integers for weights": Extreme(
        load_engine, _weights_like(_integers), "is of int64; floating-point numbers are needed"
    ),
    "complex numbers for weights": Extreme(load_streamed, _with_header(_complex), "C64"),
    "weights that are not numbers": Extreme(load_engine, _weights_like(_not_numbers), ""),
    "weights of holes": Extreme(load_engine, _with_holes(WEIGHTS, GIGABYTE), "longer than it should be"),
    "weights that are a pipe": Extreme(load_engine, _with_pipe(WEIGHTS), "holds neither"),
    "only a pickle": Extreme(load_engine, _changed(_only_pickles), "pytorch_model.bin cannot be read"),
    "code in weights of torch": Extreme(
        load_engine, _saved_by_torch(_unpickled_harm), "is code and no tensor"
    ),
    "a pickle that wants memory": Extreme(load_engine, _saved_by_torch(_endless_memo), "header is damaged"),
    "a nested pickle": Extreme(load_engine, _saved_by_torch(_nested), "holds a list; tensors by name are"),
    "a pickle that grows": Extreme(
        load_engine, _saved_by_torch(_zeros, zipfile.ZIP_DEFLATED), "is compressed, which torch.save never"
    ),
    "weights linked from elsewhere": Extreme(
        load_engine, _changed(_linked_out), "outside the model's directory"
    ),
    "weights linked to themselves": Extreme(load_engine, _changed(_linked_to_itself), "holds neither"),
    "weights linked into the Hub's cache": Extreme(load_engine, _changed(_linked_into_the_hubs_cache), ""),
    # The index
    "an index of other directories": Extreme(
        load_engine, _indexed("../outside.safetensors"), "must name files in its own directory"
    ),
    "an index of absolute paths": Extreme(
        load_engine, _indexed("/etc/passwd"), "must name files in its own directory"
    ),
    "an index of its directory": Extreme(load_engine, _indexed("."), "must name files in its own directory"),
    "an index of a name with NUL": Extreme(
        load_engine, _indexed("model.safetensors\0"), "must name files in its own directory"
    ),
    "an index of an endless name": Extreme(
        load_engine, _indexed("x" * 10**6), "names files that are not there"
    ),
    "an index of shards that are missing": Extreme(
        load_engine, _indexed("model-00007-of-00009.safetensors"), "'model-00007-of-00009.safetensors'"
    ),
    "an index of a terabyte": Extreme(load_engine, _with_holes(INDEX), "is larger than"),
    # config.json and generation_config.json
    "a hidden size of a trillion": Extreme(
        load_engine,
        _with_config(hidden_size=10**12),
        "hidden_size is 1000000000000; it must be at most 1048576",
    ),
    "a negative hidden size": Extreme(
        load_engine, _with_config(hidden_size=-32), "hidden_size is -32; it must be a positive integer"
    ),
    "a hidden size of one half": Extreme(
        load_engine, _with_config(hidden_size=0.5), "hidden_size is 0.5; it must be a positive integer"
    ),
    "the largest sizes of all": Extreme(
        load_engine, _with_config(**_HUGE, vocab_size=2**22), "does not fit the machine's memory"
    ),
    "more layers than weights": Extreme(load_engine, _with_config(num_hidden_layers=1024), "lacks"),
    "layers beyond counting": Extreme(
        load_engine,
        _with_config(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000; it must be at most",
    ),
    "a context beyond all memory": Extreme(
        load_engine,
        _with_config(max_position_embeddings=2**27, head_dim=2**14),
        "set max_model_len to what is needed",
    ),
    "a number of 4,000 digits": Extreme(
        load_engine, _with_config(rope_theta=10**4000), "rope_theta is 1000000"
    ),
    "a configuration of a terabyte": Extreme(load_engine, _with_holes("config.json"), "is larger than"),
    "a configuration that is a pipe": Extreme(load_engine, _with_pipe("config.json"), "no config.json"),
    "a configuration of brackets": Extreme(
        load_engine, _with_content("config.json", b'{"a":' + b"[" * 10**6), "is nested too deeply"
    ),
    "a quantization that is no object": Extreme(
        load_engine, _with_config(quantization_config="awq"), "quantization_config is 'awq'"
    ),
    "ends of text without end": Extreme(
        load_engine,
        _with_json("generation_config.json", eos_token_id=list(range(300))),
        "eos_token_id names more than 256 tokens",
    ),
    "a temperature beyond numbers": Extreme(
        load_text, _with_json("generation_config.json", temperature=10**400), "temperature is 1000000"
    ),
    # The tokenizer
    "a token of the highest id": Extreme(
        load_text, _with_vocabulary(evil=2**32 - 1), "a token has the id 4294967295"
    ),
    "a prefix that merges lack": Extreme(
        load_text, _with_model(_unprefixed), "has no continuing_subword_prefix"
    ),
    "a prefix in other letters": Extreme(
        load_text, _with_model(_unprefixed, escaped=True), "has no continuing_subword_prefix"
    ),
    "a template of a token that is not there": Extreme(
        load_text, _with_model(_without_template_token), "no entry found for key"
    ),
    "a token of 5,000 characters": Extreme(
        load_text, _with_vocabulary(**{"x" * 5000: 322}), "its tokens cannot be constrained"
    ),
    "a tokenizer of a terabyte": Extreme(load_text, _with_holes("tokenizer.json"), "is larger than"),
    "a tokenizer of brackets": Extreme(
        load_text, _with_content("tokenizer.json", b'{"model":' + b"[" * 10**6), "not a tokenizer"
    ),
    "a tokenizer of a terabyte, asked for its end of text": Extreme(
        load_engine, _with_holes("tokenizer.json"), "is larger than"
    ),
    "a tokenizer of brackets, asked for its end of text": Extreme(
        load_engine,
        _with_content("tokenizer.json", b'{"added_tokens":' + b"[" * 10**6),
        "is nested too deeply",
    ),
    "a tokenizer's settings of brackets": Extreme(
        load_text, _with_content("tokenizer_config.json", b'{"a":' + b"[" * 10**6), "is nested too deeply"
    ),
    "a template of a terabyte": Extreme(load_text, _with_holes("chat_template.jinja"), "is larger than"),
    # GGUF
    "more tensors than there are atoms": Extreme(load_gguf, _gguf_number(8, 2**63), "at most 131,072"),
    "more keys than there are atoms": Extreme(load_gguf, _gguf_number(16, 2**63), "at most 131,072"),
    "a string of exabytes": Extreme(load_gguf, _gguf_number(24, 2**62), "ends inside its header"),
    "an array of exabytes": Extreme(
        load_gguf, _gguf_value("tokenizer.ggml.token_type", 2**62, skip=8, width=8), "ends inside its header"
    ),
    "an array of endless strings": Extreme(
        load_gguf, _gguf_value("tokenizer.ggml.tokens", 2**62, skip=8, width=8), "corrupt or truncated"
    ),
    "arrays in arrays": Extreme(load_gguf, _gguf(_gguf_nested), "has an array of type 9"),
    "one key a million times": Extreme(load_gguf, _gguf(_gguf_many_keys), "at most 131,072 and 65,536"),
    "a string of half a gigabyte": Extreme(load_gguf, _gguf_with_holes, "header of more than"),
    "a value of an unknown type": Extreme(
        load_gguf, _gguf_value("llama.block_count", 77, skip=0), "metadata of the unknown type 77"
    ),
    "blocks beyond counting": Extreme(
        load_gguf, _gguf_value("llama.block_count", 2**31, skip=4), "must be between 1 and 1024"
    ),
    "more blocks than tensors": Extreme(
        load_gguf, _gguf_value("llama.block_count", 1024, skip=4), "asks for 1024 layers, and there are"
    ),
    "no heads": Extreme(
        load_gguf, _gguf_value("llama.attention.head_count", 0, skip=4), "must be between 1 and 65536"
    ),
    "a tensor beyond the file": Extreme(load_gguf, _gguf(_gguf_far_offset), "truncated: tensor"),
    "10,000 tensors in one place": Extreme(load_gguf, _gguf_in_one_place, "in the same place"),
    "a file cut in half": Extreme(load_gguf, _gguf(lambda data: data[: len(data) // 2]), "truncated: tensor"),
}


def main() -> None:
    """Tries every case, each in a forked process, and prints how each ended, as JSON. Has to be the first
    thing that a process does: what is forked has none of its threads."""
    warm_up()
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="extremes-") as scratch:
        for number, (name, extreme) in enumerate(EXTREMES.items()):
            directory = Path(scratch) / str(number) / "model"
            directory.mkdir(parents=True)
            path = extreme.write(directory)
            outcomes[name] = asdict(run_case((extreme.load,), path, Path(scratch) / "log"))
            shutil.rmtree(directory.parent)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
