"""Names of models as Ollama has them: "name:tag", where "latest" is the tag of a name without one."""

from __future__ import annotations

from frontend.served_model import ServedModel
from pagewire.base.errors import NotFound

_LATEST = ":latest"


def served_name(model: ServedModel, name: str | None) -> str:
    """The name under which the model is served that a client calls `name`; the first for no name.

    Raises:
        NotFound: it is no name of this model.
    """
    if not name:
        return model.names[0]
    for candidate in (name, name.removesuffix(_LATEST), name + _LATEST):
        if candidate in model.all_names:
            return candidate
    raise NotFound(
        f"model '{name}' not found; this server has {', '.join(map(tagged, model.all_names))}", param="model"
    )


def tagged(name: str) -> str:
    """A served name with a tag, as lists of models have it."""
    return name if ":" in name.rpartition("/")[2] else name + _LATEST
