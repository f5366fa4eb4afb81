"""How a checkpoint does not fit a model, as one error."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pagewire.base.errors import ConfigError

# Of each kind: in the error, which is one line, and in the log, which may be long.
SHOWN = 3
LOGGED = 200

logger = logging.getLogger(__name__)


class NotInModel(Exception):
    """A checkpoint's tensor is for no parameter of the model."""

    def __init__(self, name: str, source: str) -> None:
        super().__init__(name, source)
        self.name, self.source = name, source


class WrongTensor(ConfigError):
    """A checkpoint's tensor is for a parameter that cannot take it: its shape, its dtype, or its being the
    second one.

    Attributes:
        targets: the model's tensors that it was for.
    """

    def __init__(self, name: str, source: str, fault: str, targets: Collection[str]) -> None:
        super().__init__(f"{source}: tensor {name!r} {fault}")
        self.name, self.fault, self.targets = name, fault, targets


class Misfits:
    """What was found wrong, by kind.

    Attributes:
        missing: parameters of the model that the checkpoint does not have.
    """

    def __init__(self) -> None:
        self.missing: Sequence[str] = ()
        self._not_in_model: list[NotInModel] = []
        self._wrong: list[WrongTensor] = []

    def add(self, misfit: NotInModel | WrongTensor) -> None:
        """Takes note of a tensor."""
        if isinstance(misfit, NotInModel):
            self._not_in_model.append(misfit)
        else:
            self._wrong.append(misfit)

    def raise_if_any(self, checkpoint: str) -> None:
        """Raises ConfigError that names all kinds and some tensors of each; the log has more of them."""
        parts = [*self._missing_part(), *self._not_in_model_part(), *self._wrong_part()]
        if not parts:
            return
        if max(len(self.missing), len(self._not_in_model), len(self._wrong)) > 1:
            self._log(checkpoint)
        raise ConfigError(f"{checkpoint} does not fit the model: {'; '.join(parts)}")

    def _missing_part(self) -> Iterable[str]:
        if self.missing:
            yield f"it lacks {len(self.missing)} tensors of the model: {_shown(self.missing)}"

    def _not_in_model_part(self) -> Iterable[str]:
        if len(self._not_in_model) == 1:
            [only] = self._not_in_model
            yield f"tensor {only.name!r} is not part of this model (in {Path(only.source).name})"
        elif self._not_in_model:
            names = [misfit.name for misfit in self._not_in_model]
            yield f"{len(names)} tensors are not part of this model: {_shown(names)}"

    def _wrong_part(self) -> Iterable[str]:
        by_fault: dict[str, list[str]] = {}
        for misfit in self._wrong:
            by_fault.setdefault(misfit.fault, []).append(misfit.name)
        for fault, names in list(by_fault.items())[:SHOWN]:
            if len(names) == 1:
                yield f"tensor {names[0]!r} {fault}"
            else:
                yield f"each of {len(names)} tensors ({_shown(names)}) {fault}"
        if len(by_fault) > SHOWN:
            others = sum(map(len, list(by_fault.values())[SHOWN:]))
            yield f"{others} more tensors are of a wrong shape or dtype"

    def _log(self, checkpoint: str) -> None:
        lines = [f"lacks {name}" for name in self.missing[:LOGGED]]
        lines += [f"{each.name!r} is not part of the model" for each in self._not_in_model[:LOGGED]]
        lines += [f"{each.name!r} {each.fault}" for each in self._wrong[:LOGGED]]
        for line in lines:
            logger.error("%s: %s", checkpoint, line)


def _shown(names: Iterable[str]) -> str:
    """Some of the names; those that differ in the number of their layer alone, or of their expert, are shown
    as one."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    shown = [
        group[0] if len(group) == 1 else f"{pattern} ({len(group)})"
        for pattern, group in list(alike.items())[:SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(alike) > SHOWN else "")
