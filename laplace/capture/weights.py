"""Variances of one parameter's entries in the basis in which its covariance is diagonal, made for a part of them at a time.

Those of a large weight under many priors are more than memory gives at a good rate: what is made of a few of its rows for
all priors stays in a processor's cache until it is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ALL = slice(None)

Part = slice | Tensor
Weight = Callable[[slice, Part, Part], Tensor]
"""From a range of the priors, and some rows and columns of the weight ``(out, in)``, to ``(priors, rows, columns)``.

Rows and columns may be given by their numbers.

Parameters that are no matrices have one column.
"""


def constant(*matrices: Tensor) -> Weight:
    """Variances that are there already, ``(out, in)`` or ``(out,)`` for each prior."""
    whole = torch.stack([as_matrix(matrix) for matrix in matrices])
    return lambda priors, rows, columns: whole[priors][:, rows][:, :, columns]


def transposed(weight: Weight) -> Weight:
    """Of the transposed weight."""
    return lambda priors, rows, columns: weight(priors, columns, rows).mT


def under(weight: Weight, t: int) -> Tensor:
    """The variances of all entries under one prior, ``(out, in)``."""
    return weight(slice(t, t + 1), ALL, ALL)[0]


def as_matrix(values: Tensor) -> Tensor:
    """Values of a parameter as ``(out, in)``, with one column if it is no matrix."""
    return values if values.ndim == 2 else values.reshape(-1, 1)


@contextmanager
def mixed_into(total: Tensor, coefficients: Tensor | None) -> Iterator[Tensor]:
    """What is added to inside the block, by other priors, is added to the total by ``(priors, others)`` coefficients."""
    if coefficients is None:
        yield total
        return
    part = total.new_zeros(coefficients.shape[1], *total.shape[1:])
    yield part
    total += torch.tensordot(coefficients.to(total.dtype), part, 1)
