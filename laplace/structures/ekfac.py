r"""EKFAC: the eigenvectors of Kronecker factors, and beside them the exact second moments of the gradients in their basis.

KFAC takes :math:`H \approx B \otimes A = (Q_B \otimes Q_A)\,(\Lambda_B \otimes \Lambda_A)\,(Q_B \otimes Q_A)^\top`. EKFAC
(George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018; with the
Gauss-Newton matrix, Bae et al., "Training Data Attribution via Approximate Unrolled Differentiation", NeurIPS 2024) keeps the
vectors and replaces the product of eigenvalues by the diagonal of the curvature in that basis,

.. math:: s_{oi} = \sum_n \sum_k \Big(Q_B^\top \Big(\sum_r g_{nkr} a_{nr}^\top\Big) Q_A\Big)_{oi}^2 ,

over the examples :math:`n`, the directions :math:`v_{nk}` of the estimator and the positions :math:`r` that share a weight:
they are added up *before* the square, example by example, so that :math:`s` is the exact diagonal of the GGN (of the sampled or
empirical Fisher) in the basis, whether the basis is of KFAC-expand or reduce. Of all diagonals it is the one that is nearest in
Frobenius norm, so it is never farther than KFAC's from the curvature's block of that parameter.

A bias is a block of its own in the basis :math:`Q_B` of its layer; parameters without Kronecker factors have their diagonal
block. The basis takes a pass over the data of its own, and is fixed from then on: in it, second moments are sums like all
others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from laplace.capture.blocks import Block
from laplace.capture.contractions import chunks
from laplace.capture.rules import is_transposed
from laplace.linalg.gram import add_product_
from laplace.linalg.kronecker import Kron
from laplace.linalg.matmul import product
from laplace.linalg.precision import in_full_precision
from laplace.structures import kron
from laplace.structures.decomposition import decompose, widths
from laplace.structures.diag import add_square_of_row_
from laplace.structures.second_pass import BasisPart, SecondPass
from laplace.structures.specification import Factor, SumsSpec
from laplace.structures.sums import CurvatureSums


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors of Kronecker factors, in the posterior's type; found in float64.

    Attributes:
        vectors: Orthonormal matrices ``(width, width)`` by the names of the factors, such as ``'fc.weight/A'``.
    """

    vectors: Mapping[str, Tensor]

    @classmethod
    def of(cls, sums: CurvatureSums) -> Eigenbasis:
        """Decompose the summed factors of a first pass.

        Raises:
            ValueError: If a factor holds NaN or Inf, or has no eigendecomposition; names it.
            NotEnoughMemoryError: If the widest factor's eigenvectors do not fit into the free memory.
        """
        factors = Kron.from_sums(sums, sums.n_data)
        found = zip(factors.names, factors.decompose().eigenvectors, strict=True)
        pairs = [pair for names, vectors in found for pair in zip(names, vectors, strict=True)]
        return cls({name: vectors for name, vectors in pairs if vectors is not None})

    @cached_property
    def digest(self) -> str:
        """See :func:`digest_of`."""
        found = {}
        for name, value in self.vectors.items():
            array = value.detach().cpu().contiguous().numpy()
            found[name] = array.dtype.name, array.shape, hashlib.sha256(memoryview(array).cast("B")).hexdigest()
        return digest_of(found)

    def spec(self, spec: SumsSpec) -> SumsSpec:
        """The specification of sums that are taken in this basis.

        Raises:
            ValueError: If there is no matrix for a parameter, or one of another shape: the basis is of another model.
        """
        for block in spec.blocks:
            sizes = [len(self.vectors[name]) if name in self.vectors else None for name in block.basis]
            if block.basis and sizes != [*_table(block)]:
                raise ValueError(
                    f"The eigenbasis has matrices of widths {sizes} under {list(block.basis)}, which do not fit "
                    f"{block.parameter!r} of shape {block.shape}: it is of another model. Find one with a first pass."
                )
        return replace(spec, basis=self.digest)


