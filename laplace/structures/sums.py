r"""Raw curvature sums: one commutative monoid for every structure.

A Laplace approximation needs :math:`\sum_n J_n^\top \Lambda_n J_n` (or its diagonal, or :math:`\sum_n a_n a_n^\top` and
:math:`\sum_n g_n g_n^\top` for each layer), the summed loss and the number of examples. All of these are sums over
examples. Nothing is divided by the number of examples before :mod:`laplace.posterior` finalises the sum, so that batches,
segments and whole data sets combine by addition alone, in any partition.

Sums are kept in float64, whatever the type of the model and of one batch's contribution: in float32, what one batch adds
to the sum over millions of examples would vanish. Posteriors round the finished sum once.

Which factors there are, and which rows of them a sum may hold, is in :mod:`laplace.structures.specification`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.capture.blocks import Block
from laplace.linalg import memory
from laplace.linalg.gram import mirror_
from laplace.structures.specification import Factor as Factor  # pickled posteriors look for it here
from laplace.structures.specification import Rows, SumsSpec, all_rows, held_shape, spec_differences

_SMALLER = {
    "full": "Use hessian_structure='kron', 'diag' or 'gp', subset_of_weights='last_layer', or a smaller subnetwork.",
    "kron": "Use hessian_structure='diag', subset_of_weights='last_layer', or set requires_grad=False on wide layers.",
    "ekfac": "Use hessian_structure='diag', subset_of_weights='last_layer', or set requires_grad=False on wide layers.",
    "blockdiag": "Use hessian_structure='kron', 'ekfac' or 'diag', or set requires_grad=False on wide layers.",
    "diag": "Use subset_of_weights='last_layer', or set requires_grad=False on parameters to leave out.",
    "lowrank-sketch": "Lower the rank or the oversampling, or use hessian_structure='kron' or 'diag'.",
}


class CurvatureSums:
    """The state of an accumulation: factors, summed loss, number of examples.

    Addition over examples happens in a backend's ``accumulate``; this class is the algebra around it.

    Attributes:
        spec: What the sums are called and how they are shaped.
        rows: Which rows of which factors there are; see :func:`laplace.structures.specification.row_cuts`. All
            unless the sum was begun as a part.
        loss: Summed negative log likelihood, a float64 scalar.
        n_data: Number of examples added so far; of a weighted sum the sum of their weights.
        estimator: What the backend estimates, such as ``'ggn'`` or ``'ef'``; None where it is not known.
        basis: Matrices in which what is added is expressed, such as those that ``spec.basis`` is the digest of; None where
            there are none. They are the same for all sums that are merged, no sum themselves, and not kept with the sums.
    """

    estimator: str | None = None
    basis: Any = None

    def __init__(
        self, spec: SumsSpec, tensors: dict[str, Tensor], loss: Tensor, n_data: float, rows: Rows | None = None
    ):
        """Wrap existing tensors; use :meth:`zero` or :meth:`from_tensors` instead."""
        self.spec = spec
        self.rows = all_rows(spec) if rows is None else dict(rows)
        self._tensors = tensors
        self._halves: dict[str, Callable[[Tensor], None]] = {}
        self.loss = loss
        self.n_data = n_data

    @classmethod
    def zero(cls, spec: SumsSpec, device: torch.device | str = "cpu", rows: Rows | None = None) -> CurvatureSums:
        """The neutral element, or the part of it that holds some rows of some factors.

        Args:
            spec: Of the whole sum.
            device: Where its tensors are.
            rows: What it holds; everything if not given.

        Raises:
            NotEnoughMemoryError: If it is larger than the free memory; says what to use instead.
        """
        shapes = {name: held_shape(spec.factors[name], *own) for name, own in (rows or all_rows(spec)).items()}
        memory.require(
            sum(memory.tensor_bytes(*shape, dtype=torch.float64) for shape in shapes.values()),
            device,
            f"The sums of a {spec.structure!r} posterior over {sum(block.size for block in spec.blocks):,} parameters",
            _SMALLER.get(spec.structure, ""),
        )
        tensors = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        return cls(spec, tensors, torch.zeros((), dtype=torch.float64, device=device), 0, rows)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every factor that is held by name, float64; rows ``a`` to ``b`` of a symmetric one with their columns up to ``b``."""
        while self._halves:
            name, complete_ = self._halves.popitem()
            complete_(self._tensors[name])
        return self._tensors

    def holds(self, name: str) -> bool:
        """Whether a factor is among those that are held, or some of its rows."""
        return name in self._tensors

    @property
    def held_blocks(self) -> Iterator[Block]:
        """The blocks whose first factor is held."""
        return (block for block in self.spec.blocks if block.factors[0] in self._tensors)

    def add_whole_(self, name: str, value: Tensor, scale: float = 1.0) -> None:
        """Add ``scale · value``, of the whole factor's shape, as far as it is held."""
        if name in self._tensors:
            total = self._tensors[name]
            start, stop = self.rows[name]
            part = value[start:stop, : total.shape[1]] if self.spec.factors[name].symmetric else value
            total.add_(part, alpha=scale)

    def running(self, name: str, complete_: Callable[[Tensor], None] = mirror_) -> Tensor:
        """The factor to add to in place; of symmetric ones, only what is on and left of the block diagonal has to be added.

        What is right of it follows when :attr:`tensors` is read next.

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
        assert self.spec != other.spec or self.rows == other.rows, "parts of sums that hold different rows"
        if self.spec != other.spec:
            raise ValueError(
                "These sums belong to different models, structures or precisions and cannot be added: "
                + "; ".join(spec_differences(self.spec, other.spec))
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
    def from_tensors(
        cls, spec: SumsSpec, tensors: Mapping[str, Tensor], n_data: float, *, own: bool = False
    ) -> CurvatureSums:
        """Rebuild a sum from its tensors, of float64 or of any type that they were stored in.

        Args:
            spec: Of the sum.
            tensors: As :meth:`to_tensors` returns them.
            n_data: Number of examples in the sum.
            own: The tensors belong to the sum from here on, which adds to them in place; it takes copies if not given.

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
        factors = {name: tensors[name].to(torch.float64, copy=not own) for name in spec.factors}
        return cls(spec, factors, tensors["loss"].to(torch.float64, copy=not own), n_data)

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
