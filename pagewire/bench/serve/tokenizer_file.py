"""Finds the tokenizer whose tokens text prompts are made of, without the model that it belongs to."""

from __future__ import annotations

from pathlib import Path

from pagewire.base.cache_home import cache_home
from pagewire.base.errors import ConfigError
from pagewire.hub import ALIASES, resolve_model
from pagewire.hub.names.reference import is_repository_id
from pagewire.hub.tokenizer.files import tokenizer_file

_FILE = "tokenizer.json"


def find_tokenizer(name: str) -> Path:
    """The tokenizer.json of a name: that file, a directory that has a tokenizer, an alias, or a Hugging Face
    id, of which nothing else is fetched.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return tokenizer_file(path)
    if path.is_file():
        return path
    if name in ALIASES:
        return resolve_model(name, progress=True) / _FILE
    if is_repository_id(name):
        return _fetch(name)
    raise ConfigError(
        f"tokenizer is {name!r}; it must be a {_FILE}, a directory that has one, a Hugging Face id "
        f"(owner/name) or one of: {', '.join(ALIASES)}",
        param="tokenizer",
    )


def _fetch(model: str) -> Path:
    # Imported here because it is slow and most tokenizers are local.
    from huggingface_hub import hf_hub_download

    try:
        # The user says which model; a tokenizer is data.
        return Path(hf_hub_download(model, _FILE, cache_dir=cache_home() / "huggingface"))  # nosec B615
    except Exception as error:  # which HTTP library it lets through depends on huggingface_hub's version
        raise ConfigError(
            f"{model}: its {_FILE} cannot be fetched from the Hugging Face Hub: {error}", param="tokenizer"
        ) from error