def digest_of(matrices: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """What an eigenbasis is told by, from the type, shape and sha256 of the bytes of every matrix by name."""
    lines = [f"{name} {dtype} {list(shape)} {sha256}" for name, (dtype, shape, sha256) in sorted(matrices.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def blocks_of(shapes, found):
    """The blocks of Kronecker factors, each with one sum of the parameter's shape and the names of the factors as its basis."""
    return _corrected(kron.blocks_of(shapes, found)[0])


def second_pass(spec: SumsSpec, basis: str | None = None) -> SumsSpec:
    """The specification of second moments, from that of the Kronecker factors and the digest of their eigenbasis, if known."""
    blocks, factors = _corrected(spec.blocks)
    return replace(spec, structure="ekfac", blocks=tuple(blocks), factors=factors, basis=basis)


def _corrected(factored: Iterable[Block]) -> tuple[list[Block], dict[str, Factor]]:
    blocks = []
    for block in factored:
        if block.has_factors:
            block = replace(block, factors=(f"{block.parameter}/moments",), basis=block.factors)
        blocks.append(block)
    return blocks, {block.factors[0]: Factor(block.shape) for block in blocks}


def add_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    """Add the squares of one batch's gradients in the eigenbasis, and the squared rows of parameters without factors."""
    if sums.basis is None or sums.basis.digest != sums.spec.basis:
        raise ValueError(
            f"These sums are taken in the eigenbasis {sums.spec.basis}, but "
            + ("none is at hand. " if sums.basis is None else f"that at hand is {sums.basis.digest}. ")
            + "A batch is added with the basis of its sums, which the posterior has."
        )
    blocks = list(sums.held_blocks)
    sides = {block: [sums.basis.vectors[name].to(capture.dtype) for name in block.basis] for block in blocks}
    outputs = {block.layer: _output_side(block, sides[block], capture) for block in blocks if block.basis}
    squared: dict[str, Tensor] = {}
    for v in directions:
        gradients = capture.gradients(v)
        for layer, vectors in outputs.items():
            if gradients[layer].shape[1] == 1:
                square = _turned(gradients[layer][:, 0], vectors).square()
                squared[layer] = squared[layer].add_(square) if layer in squared else square.double()
        for block in blocks:
            if not block.basis:
                add_square_of_row_(sums, block, gradients, capture, v)
            elif block.layer not in squared:
                _add_shared(sums.running(block.factors[0]), block, sides[block], capture, gradients[block.layer])
    for block in blocks:
        if block.basis and block.layer in squared:
            _add_single(sums.running(block.factors[0]), block, sides[block], capture, squared[block.layer])


def tables(sums: CurvatureSums) -> list[Tensor]:
    """The second moments of every parameter, ``(out, in)``, or ``(size,)`` of those without two factors; rounded once."""
    values = [(block, sums.tensors[block.factors[0]].to(sums.spec.torch_dtype)) for block in sums.spec.blocks]
    return [value.reshape(_table(block)) if block.basis else value.flatten() for block, value in values]


def _table(block: Block) -> tuple[int, ...]:
    """Shape of the second moments: one dimension for each matrix of the basis."""
    first = block.shape[0]
    return (first,) if len(block.basis) == 1 else (first, block.size // first)


def _output_side(block: Block, sides: list[Tensor], capture) -> Tensor:
    """The eigenvectors of the output gradients' factor."""
    return sides[1] if len(sides) == 2 and is_transposed(capture.modules[block.layer]) else sides[0]


@in_full_precision()
def _add_single(total: Tensor, block: Block, sides: list[Tensor], capture, squared: Tensor) -> None:
    """Add the second moments of a layer with one position per example, from its squared output gradients in the basis."""
    if len(sides) == 1:
        total.add_(squared.sum(0))
        return
    turned = is_transposed(capture.modules[block.layer])
    a = product(capture.inputs(block.layer)[:, 0], sides[0 if turned else 1])
    pair = squared.to(a.dtype), a.square()
    left, right = reversed(pair) if turned else pair
    add_product_(total.view(_table(block)), left, right)


@in_full_precision()
def _add_shared(total: Tensor, block: Block, sides: list[Tensor], capture, g: Tensor) -> None:
    """Add the second moments of a layer with several positions per example along one direction, a few examples at a time."""
    if len(sides) == 1:
        total += product(g.sum(1), sides[0]).square_().sum(0)
        return
    turned = is_transposed(capture.modules[block.layer])
    first = capture.inputs(block.layer, 0, 1)
    for start, stop in chunks(len(g), max(total.numel(), first.numel()), g.device):
        a, part = capture.inputs(block.layer, start, stop), g[start:stop]
        left, right = (a, part) if turned else (part, a)
        total.view(_table(block)).add_(_rows(left, right, *sides).square_().sum(0))


@in_full_precision()
def _turned(g: Tensor, vectors: Tensor) -> Tensor:
    return product(g, vectors)


def _rows(left: Tensor, right: Tensor, left_basis: Tensor, right_basis: Tensor) -> Tensor:
    r"""``Q_lᵀ (Σᵣ lᵣ rᵣᵀ) Q_r`` of every example; the order of the products is the one with fewer multiplications."""
    positions, rows, columns = left.shape[1], left.shape[2], right.shape[2]
    if positions * (rows**2 + columns**2) < rows * columns * (rows + columns):
        return torch.bmm(product(left, left_basis).mT, product(right, right_basis))
    return left_basis.mT @ torch.bmm(left.mT, right) @ right_basis


def _parts(spec: SumsSpec) -> dict[str, BasisPart]:
    """The eigenvectors of every Kronecker factor."""
    return {name: BasisPart((width, width), (name,), float(width) ** 3) for name, width in widths(spec).items()}


def _vectors(spec: SumsSpec, name: str, factors: Mapping[str, Tensor], n_data: float) -> Tensor:
    return decompose(spec, name, factors[name], n_data)[1]


def finished(sums: CurvatureSums, basis: Mapping[str, Tensor]) -> CurvatureSums:
    """Second moments with the digest of the eigenbasis that they were added up in, as a posterior takes them."""
    vectors = Eigenbasis(basis)
    found = CurvatureSums(replace(sums.spec, basis=vectors.digest), sums.tensors, sums.loss, sums.n_data)
    found.estimator, found.basis = sums.estimator, vectors
    return found


SECOND_PASS = SecondPass("moments", second_pass, _parts, _vectors, finished)
