"""The identity of a checkpoint, for who must know whether two workers compute the same model."""

from __future__ import annotations

from pathlib import Path

from engine.loader.checkpoint import open_checkpoint
from pagewire.hub.fingerprint import fingerprint_of

# What a request's tokens depend on beside the weights.
_SMALL_FILES = (
    *("config.json", "quantize_config.json", "quant_config.json"),
    *("tokenizer.json", "tokenizer.model", "qwen.tiktoken"),
)


def fingerprint(
    directory: Path, load_format: str, seed: int, quantization: str = "auto", kv_cache_dtype: str = "auto"
) -> str:
    """Equal for copies of a checkpoint, different for any other, also for one of the same shape; see
    `fingerprint_of`. Of random weights it is what they are made from. Weights that are quantized as they are
    loaded are others, and so are tokens whose keys and values are kept in another format.

    Raises:
        ConfigError: the checkpoint is not complete.
    """
    small = [directory / name for name in _SMALL_FILES if (directory / name).is_file()]
    made = "" if quantization == "auto" else quantization
    if kv_cache_dtype != "auto":
        made = f"{made} kv fp8_e4m3".lstrip()
    if load_format == "dummy":
        return fingerprint_of(small, f"dummy {seed} {made}".rstrip())
    return fingerprint_of([*small, *open_checkpoint(directory).files], made)
