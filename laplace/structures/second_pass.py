"""Structures that pass over the data twice: the first pass finds a basis, the second adds up the curvature in it.

Both passes are sums over examples. Between them the basis is found once, from the finished sums of the first, and whoever
spreads the passes over processes keeps it, so that every part of the second is a sum in the same basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums


@dataclass(frozen=True)
class BasisPart:
    """One array of a basis.

    Attributes:
        shape: Of the array.
        factors: Names of the first pass's sums that it is found from.
        cost: Of finding it, in the unit of a cubed width.
    """

    shape: tuple[int, ...]
    factors: tuple[str, ...]
    cost: float


@dataclass(frozen=True)
class SecondPass:
    """What a structure does between its passes and after them.

    Attributes:
        name: Of the pass, one word.
        spec: From the specification of the first pass's sums to that of the second's, which names another structure.
        basis: The arrays of the basis by name, from the specification of the first pass's sums.
        find: One array of the basis, from the first pass's specification, the array's name, the finished sums that it is found
            from by name (float64) and the number of examples. Equal sums give equal arrays.
        finish: From the finished sums of the second pass and the basis to the sums of the posterior, the basis among them.
    """

    name: str
    spec: Callable[[SumsSpec], SumsSpec]
    basis: Callable[[SumsSpec], dict[str, BasisPart]]
    find: Callable[[SumsSpec, str, Mapping[str, Tensor], float], Tensor]
    finish: Callable[[CurvatureSums, Mapping[str, Tensor]], CurvatureSums]

    def find_all(self, sums: CurvatureSums) -> dict[str, Tensor]:
        """The whole basis from the first pass's finished sums, in one process."""
        spec = sums.spec
        return {
            name: self.find(spec, name, {factor: sums.tensors[factor] for factor in part.factors}, sums.n_data)
            for name, part in self.basis(spec).items()
        }
