"""Values that are not finite, named by the example that holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace.errors import NonFiniteError


def check_finite(what: str, values: Tensor, offset: int, *advice: str) -> None:
    """Raise :class:`NonFiniteError` naming the rows of ``values`` that hold NaN or Inf."""
    if bool(torch.isfinite(values.sum())):
        return
    wrong = (~torch.isfinite(values)).reshape(values.shape[0], -1).any(1)
    if bool(wrong.any()):  # a finite batch may overflow in its sum alone
        raise NonFiniteError(what, [offset + int(i) for i in wrong.nonzero().flatten()], *advice)


def check_scored_finite(what: str, values: Tensor, offset: int) -> None:
    """The same of what is scored on data that are not fitted: validation, test and out-of-distribution examples."""
    check_finite(what, values, offset, "Nothing is scored with them: clean these examples, or leave them out.")


def first_wrong(wrong: Tensor, values: Tensor, offset: int) -> tuple[int, float | int, int]:
    """The first example with a wrong value, that value, and how many examples have one.

    Args:
        wrong: Where ``values`` are wrong, of their shape.
        values: Targets ``(batch, …)``.
        offset: Index of the first example in the data set.
    """
    rows = wrong.reshape(len(wrong), -1).any(1)
    first = int(rows.nonzero()[0])
    value = values[first].reshape(-1)[wrong[first].reshape(-1)][0].item()
    return offset + first, value, int(rows.sum())


def missing_dimension(f: Tensor, y: Tensor) -> str:
    """The end of a sentence about targets: what to write where they lack the dimension of their one output."""
    return ": targets.unsqueeze(-1)." if f.shape[-1] == 1 and y.shape == f.shape[:-1] else "."
