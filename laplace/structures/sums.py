r"""Raw curvature sums: one commutative monoid for every structure.

A Laplace approximation needs :math:`\sum_n J_n^\top \Lambda_n J_n` (or its diagonal, or :math:`\sum_n a_n a_n^\top` and
:math:`\sum_n g_n g_n^\top` for each layer), the summed loss and the number of examples. All of these are sums over
examples. Nothing is divided by the number of examples before :mod:`laplace.posterior` finalises the sum, so that batches,
segments and whole data sets combine by addition alone, in any partition.

Sums are kept in float64, whatever the type of the model and of one batch's contribution: in float32, what one batch adds
to the sum over millions of examples would vanish. Posteriors round the finished sum once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from laplace import _clash as _clash  # says so where laplace-torch has replaced laplace/__init__.py
from laplace.capture.blocks import Block
from laplace.linalg import memory
from laplace.linalg.gram import mirror_

_SMALLER = {
    "full": "Use hessian_structure='kron', 'diag' or 'gp', subset_of_weights='last_layer', or a smaller subnetwork.",
    "kron": "Use hessian_structure='diag', subset_of_weights='last_layer', or set requires_grad=False on wide layers.",
    "ekfac": "Use hessian_structure='diag', subset_of_weights='last_layer', or set requires_grad=False on wide layers.",
    "blockdiag": "Use hessian_structure='kron', 'ekfac' or 'diag', or set requires_grad=False on wide layers.",
    "diag": "Use subset_of_weights='last_layer', or set requires_grad=False on parameters to leave out.",
}


@dataclass(frozen=True)
class Factor:
    """Shape of one named sum; ``symmetric`` sums may be stored as one triangle."""

    shape: tuple[int, ...]
    symmetric: bool = False


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


class CurvatureSums:
    """The state of an accumulation: factors, summed loss, number of examples.

    Addition over examples happens in a backend's ``accumulate``; this class is the algebra around it.

    Attributes:
        spec: What the sums are called and how they are shaped.
        loss: Summed negative log likelihood, a float64 scalar.
        n_data: Number of examples added so far; of a weighted sum the sum of their weights.
        estimator: What the backend estimates, such as ``'ggn'`` or ``'ef'``; None where it is not known.
        basis: Matrices in which what is added is expressed, such as those that ``spec.basis`` is the digest of; None where
            there are none. They are the same for all sums that are merged, no sum themselves, and not kept with the sums.
    """

    estimator: str | None = None
    basis: Any = None

    def __init__(self, spec: SumsSpec, tensors: dict[str, Tensor], loss: Tensor, n_data: float):
        """Wrap existing tensors; use :meth:`zero` or :meth:`from_tensors` instead."""
        self.spec = spec
        self._tensors = tensors
        self._halves: dict[str, Callable[[Tensor], None]] = {}
        self.loss = loss
        self.n_data = n_data

    @classmethod
    def zero(cls, spec: SumsSpec, device: torch.device | str = "cpu") -> CurvatureSums:
        """The neutral element.

        Raises:
            NotEnoughMemoryError: If it is larger than the free memory; says what to use instead.
        """
        memory.require(
            sum(memory.tensor_bytes(*factor.shape, dtype=torch.float64) for factor in spec.factors.values()),
            device,
            f"The sums of a {spec.structure!r} posterior over {sum(block.size for block in spec.blocks):,} parameters",
            _SMALLER.get(spec.structure, ""),
        )
        tensors = {
            name: torch.zeros(factor.shape, dtype=torch.float64, device=device) for name, factor in spec.factors.items()
        }
        return cls(spec, tensors, torch.zeros((), dtype=torch.float64, device=device), 0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every factor by name, float64."""
        while self._halves:
            name, complete_ = self._halves.popitem()
            complete_(self._tensors[name])
        return self._tensors

    def running(self, name: str, complete_: Callable[[Tensor], None] = mirror_) -> Tensor:
        """The factor to add to in place; of symmetric ones, only what is on and above the block diagonal has to be added.

        What is below follows when :attr:`tensors` is read next.

        Args:
            name: Of the factor.
            complete_: What makes a symmetric factor whole then, from less where the curvature has more symmetries.
        """
        if self.spec.factors[name].symmetric:
            self._halves[name] = complete_
        return self._tensors[name]

    def merge(self, other: CurvatureSums) -> CurvatureSums:
        """Add another sum of the same specification in place.

        Raises:
            ValueError: If the two were not accumulated for the same model, structure and estimator, or hold eigenpairs.
        """
        if self.spec.structure == "lowrank":
            raise ValueError("Low-rank eigenpairs of parts of the data do not add up; fit once over all of it.")
        if self.spec != other.spec:
            raise ValueError(
                "These sums belong to different models, structures or precisions and cannot be added: "
                + "; ".join(_spec_differences(self.spec, other.spec))
            )
        check_same_estimator(self.estimator, other.estimator)
        self.estimator = self.estimator or other.estimator
        for name, tensor in self.tensors.items():
            tensor += other.tensors[name].to(tensor.device)
        self.loss = self.loss + other.loss.to(self.loss.device)
        self.n_data += other.n_data
        return self

    def to_tensors(self) -> dict[str, Tensor]:
        """Every factor by name plus ``"loss"``; the inverse of :meth:`from_tensors` together with ``n_data``.

        The tensors are those of the sums themselves, float64, not copies.
        """
        return {**self.tensors, "loss": self.loss}

    @classmethod
    def from_tensors(cls, spec: SumsSpec, tensors: Mapping[str, Tensor], n_data: float) -> CurvatureSums:
        """Rebuild a sum from copies of its tensors, of float64 or of any type that they were stored in.

        Raises:
            ValueError: If a factor is missing, unknown or of the wrong shape.
        """
        wanted = set(spec.factors) | {"loss"}
        if set(tensors) != wanted:
            missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
            raise ValueError(f"The tensors do not fit the specification: missing {missing}, unknown {unknown}.")
        for name, factor in spec.factors.items():
            if tuple(tensors[name].shape) != factor.shape:
                raise ValueError(f"Factor {name!r} has shape {tuple(tensors[name].shape)}, expected {factor.shape}.")
        factors = {name: tensors[name].to(torch.float64, copy=True) for name in spec.factors}
        return cls(spec, factors, tensors["loss"].to(torch.float64, copy=True), n_data)

    def non_finite(self) -> list[str]:
        """Names of the factors that hold NaN or Inf."""
        return [name for name, value in self.to_tensors().items() if not is_finite(value)]


