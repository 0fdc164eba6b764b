r"""What the raw sums of a structure are called and how they are shaped, for one model: written down, compared, and cut.

A sum may hold some of the factors alone, and of symmetric ones some of the rows: what does not fit into one memory is added up
in several passes over the data, or by several processes. Each entry has the bits that it has in the whole sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from laplace import _clash as _clash  # says so where laplace-torch has replaced laplace/__init__.py
from laplace.capture.blocks import Block
from laplace.linalg.gram import BLOCK


@dataclass(frozen=True)
class Factor:
    """Shape of one named sum; ``symmetric`` sums may be stored as one triangle."""

    shape: tuple[int, ...]
    symmetric: bool = False


Rows = Mapping[str, tuple[int, int]]
"""The factors that a sum holds by name, each with its first row and one past its last; see :func:`row_cuts`."""


def row_cuts(factor: Factor) -> list[int]:
    """Rows at which a factor may be cut, so that sums may hold what lies between: its first, others, one past its last.

    Symmetric ones may be cut at blocks of rows that are added to at once; of others all rows are held, or none.
    """
    length = _length(factor)
    return [*range(0, length, BLOCK), length] if _is_cut(factor) else [0, length]


@dataclass(frozen=True)
class SumsSpec:
    """Names, shapes and precision of the sums of one structure for one model.

    Attributes:
        structure: ``'full'``, ``'kron'``, ``'ekfac'``, ``'diag'`` or ``'blockdiag'``.
        blocks: One per parameter, in the order of the parameter vector.
        factors: Shape of every sum by name.
        dtype: Name of the floating-point type of one batch's contribution and of the posterior, such as ``'float32'``. The
            running sums themselves are of float64 always.
        n_outputs: Number of outputs (classes or regression targets) of the model.
        basis: Digest of the eigenbasis that the sums are taken in, see :mod:`laplace.structures.ekfac`; None for all others.
    """

    structure: str
    blocks: tuple[Block, ...]
    factors: Mapping[str, Factor]
    dtype: str
    n_outputs: int
    basis: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The floating-point type of one batch's contribution and of the posterior."""
        return getattr(torch, self.dtype)

    def to_json(self) -> dict:
        """A plain dictionary that :meth:`from_json` turns back into an equal specification."""
        return {
            **({} if self.basis is None else {"basis": self.basis}),
            "structure": self.structure,
            "dtype": self.dtype,
            "n_outputs": self.n_outputs,
            "blocks": [_block_to_json(block) for block in self.blocks],
            "factors": {
                name: {"shape": list(factor.shape), "symmetric": factor.symmetric}
                for name, factor in self.factors.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping) -> SumsSpec:
        """Inverse of :meth:`to_json`."""
        blocks = tuple(_block_from_json(block) for block in data["blocks"])
        factors = {k: Factor(tuple(v["shape"]), bool(v["symmetric"])) for k, v in data["factors"].items()}
        return cls(data["structure"], blocks, factors, data["dtype"], int(data["n_outputs"]), data.get("basis"))


def held_shape(factor: Factor, start: int, stop: int) -> tuple[int, ...]:
    """Shape in which the rows ``start`` to ``stop`` of a factor are held."""
    return (stop - start, stop) if _is_cut(factor) else factor.shape


def _is_cut(factor: Factor) -> bool:
    return factor.symmetric and len(factor.shape) == 2


def _length(factor: Factor) -> int:
    return factor.shape[0] if factor.shape else 1


def all_rows(spec: SumsSpec) -> dict[str, tuple[int, int]]:
    """All rows of all factors."""
    return {name: (0, _length(factor)) for name, factor in spec.factors.items()}


def _block_to_json(block: Block) -> dict:
    data = {**asdict(block), "shape": list(block.shape), "factors": list(block.factors)}
    chosen, basis = data.pop("chosen"), data.pop("basis")
    data |= {} if chosen is None else {"chosen": list(chosen)}
    return {**data, "basis": list(basis)} if basis else data


def _block_from_json(data: Mapping) -> Block:
    chosen = tuple(data["chosen"]) if "chosen" in data else None
    place = (data["parameter"], tuple(data["shape"]), data["layer"], tuple(data["factors"]), data["reason"])
    return Block(*place, chosen, tuple(data.get("basis", ())))


def spec_differences(one: SumsSpec, two: SumsSpec) -> list[str]:
    """What differs between two specifications, a few words each and eight of them at most."""
    rows = [
        f"{field} {getattr(one, field)!r} against {getattr(two, field)!r}"
        for field in ("structure", "dtype", "n_outputs", "basis")
        if getattr(one, field) != getattr(two, field)
    ]
    names = {block.parameter: block for block in one.blocks}
    others = {block.parameter: block for block in two.blocks}
    for name in sorted(names.keys() | others.keys()):
        if names.get(name) != others.get(name):
            rows.append(f"parameter {name!r} differs")
    return rows[:8]
