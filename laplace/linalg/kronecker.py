r"""Kronecker-factored block-diagonal matrices.

A block is a list of factors: two for a weight, :math:`B \otimes A` over its row-major flattening; one for a bias, the
matrix :math:`B`. A one-dimensional tensor stands for a factor that is diagonal, alone or in a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.linalg import memory
from laplace.linalg.decomposed import KronDecomposed, KronSpectrum, check_not_negative, dense_block
from laplace.linalg.eigen import eigenvalues, eigh

ROWS = 256  # of a factor that are divided at a time


class Kron:
    """Kronecker factors of a block-diagonal matrix, closed under addition and scaling.

    Attributes:
        kfacs: For each parameter, its factors.
        names: For each parameter, the names of its factors, for errors; None where they have none.

    Raises:
        ValueError: If a block has other than one or two factors, or one is neither square nor one-dimensional.

    Example:
        >>> import torch
        >>> from laplace.utils import Kron
        >>> kron = Kron([[2 * torch.eye(2), torch.eye(3)]])
        >>> kron.to_matrix().diagonal()
        tensor([2., 2., 2., 2., 2., 2.])
    """

    def __init__(self, kfacs: Sequence[Sequence[Tensor]], names: Sequence[Sequence[str]] | None = None):
        """Wrap factors; nothing is copied."""
        self.kfacs = [list(factors) for factors in kfacs]
        self.names = names
        for number, factors in enumerate(self.kfacs):
            square = all(f.ndim == 1 or (f.ndim == 2 and f.shape[0] == f.shape[1]) for f in factors)
            if len(factors) not in (1, 2) or not square:
                raise ValueError(
                    f"Block {number} has factors of shapes {[tuple(f.shape) for f in factors]}; a block is one or two square "
                    "matrices, or one-dimensional tensors in place of diagonal ones."
                )

    @classmethod
    def init_from_model(
        cls,
        model: nn.Module | Iterable[nn.Parameter],
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> Kron:
        """Zero factors for a model's parameters: two for a weight, one for a vector.

        Args:
            model: The model, or its parameters.
            device: Where to put them.
            dtype: Their type; that of each parameter if None.

        Raises:
            ValueError: If a parameter has no dimension.
        """
        parameters = model.parameters() if isinstance(model, nn.Module) else model
        kfacs = []
        for p in parameters:
            if p.ndim == 0:
                raise ValueError("A parameter without dimensions has no Kronecker factors; give it shape (1,).")
            sizes = (p.shape[0],) if p.ndim == 1 else weight_shape_2d(p.shape)
            kfacs.append([torch.zeros(s, s, dtype=dtype or p.dtype, device=device) for s in sizes])
        return cls(kfacs)

    @classmethod
    def from_sums(cls, sums, n_data: int) -> Kron:
        """Divide the input-side sums by the number of examples, the only division there is, and round to the posterior's type.

        Args:
            sums: :class:`laplace.structures.sums.CurvatureSums` of structure ``'kron'``.
            n_data: Number of examples in the whole sum.
        """
        rounded = {}  # once for every name: blocks that share a factor share its eigendecomposition
        for name, value in sums.tensors.items():
            rounded[name] = rounded_factor(name, value, n_data, sums.spec.torch_dtype)
        kfacs = []
        for block in sums.spec.blocks:
            factors = [rounded[name] for name in block.factors]
            kfacs.append(factors if block.has_factors else [factors[0].flatten()])
        return cls(kfacs, [block.factors for block in sums.spec.blocks])

    def __add__(self, other: Kron) -> Kron:
        """Add factor by factor.

        Raises:
            ValueError: If ``other`` is not a :class:`Kron` with the same shapes.
        """
        if not isinstance(other, Kron):
            raise ValueError(f"Only Kron can be added to Kron, not {type(other).__name__}.")
        if [[f.shape for f in fs] for fs in self.kfacs] != [[f.shape for f in fs] for fs in other.kfacs]:
            raise ValueError("The two Kron have factors of different shapes.")
        pairs = zip(self.kfacs, other.kfacs, strict=True)
        return Kron([[a + b for a, b in zip(x, y, strict=True)] for x, y in pairs], self.names)

    def __mul__(self, scalar: float | Tensor) -> Kron:
        """Scale the matrix: each of ``k`` factors by the ``k``-th root."""
        if not isinstance(scalar, (int, float)) and not (isinstance(scalar, Tensor) and scalar.numel() == 1):
            raise ValueError(f"Kron can be multiplied by a scalar, not by {scalar!r}.")
        check_not_negative(scalar)
        return Kron([[scalar ** (1 / len(fs)) * f for f in fs] for fs in self.kfacs], self.names)

    __radd__ = __add__
    __rmul__ = __mul__

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.kfacs)

    def decompose(
        self, damping: bool = False, known: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> KronDecomposed:
        """Eigendecompose every factor once, in float64; factors shared between blocks are decomposed once.

        Args:
            damping: See :class:`KronDecomposed`.
            known: Eigenvalues and eigenvectors of some factors by their names, which are not decomposed again.

        Raises:
            ValueError: If a factor holds NaN or Inf, or has no eigendecomposition; the message names it.
            NotEnoughMemoryError: If the widest factor's eigenvectors do not fit into the free memory.
        """
        known = known or {}
        self._require(4, known)
        found = self._for_each(lambda f, what: eigh(f, what) if f.ndim == 2 else (f.clamp(min=0), None), known)
        vectors = [[found[id(f)][1] for f in fs] for fs in self.kfacs]
        values = [[found[id(f)][0].to(f.dtype) for f in fs] for fs in self.kfacs]
        return KronDecomposed(vectors, values, damping=damping)

    def eigenvalues(self, damping: bool = False) -> KronSpectrum:
        """Eigenvalues alone, at a fraction of the cost; ``damping`` and errors as of :meth:`decompose`."""
        self._require(2)
        found = self._for_each(lambda f, what: eigenvalues(f, what) if f.ndim == 2 else f.clamp(min=0))
        return KronSpectrum([[found[id(f)].to(f.dtype) for f in fs] for fs in self.kfacs], damping=damping)

    def _name(self, number: int, place: int) -> str | None:
        return self.names[number][place] if self.names else None

    def _require(self, copies: int, known: Collection[str] = ()) -> None:
        """Stop before a decomposition that cannot fit into memory."""
        places = ((f, self._name(i, j)) for i, fs in enumerate(self.kfacs) for j, f in enumerate(fs))
        widest = max((f for f, name in places if f.ndim == 2 and name not in known), key=len, default=None)
        if widest is not None:
            memory.require(
                copies * memory.tensor_bytes(*widest.shape),
                widest.device,
                f"The eigendecomposition of a Kronecker factor of width {len(widest):,}",
                "Use hessian_structure='diag', or set requires_grad=False on the parameters of that layer.",
            )

    def _for_each(
        self, decomposition: Callable[[Tensor, str], Any], known: Mapping[str, Any] | None = None
    ) -> dict[int, Any]:
        """What is known of a factor, or what a function makes of it and its name, by its identity, once for shared ones."""
        done: dict[int, Any] = {}
        for number, factors in enumerate(self.kfacs):
            for place, factor in enumerate(factors):
                name = self._name(number, place)
                if known and name in known:
                    done[id(factor)] = known[name]
                if id(factor) not in done:
                    what = f"Kronecker factor{f' {name!r}' if name else ''} {tuple(factor.shape)} of block {number}"
                    if not bool(torch.isfinite(factor).all()):
                        raise ValueError(f"The {what} holds NaN or Inf.")
                    done[id(factor)] = decomposition(factor, what)
        return done

    def diag(self) -> Tensor:
        """Diagonal of the matrix, ``(parameters,)``."""
        parts = []
        for factors in self.kfacs:
            diagonals = [f.diagonal() if f.ndim == 2 else f for f in factors]
            parts.append(diagonals[0] if len(factors) == 1 else torch.outer(*diagonals).flatten())
        return torch.cat(parts)

    def to_matrix(self) -> Tensor:
        """The dense matrix ``(parameters, parameters)``; for tests and small models."""
        return torch.block_diag(*[dense_block(factors) for factors in self.kfacs])

    def bmm(self, W: Tensor, exponent: float = 1) -> Tensor:
        """``W`` times the matrix to the power ``exponent``; see :meth:`KronDecomposed.bmm`."""
        return self.decompose().bmm(W, exponent)

    def logdet(self) -> Tensor:
        """Log determinant of the matrix."""
        return self.eigenvalues().logdet()


def rounded_factor(name: str, value: Tensor, n_data: float, dtype: torch.dtype) -> Tensor:
    """One summed factor as the posterior has it: that of the inputs divided by the number of examples, in its type.

    Some rows at a time: a factor may be large, and what is divided is of float64.
    """
    if not name.endswith("/A"):
        return value.to(dtype)
    found = torch.empty_like(value, dtype=dtype)
    for rows, own in zip(value.split(ROWS), found.split(ROWS), strict=True):
        own.copy_(rows / n_data)
    return found


def weight_shape_2d(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """``(out, in)`` of a weight with its trailing dimensions flattened."""
    out = shape[0]
    rest = 1
    for size in shape[1:]:
        rest *= size
    return out, rest
