"""Chat templates for families whose checkpoints have none, or have code in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagewire.hub.model_files import read_json_object

_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Attributes:
    template: a file's name.
    model_types: as config.json has them.
    tokens: the control tokens that the template names.
    vocab_sizes: those of the model, if they tell it from others of its type.
    """

    template: str
    model_types: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    vocab_sizes: tuple[int, ...] = ()


_FAMILIES = (
    _Family(
        template="chatglm3", model_types=("chatglm",), tokens=("[gMASK]", "sop", "<|user|>", "<|assistant|>")
    ),
    _Family(template="baichuan2", model_types=("baichuan",), vocab_sizes=(125696,)),
    _Family(template="baichuan1", model_types=("baichuan",), tokens=("</s>",)),
    _Family(template="qwen1", model_types=("qwen",), tokens=("<|im_start|>", "<|im_end|>")),
    _Family(template="chatml", model_types=("Yi", "llama"), tokens=("<|im_start|>", "<|im_end|>")),
    _Family(template="llama2", model_types=("llama",), tokens=("<s>", "</s>"), vocab_sizes=(32000,)),
    _Family(
        template="mistral1", model_types=("mistral", "mixtral"), tokens=("<s>", "</s>"), vocab_sizes=(32000,)
    ),
)


def builtin_template(model_dir: Path, has_token: Callable[[str], bool]) -> Path | None:
    """The template of a model's family, if there is one here. Base models of a family get it too, unless
    their files say that they do not converse.

    Args:
        has_token: whether the tokenizer has a token of this text.

    Raises:
        ConfigError: config.json or generation_config.json is malformed.
    """
    config = _read(model_dir / "config.json")
    if _read(model_dir / "generation_config.json").get("chat_format") == "raw":
        return None  # how Qwen's first version says so
    if "chatglm2" in str(config.get("_name_or_path", "")).lower():
        return None  # which shares model_type and vocabulary with ChatGLM3, and knows no roles
    for family in _FAMILIES:
        if config.get("model_type") not in family.model_types:
            continue
        if family.vocab_sizes and config.get("vocab_size") not in family.vocab_sizes:
            continue
        if all(map(has_token, family.tokens)):
            return _FOLDER / f"{family.template}.jinja"
    return None


def _read(path: Path) -> Mapping[str, Any]:
    return read_json_object(path) if path.is_file() else {}
