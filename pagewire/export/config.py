"""What an export is asked for. No torch here: the command line looks at this before anything slow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagewire.base.errors import ConfigError

# Method -> the bits that it writes, the first of which is the default.
METHOD_BITS: dict[str, tuple[int, ...]] = {"awq": (4,), "gptq": (4, 8), "fp8": (8,), "int8": (8,)}
GROUPED = ("awq", "gptq")
DEFAULT_GROUP_SIZES = (128, 64, 32)
TARGETS = ("hf", "gguf")
GGUF_TYPES = ("f16", "bf16", "f32", "q8_0", "q4_0", "q4_1")
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """One export.

    Attributes:
        model: what to export: a directory in Hugging Face layout, a .gguf file, owner/name on a hub or an
            alias.
        out: the directory, or with `to` "gguf" the file, to write.
        merge_lora: an adapter whose weights are added to the model's; a directory as PEFT and ms-swift write
            it.
        quant_method: "awq", "gptq", "fp8" or "int8"; None writes plain weights.
        quant_bits: of a weight; None for the method's own.
        group_size: inputs that share a scale, -1 for all of them; None for 128, or where that does not
            divide the model's matrices 64 or 32.
        dataset: lines of JSON to calibrate with; None for the text that comes with pagewire.
        num_samples: how many texts to calibrate with.
        sample_length: tokens of each.
        to: "hf" or "gguf".
        gguf_type: how matrices are stored in a GGUF file.
        dtype: of what is not quantized; "auto" for the checkpoint's own, of a GGUF file bfloat16.
        device: where to compute: "auto", "cpu", "cuda" or "cuda:N".
    """

    model: str
    out: Path
    merge_lora: str | None = None
    quant_method: str | None = None
    quant_bits: int | None = None
    group_size: int | None = None
    dataset: Path | None = None
    num_samples: int = 128
    sample_length: int = 512
    to: str = "hf"
    gguf_type: str = "f16"
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises ConfigError for what no model can be exported to."""
        _require(self.to in TARGETS, "to", self.to, " or ".join(TARGETS))
        _require(self.gguf_type in GGUF_TYPES, "gguf_type", self.gguf_type, " or ".join(GGUF_TYPES))
        _require(self.dtype in DTYPES, "dtype", self.dtype, " or ".join(DTYPES))
        _require(0 < self.num_samples <= 2**16, "num_samples", self.num_samples, "1 to 65536")
        _require(8 <= self.sample_length <= 2**15, "sample_length", self.sample_length, "8 to 32768")
        self._check_method()

    @property
    def bits(self) -> int:
        """Of a quantized weight."""
        assert self.quant_method is not None
        return self.quant_bits or METHOD_BITS[self.quant_method][0]

    def _check_method(self) -> None:
        method = self.quant_method
        if method is None:
            given = [
                name for name in ("quant_bits", "group_size", "dataset") if getattr(self, name) is not None
            ]
            if given:
                raise ConfigError(
                    f"{given[0]} is given without quant_method, which is {', '.join(METHOD_BITS)}",
                    param=given[0],
                )
            return
        _require(method in METHOD_BITS, "quant_method", method, ", ".join(METHOD_BITS))
        allowed = METHOD_BITS[method]
        what = f"{' or '.join(map(str, allowed))} for {method}"
        _require(self.bits in allowed, "quant_bits", self.quant_bits, what)
        if self.group_size is not None:
            if method not in GROUPED:
                raise ConfigError(
                    f"group_size is {self.group_size}, and {method} has a scale for each output; group_size "
                    f"is for {' and '.join(GROUPED)}",
                    param="group_size",
                )
            _require(
                self.group_size == -1 or self.group_size >= 8, "group_size", self.group_size, "-1 or >= 8"
            )
        if method == "fp8" and self.dataset is not None:
            raise ConfigError("fp8 rounds weights to nearest and needs no dataset", param="dataset")
        if self.to == "gguf":
            raise ConfigError(
                "a GGUF file has quantized formats of its own: give gguf_type, such as q4_0, in place of "
                "quant_method",
                param="quant_method",
            )


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}", param=name)
