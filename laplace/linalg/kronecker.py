r"""Kronecker-factored block-diagonal matrices and their eigendecompositions.

A block is a list of factors: two for a weight, :math:`B \otimes A` over its row-major flattening; one for a bias, the
matrix :math:`B`; a one-dimensional tensor for a block that is diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from laplace.linalg import memory
from laplace.linalg.eigen import eigh, shifted


class Kron:
    """Kronecker factors of a block-diagonal matrix, closed under addition and scaling.

    Attributes:
        kfacs: For each parameter, its factors.
    """

    def __init__(self, kfacs: Sequence[Sequence[Tensor]]):
        """Wrap factors; nothing is copied."""
        self.kfacs = [list(factors) for factors in kfacs]

    @classmethod
    def init_from_model(cls, model: nn.Module | Iterable[nn.Parameter], device: torch.device | str) -> Kron:
        """Zero factors for a model's parameters: two for a weight, one for a vector.

        Raises:
            ValueError: If a parameter has no dimension.
        """
        parameters = model.parameters() if isinstance(model, nn.Module) else model
        kfacs = []
        for p in parameters:
            if p.ndim == 0:
                raise ValueError("A parameter without dimensions has no Kronecker factors; give it shape (1,).")
            sizes = (p.shape[0],) if p.ndim == 1 else weight_shape_2d(p.shape)
            kfacs.append([torch.zeros(s, s, dtype=p.dtype, device=device) for s in sizes])
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
            rounded[name] = (value / n_data if name.endswith("/A") else value).to(sums.spec.torch_dtype)
        kfacs = []
        for block in sums.spec.blocks:
            factors = [rounded[name] for name in block.factors]
            kfacs.append(factors if block.has_factors else [factors[0].flatten()])
        return cls(kfacs)

    def __add__(self, other: Kron) -> Kron:
        """Add factor by factor.

        Raises:
            ValueError: If ``other`` is not a :class:`Kron` with the same shapes.
        """
        if not isinstance(other, Kron):
            raise ValueError(f"Only Kron can be added to Kron, not {type(other).__name__}.")
        if [[f.shape for f in fs] for fs in self.kfacs] != [[f.shape for f in fs] for fs in other.kfacs]:
            raise ValueError("The two Kron have factors of different shapes.")
        return Kron([[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.kfacs, other.kfacs, strict=True)])

    def __mul__(self, scalar: float | Tensor) -> Kron:
        """Scale the matrix: each of ``k`` factors by the ``k``-th root."""
        if not isinstance(scalar, (int, float)) and not (isinstance(scalar, Tensor) and scalar.numel() == 1):
            raise ValueError(f"Kron can be multiplied by a scalar, not by {scalar!r}.")
        return Kron([[scalar ** (1 / len(fs)) * f for f in fs] for fs in self.kfacs])

    __radd__ = __add__
    __rmul__ = __mul__

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.kfacs)

    def decompose(self, damping: bool = False) -> KronDecomposed:
        """Eigendecompose every factor once, in float64; factors shared between blocks are decomposed once.

        Raises:
            ValueError: If a factor holds NaN or Inf.
            NotEnoughMemoryError: If the widest factor's eigenvectors do not fit into the free memory.
        """
        widest = max((f for fs in self.kfacs for f in fs if f.ndim == 2), key=len, default=None)
        if widest is not None:
            memory.require(
                4 * memory.tensor_bytes(*widest.shape),
                widest.device,
                f"The eigendecomposition of a Kronecker factor of width {len(widest):,}",
                "Use hessian_structure='diag', or set requires_grad=False on the parameters of that layer.",
            )
        done: dict[int, tuple[Tensor, Tensor | None]] = {}
        for number, factors in enumerate(self.kfacs):
            for factor in factors:
                if id(factor) not in done:
                    if not bool(torch.isfinite(factor).all()):
                        raise ValueError(f"A Kronecker factor of block {number} holds NaN or Inf.")
                    values, vectors = eigh(factor) if factor.ndim == 2 else (factor.clamp(min=0), None)
                    done[id(factor)] = values.to(factor.dtype), vectors
        values = [[done[id(f)][0] for f in fs] for fs in self.kfacs]
        vectors = [[done[id(f)][1] for f in fs] for fs in self.kfacs]
        return KronDecomposed(vectors, values, damping=damping)

    def diag(self) -> Tensor:
        """Diagonal of the matrix, ``(parameters,)``."""
        parts = []
        for factors in self.kfacs:
            diagonals = [f.diagonal() if f.ndim == 2 else f for f in factors]
            parts.append(diagonals[0] if len(factors) == 1 else torch.outer(*diagonals).flatten())
        return torch.cat(parts)

    def to_matrix(self) -> Tensor:
        """The dense matrix ``(parameters, parameters)``; for tests and small models."""
        return torch.block_diag(*[_dense(factors) for factors in self.kfacs])

    def bmm(self, W: Tensor, exponent: float = 1) -> Tensor:
        """``W`` times a power of the matrix; see :meth:`KronDecomposed.bmm`."""
        return self.decompose().bmm(W, exponent)

    def logdet(self) -> Tensor:
        """Log determinant of the matrix."""
        return self.decompose().logdet()


class KronDecomposed:
    r"""Blocks :math:`(Q_B \otimes Q_A)\,\mathrm{diag}(l_B \otimes l_A + \delta)\,(Q_B \otimes Q_A)^\top`.

    Attributes:
        eigenvectors: For each block, one orthonormal matrix per factor (None for the identity).
        eigenvalues: For each block, one vector per factor. Those that are zero but for rounding may be slightly negative;
            see :func:`shifted`.
        deltas: One additive constant per block, ``(blocks,)``.
        damping: Add :math:`\sqrt\delta` to the eigenvalues of each factor instead of :math:`\delta` to their product.
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
        self.eigenvalues = eigenvalues
        first = eigenvalues[0][0]
        self.deltas = torch.zeros(len(self), dtype=first.dtype, device=first.device) if deltas is None else deltas
        self.damping = damping

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.eigenvalues)

    def __add__(self, deltas: Tensor | float) -> KronDecomposed:
        """Add a multiple of the identity to all blocks (scalar) or to each (one value per block).

        Raises:
            ValueError: If there are neither one nor as many values as blocks.
        """
        deltas = torch.as_tensor(deltas, dtype=self.deltas.dtype, device=self.deltas.device)
        if deltas.numel() not in (1, len(self)) or deltas.ndim > 1:
            raise ValueError(
                f"Expected a scalar or {len(self)} values, one per block; got shape {tuple(deltas.shape)}."
            )
        return KronDecomposed(self.eigenvectors, self.eigenvalues, self.deltas + deltas, self.damping)

    def __mul__(self, scalar: Tensor | float) -> KronDecomposed:
        """Scale the decomposed matrix, not the deltas.

        Raises:
            ValueError: If ``scalar`` is not one number.
        """
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(f"Expected a scalar, got a tensor of shape {tuple(scalar.shape)}.")
        scalar = scalar.squeeze() if isinstance(scalar, Tensor) else scalar
        values = [[scalar ** (1 / len(ls)) * v for v in ls] for ls in self.eigenvalues]
        return KronDecomposed(self.eigenvectors, values, self.deltas, self.damping)

    __radd__ = __add__
    __rmul__ = __mul__

    def spectrum(self, block: int) -> Tensor:
        """Eigenvalues of one block including its delta, ``(out, in)`` or ``(out,)``."""
        values, delta = self.eigenvalues[block], self.deltas[block]
        if len(values) == 1:
            return shifted(values[0], delta)
        if self.damping:
            return torch.outer(shifted(values[0], delta.sqrt()), shifted(values[1], delta.sqrt()))
        return shifted(torch.outer(values[0], values[1]), delta)

    def logdet(self) -> Tensor:
        """Log determinant, differentiable in the deltas and in a scalar factor; logarithms are added up in float64."""
        total = torch.stack([self.spectrum(i).double().log().sum() for i in range(len(self))]).sum()
        return total.to(self.deltas.dtype)

    def logdet_ratio(self) -> Tensor:
        """Log determinant minus that of the deltas alone, as one sum: the two may be large where this is small."""
        terms = [(self.spectrum(i).double() / self.deltas[i].double()).log().sum() for i in range(len(self))]
        return torch.stack(terms).sum().to(self.deltas.dtype)

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """Rows of ``W`` times the matrix raised to ``exponent``.

        Args:
            W: ``(parameters,)``, ``(batch, parameters)`` or ``(batch, k, parameters)``.
            exponent: Power of the spectrum; -1 for the inverse, -½ for its symmetric root.

        Returns:
            A tensor shaped like ``W``.
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
            spectrum = self.spectrum(i) ** exponent
            squares = [None if q is None else q.square() for q in vectors]
            if len(vectors) == 2:
                spectrum = (squares[0] @ spectrum @ squares[1].T).flatten()
            elif squares[0] is not None:
                spectrum = squares[0] @ spectrum
            parts.append(spectrum)
        return torch.cat(parts)

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """The dense matrix raised to ``exponent``; for tests and small models."""
        blocks = []
        for i, vectors in enumerate(self.eigenvectors):
            spectrum = (self.spectrum(i) ** exponent).flatten()
            if vectors[0] is None:
                blocks.append(torch.diag(spectrum))
            else:
                q = _dense(vectors)
                blocks.append((q * spectrum) @ q.T)
        return torch.block_diag(*blocks)

    def _size(self, block: int) -> int:
        size = 1
        for values in self.eigenvalues[block]:
            size *= len(values)
        return size

    def _apply(self, block: int, rows: Tensor, exponent: float) -> Tensor:
        vectors, spectrum = self.eigenvectors[block], self.spectrum(block) ** exponent
        if len(vectors) == 1:
            q = vectors[0]
            return rows * spectrum if q is None else ((rows @ q) * spectrum) @ q.T
        left, right = vectors
        matrix = rows.reshape(-1, len(left), len(right))
        return (left @ ((left.T @ matrix @ right) * spectrum) @ right.T).flatten(1)


def _dense(factors: Sequence[Tensor]) -> Tensor:
    if len(factors) == 2:
        return torch.kron(factors[0].contiguous(), factors[1].contiguous())
    return factors[0] if factors[0].ndim == 2 else torch.diag(factors[0])


def weight_shape_2d(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """``(out, in)`` of a weight with its trailing dimensions flattened."""
    out = shape[0]
    rest = 1
    for size in shape[1:]:
        rest *= size
    return out, rest
