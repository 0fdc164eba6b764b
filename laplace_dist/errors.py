"""The errors that a job reports to its user, one class per way to act on them."""

from __future__ import annotations


class SettingsError(ValueError):
    """The settings, or the state that they meet, are refused before any work is done (exit status 2).

    Attributes:
        problems: `(field, text)` pairs where the error comes from validating settings, else empty.
    """

    def __init__(self, message: str, problems: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class CallFailed(SettingsError):
    """What an import path names has raised an error, which is the cause of this one."""


class CheckpointError(RuntimeError):
    """An object of the checkpoint is missing, truncated, altered or foreign (exit status 1).

    The message names the object by its key and says what to do.
    """


class MissingObjectError(CheckpointError):
    """An object that should be in the checkpoint is not there."""


class ForeignError(CheckpointError):
    """A whole object of another run: one that lay there before, deleted while a worker of it was still at work."""


class StorageError(CheckpointError):
    """The storage did not answer, or answered with a failure, often enough: another attempt may succeed."""


class RunFailed(RuntimeError):
    """The run cannot go on: no space left, a budget is exhausted, or a segment fails every time (exit status 1)."""


class OutOfMemory(RunFailed):
    """Every attempt at a task ran out of memory, and no task has finished: the run asks for more than there is (exit status 1).

    Attributes:
        of_sums: The sums did not fit, rather than a batch.
    """

    def __init__(self, message: str, *, of_sums: bool) -> None:
        super().__init__(message)
        self.of_sums = of_sums


class Interrupted(BaseException):
    """The process was asked to end, by SIGINT or SIGTERM (exit status 130 or 143); no error, and not to be handled as one.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ExampleError(RuntimeError):
    """The data set raised an error while one example was read.

    Attributes:
        examples: indices of the examples concerned.
    """

    def __init__(self, message: str, examples: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.examples = list(examples)


def listed(names: list[str], limit: int = 8) -> str:
    """Write names for a message, not too many of them."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
