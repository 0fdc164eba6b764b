r"""Eigendecompositions of Kronecker-factored block-diagonal matrices, and what a prior adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Self

import torch
from torch import Tensor

from laplace.linalg.eigen import shifted
from laplace.linalg.precision import in_full_precision


class KronSpectrum:
    r"""Eigenvalues :math:`l_B \otimes l_A + \delta` of blocks that are Kronecker products: all that a log determinant needs.

    Attributes:
        eigenvalues: For each block, one vector per factor, whose outer product they are; or one table ``(out, in)`` with a
            value for every pair of eigenvectors, as EKFAC has it. Those that are zero but for rounding may be slightly
            negative; see :func:`shifted`.
        deltas: One additive constant per block, ``(blocks,)``.
        damping: Add :math:`\sqrt\delta` to the eigenvalues of each factor instead of :math:`\delta` to their product.
    """

    def __init__(self, eigenvalues: list[list[Tensor]], deltas: Tensor | None = None, damping: bool = False):
        """Wrap eigenvalues; see :meth:`Kron.eigenvalues`."""
        self.eigenvalues = eigenvalues
        first = eigenvalues[0][0]
        self.deltas = torch.zeros(len(self), dtype=first.dtype, device=first.device) if deltas is None else deltas
        self.damping = damping

    def _with(self, eigenvalues: list[list[Tensor]], deltas: Tensor) -> Self:
        """The same with other numbers."""
        return type(self)(eigenvalues, deltas, self.damping)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.eigenvalues)

    def __add__(self, deltas: Tensor | float) -> Self:
        """Add a multiple of the identity to all blocks (scalar) or to each (one value per block).

        Raises:
            ValueError: If there are neither one nor as many values as blocks.
        """
        deltas = torch.as_tensor(deltas, dtype=self.deltas.dtype, device=self.deltas.device)
        if deltas.numel() not in (1, len(self)) or deltas.ndim > 1:
            raise ValueError(
                f"Expected a scalar or {len(self)} values, one per block; got shape {tuple(deltas.shape)}."
            )
        return self._with(self.eigenvalues, self.deltas + deltas)

    def __mul__(self, scalar: Tensor | float) -> Self:
        """Scale the decomposed matrix, not the deltas.

        Raises:
            ValueError: If ``scalar`` is not one number, or negative.
        """
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(f"Expected a scalar, got a tensor of shape {tuple(scalar.shape)}.")
        check_not_negative(scalar)
        scalar = scalar.squeeze() if isinstance(scalar, Tensor) else scalar
        return self._with([[scalar ** (1 / len(ls)) * v for v in ls] for ls in self.eigenvalues], self.deltas)

    __radd__ = __add__
    __rmul__ = __mul__

    def spectrum(self, block: int) -> Tensor:
        """Eigenvalues of one block including its delta, ``(out, in)`` or ``(out,)``."""
        found = self.part(block, self.deltas[block][None], slice(None), slice(None))[0]
        return found if self._is_matrix(block) else found[:, 0]

    def part(self, block: int, deltas: Tensor, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
        """Rows and columns of one block's eigenvalues, of those without a matrix in one column, under several deltas.

        Args:
            block: Its number.
            deltas: Instead of the block's own, ``(deltas,)``.
            rows: Of ``(out, in)``, all or by a range or numbers.
            columns: Of them.

        Returns:
            ``(deltas, rows, columns)``.
        """
        values, deltas = self.eigenvalues[block], deltas[:, None, None]
        if len(values) == 1:
            table = values[0] if self._is_matrix(block) else values[0][:, None]
            return shifted(table[rows][:, columns], deltas)
        left, right = values[0][rows][:, None], values[1][columns]
        if self.damping:
            return shifted(left, deltas.sqrt()) * shifted(right, deltas.sqrt())
        return shifted(left * right, deltas)

    def _is_matrix(self, block: int) -> bool:
        values = self.eigenvalues[block]
        return len(values) == 2 or values[0].ndim == 2

    def logdet(self) -> Tensor:
        """Log determinant in float64, differentiable in the deltas and in a scalar factor."""
        return torch.stack([self.spectrum(i).double().log().sum() for i in range(len(self))]).sum()

    def logdet_ratio(self) -> Tensor:
        """Log determinant minus that of the deltas alone, as one float64 sum: the two may be large where this is small."""
        terms = [(self.spectrum(i).double() / self.deltas[i].double()).log().sum() for i in range(len(self))]
        return torch.stack(terms).sum()


class KronDecomposed(KronSpectrum):
    r"""Blocks :math:`(Q_B \otimes Q_A)\,\mathrm{diag}(l_B \otimes l_A + \delta)\,(Q_B \otimes Q_A)^\top`.

    Attributes:
        eigenvectors: For each block, one orthonormal matrix per factor (None for that of a diagonal one, the identity).
        eigenvalues: See :class:`KronSpectrum`, as for what follows.
        deltas: See there.
        damping: See there.

    Example:
        >>> import torch
        >>> from laplace.utils import Kron
        >>> precision = Kron([[2 * torch.eye(2), torch.eye(3)]]).decompose() + torch.tensor([1.0])
        >>> round(precision.logdet().item(), 4)  # 6 log 3
        6.5917
    """

    def __init__(
        self,
        eigenvectors: list[list[Tensor | None]],
        eigenvalues: list[list[Tensor]],
        deltas: Tensor | None = None,
        damping: bool = False,
    ):
        """Wrap a decomposition; see :meth:`Kron.decompose`."""
        self.eigenvectors = eigenvectors
        super().__init__(eigenvalues, deltas, damping)

    def _with(self, eigenvalues: list[list[Tensor]], deltas: Tensor) -> Self:
        return type(self)(self.eigenvectors, eigenvalues, deltas, self.damping)

    def detach(self) -> KronDecomposed:
        """The same matrix without a graph: a prior or noise that requires gradients leaves one."""
        vectors = [[None if q is None else q.detach() for q in qs] for qs in self.eigenvectors]
        values = [[v.detach() for v in ls] for ls in self.eigenvalues]
        return KronDecomposed(vectors, values, self.deltas.detach(), self.damping)

    @in_full_precision()
    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """Rows of ``W`` times the matrix raised to ``exponent``.

        Args:
            W: ``(parameters,)``, ``(batch, parameters)`` or ``(batch, k, parameters)``.
            exponent: Power of the spectrum; -1 for the inverse, -½ for its symmetric root.

        Returns:
            A tensor shaped like ``W``.

        Raises:
            ValueError: If ``W`` has another number of parameters.
        """
        rows = W.reshape(-1, W.shape[-1])
        sizes = [self._size(i) for i in range(len(self))]
        if W.shape[-1] != sum(sizes):
            raise ValueError(f"The last dimension of W is {W.shape[-1]}, but there are {sum(sizes)} parameters.")
        parts = [self._apply(i, part, exponent) for i, part in enumerate(rows.split(sizes, 1))]
        return torch.cat(parts, 1).reshape(W.shape)

    def inv_square_form(self, W: Tensor) -> Tensor:
        """``W P⁻¹ Wᵀ`` for ``W`` of shape ``(batch, k, parameters)``."""
        return self.bmm(W, -1) @ W.transpose(-1, -2)

    def diag(self, exponent: float = 1) -> Tensor:
        """Diagonal of the matrix raised to ``exponent``, ``(parameters,)``."""
        parts = []
        for i, vectors in enumerate(self.eigenvectors):
            squares = [None if q is None else q.square() for q in vectors]
            spectrum = self.spectrum(i) ** exponent
            parts.append(_apply_left(squares, _apply_right(squares, spectrum)).flatten())
        return torch.cat(parts)

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """The dense matrix raised to ``exponent``; for tests and small models."""
        blocks = []
        for i, vectors in enumerate(self.eigenvectors):
            sizes = self.spectrum(i).shape
            ones = self.deltas.new_ones
            q = dense_block([ones(size) if q is None else q for q, size in zip(vectors, sizes, strict=True)])
            blocks.append((q * (self.spectrum(i) ** exponent).flatten()) @ q.T)
        return torch.block_diag(*blocks)

    def _size(self, block: int) -> int:
        return prod(values.numel() for values in self.eigenvalues[block])

    def _apply(self, block: int, rows: Tensor, exponent: float) -> Tensor:
        vectors, spectrum = self.eigenvectors[block], self.spectrum(block) ** exponent
        matrix = rows.reshape(len(rows), *spectrum.shape)  # of an empty parameter too
        back = [None if q is None else q.T for q in vectors]
        rotated = _apply_left(back, _apply_right(back, matrix)) * spectrum
        return _apply_left(vectors, _apply_right(vectors, rotated)).flatten(1)


def _apply_left(matrices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    """The first matrix of a pair times ``(…, out, in)``; None stands for the identity, and a single one has no left side."""
    return values if len(matrices) == 1 or matrices[0] is None else matrices[0] @ values


def _apply_right(matrices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    """``(…, out, in)`` times the transpose of the last matrix of a pair, or ``(…, out)`` times that of a single one."""
    return values if matrices[-1] is None else values @ matrices[-1].mT


def check_not_negative(scalar: float | Tensor) -> None:
    """Refuse to split a negative scalar over factors: its root is not real.

    Raises:
        ValueError: If it is negative.
    """
    if isinstance(scalar, Tensor):
        scalar = scalar.detach()
    if float(scalar) < 0:
        raise ValueError(
            f"A Kronecker-factored matrix cannot be multiplied by {float(scalar):g}: it is positive semi-definite, and of a "
            "negative number each factor would take a root."
        )


def dense_block(factors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of one block's factors as a matrix; one-dimensional factors stand for diagonal ones."""
    return reduce(torch.kron, [f.contiguous() if f.ndim == 2 else torch.diag(f) for f in factors])
