r"""Low-rank curvature from random sketches, each of which is a sum over examples.

The randomised range finder of Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 2011), algorithms
4.1 and 5.3, of the curvature :math:`H = \sum_n J_n^\top \Lambda_n J_n`. The first pass adds up the sketch
:math:`Y = H \Omega = \sum_n r_n (r_n^\top \Omega)` over rows :math:`r_n = J_n^\top v_n`, with a Gaussian :math:`\Omega` of a
few columns more than the rank. :math:`Q` is an orthonormal basis of the columns of :math:`Y`. The second pass adds up the core
:math:`C = Q^\top H Q`, whose eigenpairs :math:`(w, l)` give those of :math:`H`, :math:`(Qw, l)`: exactly, where :math:`H` has
no higher rank than :math:`Y` has columns, else with

.. math:: \mathbb E \lVert H - QQ^\top H \rVert_F \le \sqrt{1 + \frac{k}{p - 1}} \Bigl(\sum_{j > k} \lambda_j^2\Bigr)^{1/2}

for a rank :math:`k` and :math:`p \ge 2` further columns (theorem 10.5). Rows are of the model's type; their products and sums
are of float64, so that both passes see one and the same positive semi-definite matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from laplace import noise
from laplace.capture.contractions import chunks, row_of_block
from laplace.linalg import memory
from laplace.linalg.gram import add_gram_
from laplace.structures.second_pass import BasisPart, SecondPass
from laplace.structures.specification import Factor, SumsSpec
from laplace.structures.sums import CurvatureSums

SKETCH, CORE = "lowrank-sketch", "lowrank-core"  # the structures of the two passes
_STREAM = 0x5CE7C4  # keeps the test matrix apart from labels that are drawn with the same seed
_AT_ONCE = 1 << 20  # elements of the test matrix that are drawn together
_FINEST = 1e-10 / 4  # of the largest eigenvalue: what is smaller is rounding


def sketch_spec(spec: SumsSpec, columns: int) -> SumsSpec:
    """Specification of the first pass.

    Args:
        spec: Of any structure over the same parameters.
        columns: Of the sketch: the rank and the oversampling.
    """
    size = sum(block.size for block in spec.blocks)
    return _of(spec, SKETCH, {"sketch": Factor((size, min(columns, size)))})


def core_spec(spec: SumsSpec) -> SumsSpec:
    """Specification of the second pass, from that of the first."""
    columns = spec.factors["sketch"].shape[1]
    return _of(spec, CORE, {"core": Factor((columns, columns), symmetric=True)})


def _of(spec: SumsSpec, structure: str, factors: Mapping[str, Factor]) -> SumsSpec:
    blocks = tuple(replace(block, factors=tuple(factors)) for block in spec.blocks)
    return replace(spec, structure=structure, blocks=blocks, factors=dict(factors))


def random_matrix(spec: SumsSpec, seed: int, device: torch.device | str) -> Tensor:
    r""":math:`\Omega` ``(parameters, columns)``, standard normal float64: a function of the seed, never stored."""
    size, columns = spec.factors["sketch"].shape
    memory.require(
        memory.tensor_bytes(size, columns, dtype=torch.float64),
        device,
        f"The test matrix of a sketch of {columns} columns over {size:,} parameters",
        "Lower the rank, or use hessian_structure='kron' or 'diag'.",
    )
    found = torch.empty(size, columns, dtype=torch.float64, device=device)
    for start, stop in memory.ranges(size, columns, _AT_ONCE):
        found[start:stop] = noise.normal(seed ^ _STREAM, torch.arange(start, stop, device=device), columns)
    return found


def add_sketch_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    r"""Add :math:`\sum_n r_n (r_n^\top \Omega)` of one batch; :math:`\Omega` is in the sums' ``basis``."""
    total = sums.running("sketch")
    for v in directions:
        gradients = capture.gradients(v)
        image = _image(sums, capture, gradients, v, sums.basis["test"])
        for block, place in _places(sums.spec, total):
            for start, stop in chunks(len(v), block.size, v.device):
                rows = row_of_block(block, gradients, capture, v, start, stop)
                place.addmm_(rows.double().T, image[start:stop])


def add_core_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    r"""Add :math:`\sum_n Q^\top r_n r_n^\top Q` of one batch; :math:`Q` is in the sums' ``basis``."""
    total = sums.running("core")
    for v in directions:
        add_gram_(total, [_image(sums, capture, capture.gradients(v), v, sums.basis["range"])], exact=True)


def _image(sums: CurvatureSums, capture, gradients: dict[str, Tensor], v: Tensor, matrix: Tensor) -> Tensor:
    """Rows of one batch along a direction times a thin matrix, ``(batch, columns)`` float64."""
    image = torch.zeros(len(v), matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block, place in _places(sums.spec, matrix):
        for start, stop in chunks(len(v), block.size, v.device):
            rows = row_of_block(block, gradients, capture, v, start, stop)
            image[start:stop].addmm_(rows.double(), place)
    return image


def _places(spec: SumsSpec, matrix: Tensor) -> Iterator[tuple]:
    """Every parameter with its rows of a matrix ``(parameters, columns)``."""
    return zip(spec.blocks, matrix.split([block.size for block in spec.blocks]), strict=True)


def find_range(spec: SumsSpec, name: str, factors: Mapping[str, Tensor], n_data: float) -> Tensor:
    """Orthonormal basis ``(parameters, columns)`` of the range of a sketch, float64.

    Raises:
        ValueError: If the sketch holds NaN or Inf.
    """
    sketch = factors["sketch"]
    if not bool(sketch.isfinite().all()):
        raise ValueError("The sketch of the curvature holds NaN or Inf. Look at the model's weights and the data.")
    return torch.linalg.qr(sketch)[0].contiguous()


def eigenpairs(sums: CurvatureSums, basis: Mapping[str, Tensor], rank: int | None = None) -> CurvatureSums:
    """Positive eigenpairs of the curvature in the basis, the largest first, as the sums of a low-rank posterior.

    Args:
        sums: The core.
        basis: The basis that it is in.
        rank: How many eigenpairs at most; all if not given.

    Raises:
        ValueError: If no eigenvalue is positive beyond rounding, or the basis is of another width.
    """
    core, found = sums.tensors["core"], basis["range"]
    if found.shape[1] != len(core):
        raise ValueError(f"The core is of {len(core)} directions, its basis of {found.shape[1]}.")
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    values, rotation = values.flip(0), rotation.flip(1)
    smallest = max(torch.finfo(sums.spec.torch_dtype).eps, _FINEST) * values.abs().max()
    keep = values > smallest
    if not bool(keep.any()):
        raise ValueError(
            "The curvature has no positive eigenvalue at these weights, so there is no low-rank posterior. Train the model."
        )
    tensors = {"vectors": found.double() @ rotation[:, keep][:, :rank], "values": values[keep][:rank]}
    spec = _of(sums.spec, "lowrank", {name: Factor(tuple(value.shape)) for name, value in tensors.items()})
    finished = CurvatureSums(spec, tensors, sums.loss, sums.n_data)
    finished.estimator = sums.estimator
    return finished


def _basis(spec: SumsSpec) -> dict[str, BasisPart]:
    size, columns = spec.factors["sketch"].shape
    return {"range": BasisPart((size, columns), ("sketch",), float(size) * columns**2)}


SECOND_PASS = SecondPass("core", core_spec, _basis, find_range, eigenpairs)
