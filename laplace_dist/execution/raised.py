"""What a task raised, as plain data: the driver may not have the class, or be unable to unpickle the object.

Everything that a task raises is turned into a `Raised` in the process that carried it out, and in one place.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laplace_dist import errors

FRAMES = 3  # of the traceback that are kept: what raised, and who called it
_OWN = (
    errors.SettingsError,
    errors.MissingObjectError,
    errors.StorageError,
    errors.CheckpointError,
    errors.RunFailed,
    errors.ExampleError,
)


@dataclass(frozen=True)
class Raised:
    """An error of a task.

    Attributes:
        classes: Full names of the error's class and of all that it derives from, the most special one first.
        text: What it says.
        causes: The same names for the error that it came from, if there was one.
        trace: The last places of the traceback, such as `model.py:12 in forward`; the innermost last.
        examples: Indices of the examples concerned, where the error knows them.
    """

    classes: tuple[str, ...]
    text: str
    causes: tuple[str, ...] = ()
    trace: tuple[str, ...] = ()
    examples: tuple[int, ...] = ()

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        """Describe an error."""
        told = traceback.TracebackException.from_exception(error)
        frames = told.stack[-FRAMES:]
        found = getattr(error, "examples", ())
        return cls(
            classes=_names(error),
            text=str(told).strip(),
            causes=_names(error.__cause__) if error.__cause__ is not None else (),
            trace=tuple(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames),
            examples=tuple(map(int, found)) if isinstance(found, (list, tuple)) else (),
        )

    @property
    def type(self) -> str:
        """The name of its class, without the underscore of those that are known by another one, as torch's LinAlgError is."""
        return self.classes[0].rpartition(".")[2].lstrip("_")

    def is_a(self, *names: str) -> bool:
        """Say whether its class is, or derives from, one of these."""
        return any(name in self.classes for name in names)

    def __str__(self) -> str:
        return f"{self.type}: {self.text}" if self.text else self.type

    def rebuilt(self) -> Exception:
        """Return an error to raise in this process: of its class where that is this project's own, else of a general one."""
        for name in self.classes:
            for own in _OWN:
                if name == _name(own):
                    return own(self.text)
        return ValueError(self.text) if self.is_a("builtins.ValueError") else RuntimeError(self.located())

    def located(self) -> str:
        """Return it in one line, with the place that raised it and the examples concerned."""
        where = f" ({self.trace[-1]})" if self.trace else ""
        shown = [str(index) for index in self.examples if str(index) not in self.text]
        which = f", examples {errors.listed(shown)}" if shown else ""
        return f"{' '.join(str(self).split())}{where}{which}"


def outcome_of(call: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | Raised:
    """Return what a call returns, or what it raised as plain data.

    This is the one place where any exception is caught: whose code a task runs is not known here.
    """
    try:
        return call()
    except Exception as error:
        return Raised.of(error)


def _names(error: BaseException) -> tuple[str, ...]:
    return tuple(map(_name, type(error).__mro__))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
