"""What a model's directory tells of its weights without reading them: their size, number and formats."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pagewire.base.gguf_blocks import KEPT, METADATA_KEY, block_size
from pagewire.hub.model_files import MAX_CONFIG_BYTES, read_json_object

logger = logging.getLogger(__name__)

_UNKNOWN = datetime.fromtimestamp(0, UTC)
_HEADER_LENGTH = 8
"""Bytes at the beginning of a safetensors file: the length of the JSON that follows, little endian."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """Facts for people and for clients that list models; nothing is computed with them. What a directory
    does not tell is empty or None.

    Attributes:
        config: config.json; of a model of several parts, that of its text.
        weight_format: "safetensors" or "gguf".
        size: bytes of the weights.
        num_parameters: how many numbers the weights are, None where they are packed.
        number_format: that of most of them: "BF16", or the method that packed them, as in "GPTQ-4bit".
        digest: 64 hexadecimal digits that other weights would not have.
        modified_at: when config.json was last written.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    weight_format: str = ""
    size: int = 0
    num_parameters: int | None = None
    number_format: str = ""
    digest: str = ""
    modified_at: datetime = _UNKNOWN

    @classmethod
    def load(cls, directory: Path) -> CheckpointFacts:
        """Reads config.json and the headers of safetensors files.

        Raises:
            ConfigError: config.json is there and wrong. (Wrong weights are for the engine to report.)
        """
        config_file = directory / "config.json"
        if not config_file.is_file():
            return cls()
        config = read_json_object(config_file)
        weights = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.gguf"))
        headers = [_header(path) for path in weights if path.suffix == ".safetensors"]
        num_parameters, number_format = _numbers(headers)
        packing = config.get("quantization_config")
        if isinstance(packing, dict):
            num_parameters, number_format = None, _packing(packing)
        text = config.get("text_config")
        return cls(
            config={**config, **text} if isinstance(text, dict) else config,
            weight_format=weights[0].suffix.removeprefix(".") if weights else "",
            size=sum(path.stat().st_size for path in weights),
            num_parameters=num_parameters,
            number_format=number_format,
            digest=_digest(config, weights, headers),
            modified_at=datetime.fromtimestamp(int(config_file.stat().st_mtime), UTC),
        )

    @property
    def family(self) -> str:
        """The architecture's short name, such as "llama"; empty if it is not known."""
        family = self.config.get("model_type")
        return family if isinstance(family, str) else ""

    def number(self, name: str) -> int | float | None:
        """A number of config.json, None if it has no such."""
        value = self.config.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _header(path: Path) -> dict[str, Any]:
    """Names, formats and shapes of a safetensors file's tensors; empty if they cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
            if length > MAX_CONFIG_BYTES:
                return {}
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        logger.debug("%s: its header cannot be read: %s", path, error)
        return {}
    return header if isinstance(header, dict) else {}


def _numbers(headers: Sequence[Mapping[str, Any]]) -> tuple[int | None, str]:
    """How many numbers there are, and the format that most of them have."""
    counts: Counter[str] = Counter()
    for header in headers:
        blocks = _blocks(header)
        for name, entry in header.items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if not isinstance(shape, list) or not all(isinstance(each, int) for each in shape):
                continue
            if name in blocks:
                values, num_bytes = block_size(blocks[name])
                counts[blocks[name]] += math.prod(shape) // num_bytes * values
            else:
                counts[str(entry.get("dtype", ""))] += math.prod(shape)
    if not counts:
        return None, ""
    return sum(counts.values()), counts.most_common(1)[0][0]


def _blocks(header: Mapping[str, Any]) -> dict[str, str]:
    """The formats of matrices that are in a GGUF file's blocks, by tensor; none where that cannot be read."""
    metadata = header.get("__metadata__")
    try:
        blocks = json.loads(metadata[METADATA_KEY]) if isinstance(metadata, dict) else {}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(blocks, dict):
        return {}
    return {name: kind for name, kind in blocks.items() if kind in KEPT}


def _packing(quantization: Mapping[str, Any]) -> str:
    method = str(quantization.get("quant_method", "quantized")).upper()
    bits = quantization.get("bits")
    return f"{method}-{bits}bit" if isinstance(bits, int) else method


def _digest(config: Mapping[str, Any], weights: Sequence[Path], headers: Sequence[Mapping[str, Any]]) -> str:
    told = [config, [(path.name, path.stat().st_size) for path in weights], list(headers)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