def check_same_estimator(one: str | None, other: str | None) -> None:
    """Refuse to add curvature of different estimators; None is not known and passes.

    Raises:
        ValueError: If they differ.
    """
    if one is not None and other is not None and one != other:
        raise ValueError(
            f"Curvature estimated by {one!r} and by {other!r} cannot be added: they are different matrices. Use the backend "
            "and backend_kwargs of the earlier fit, or fit(override=True)."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or Inf; looked at in parts, so that no temporary of the tensor's size is made.

    A sum that is finite has finite terms, and is found in a fraction of the time.
    """
    return all(
        bool(torch.isfinite(part.sum())) or bool(torch.isfinite(part).all()) for part in tensor.flatten().split(1 << 22)
    )


def sum_in_order(tensors: Iterable[Tensor]) -> Tensor:
    """Sum in float64 in the given order and round once to the widest type among the inputs; that of sums is float64.

    Raises:
        ValueError: If there is nothing to add.
    """
    total: Tensor | None = None
    dtype = None
    for tensor in tensors:
        if total is None:
            total, dtype = tensor.to(torch.float64, copy=True), tensor.dtype
        else:
            total += tensor
            dtype = torch.promote_types(dtype, tensor.dtype)
        del tensor  # before the next one is made: it may be large
    if total is None:
        raise ValueError("There is nothing to add: the sequence of tensors is empty.")
    return total.to(dtype)


def weighted_sum_in_order(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    r"""Return $\sum_i w_i t_i$ in float64, in the given order; with weights of 1 it is the plain sum, bit for bit.

    Raises:
        ValueError: If there is nothing to add, or not one weight for each tensor.
    """
    weighted = (tensor.double() * weight for tensor, weight in zip(tensors, weights, strict=True))
    return sum_in_order(weighted)


def _block_to_json(block: Block) -> dict:
    data = {**asdict(block), "shape": list(block.shape), "factors": list(block.factors)}
    chosen, basis = data.pop("chosen"), data.pop("basis")
    data |= {} if chosen is None else {"chosen": list(chosen)}
    return {**data, "basis": list(basis)} if basis else data


def _block_from_json(data: Mapping) -> Block:
    chosen = tuple(data["chosen"]) if "chosen" in data else None
    place = (data["parameter"], tuple(data["shape"]), data["layer"], tuple(data["factors"]), data["reason"])
    return Block(*place, chosen, tuple(data.get("basis", ())))


def _spec_differences(one: SumsSpec, two: SumsSpec) -> list[str]:
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
