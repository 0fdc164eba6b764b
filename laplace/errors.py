"""Errors that the core library raises on purpose."""

from __future__ import annotations

from collections.abc import Sequence

from laplace import _clash as _clash  # says so where laplace-torch has replaced laplace/__init__.py

_FIT = "Nothing was added to the sum for this batch; clean these examples or the model's weights and fit again."


class NonFiniteError(ValueError):
    """NaN or Inf met while curvature was accumulated, or predictions were scored.

    Attributes:
        examples: Indices of the offending examples, counted from the start of the data set (or of the pass over the
            loader, where the caller gave no offset).
    """

    def __init__(self, what: str, examples: Sequence[int], advice: str = _FIT):
        """Describe the offence and remember which examples caused it."""
        self.examples = list(examples)
        shown = ", ".join(str(i) for i in self.examples[:10]) + (", …" if len(self.examples) > 10 else "")
        super().__init__(f"{what} is NaN or Inf for {len(self.examples)} example(s): indices {shown}. {advice}")

    def __reduce__(self):
        """Survive a trip through pickle between processes."""
        return _rebuild_non_finite, (str(self), self.examples)


def _rebuild_non_finite(message: str, examples: list[int]) -> NonFiniteError:
    error = NonFiniteError.__new__(NonFiniteError)
    ValueError.__init__(error, message)
    error.examples = examples
    return error


class MissingKeyError(KeyError, ValueError):
    """A dict-like batch lacks the key of its inputs or targets."""

    def __str__(self) -> str:
        """The message itself; a KeyError would show it in quotes."""
        return str(self.args[0])


class CallError(ValueError):
    """A model's ``forward`` takes neither a batch as a whole nor all of its keys by name."""


class NotEnoughMemoryError(MemoryError, ValueError):
    """A request that cannot fit into the free memory; raised before anything is allocated."""


class NotFittedError(RuntimeError):
    """A quantity of the posterior was asked for before ``fit``."""
