r"""Low-rank posterior: :math:`P = U\,\mathrm{diag}(l)\,U^\top / (\sigma^2 T) + \mathrm{diag}(p_0)` with few columns of U.

Woodbury's identity reduces every inverse and determinant to matrices of the rank's size. With
:math:`W = P_0^{-1/2} U \mathrm{diag}(l)^{1/2}` and :math:`G = W^\top W`,

.. math:: P^{-1} = P_0^{-1/2} \left(I - W (I + G)^{-1} W^\top\right) P_0^{-1/2}, \qquad \det P = \det P_0 \det(I + G).

The differences that this involves are taken in float64, whatever the model's type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace.backends.hessian import NativeHessian
from laplace.backends.interface import CurvatureInterface
from laplace.capture import contractions
from laplace.capture.blocks import Basis
from laplace.capture.variance import block_variance
from laplace.capture.weights import constant
from laplace.linalg.inference import outside_inference_mode
from laplace.linalg.precision import widened
from laplace.noise import check_samples
from laplace.posterior.arguments import by_name
from laplace.posterior.parametric import ParametricLaplace
from laplace.posterior.refusals import NotASum
from laplace.posterior.weights import check_type
from laplace.prior import spread
from laplace.structures import passes
from laplace.structures.specification import Factor, SumsSpec
from laplace.structures.sums import CurvatureSums


class LowRankLaplace(NotASum, ParametricLaplace):
    """Laplace approximation over all weights with the leading eigenpairs of the curvature.

    The default backend is :class:`laplace.curvature.NativeHessian`: the same matrix as that of ``AsdlHessian``, the customary
    default, but from products with vectors that need no further package and converge to the precision of the model's type,
    where ASDL's power iteration stops after a fixed number of steps. Any backend with ``eig_lowrank`` will do; GGN and EF
    backends take the eigenpairs of their own matrix. ``backend_kwargs={'low_rank': k}`` sets the rank (10).

    Eigenpairs of parts of the data do not add up, so ``fit(override=False)`` and raw sums of batches are refused.

    Attributes:
        H: Eigenvectors ``(parameters, rank)`` and positive eigenvalues ``(rank,)`` of the summed curvature; of rank 0 before
            ``fit``.

    Example:
        >>> import torch
        >>> from laplace import LowRankLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = LowRankLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    structure = "lowrank"
    why_not = (
        "a low-rank posterior: eigenpairs of parts of the data do not add up. Fit once over all of it, or use "
        "hessian_structure='kron', 'diag' or 'full', which add up."
    )

    @by_name
    def __init__(self, *, backend: type[CurvatureInterface] | None = NativeHessian, **kwargs: Any):
        """See :class:`laplace.BaseLaplace`."""
        super().__init__(backend=backend or NativeHessian, **kwargs)
        nothing = torch.zeros(self.n_params, 0, dtype=self._dtype, device=self._device)
        self.H = nothing, nothing[0]

    # --- fitting -------------------------------------------------------------------------------------------------

    def initialize(self, x: Any) -> SumsSpec:
        """Decide from one batch of inputs how every parameter's Jacobian is obtained."""
        self._check_parameters(x)
        spec = self.backend.initialize(x, "diag")
        blocks = tuple(replace(block, factors=("vectors", "values")) for block in spec.blocks)
        factors = {"vectors": Factor((self.n_params, 0)), "values": Factor((0,))}
        self._spec = replace(spec, structure="lowrank", blocks=blocks, factors=factors)
        self.n_outputs = spec.n_outputs
        return self._spec

    @outside_inference_mode()
    def fit(self, train_loader: Iterable, override: bool = True, progress_bar: bool = False) -> None:
        """Find the leading eigenpairs of the curvature over a data loader, in several passes over it.

        Args:
            train_loader: Batches ``(x, y)`` or dict-like ones; the same data at every pass.
            override: Has to be True.
            progress_bar: Without effect here.

        Raises:
            NonFiniteError: On NaN or Inf; names the examples. An earlier fit stays as it was.
            ValueError: If ``override`` is False, on an empty loader, or targets that do not fit. An earlier fit stays.
        """
        if not override:
            self._refuse("fit(override=False)")
        with self._or_as_before():
            x, n_data = self._first_inputs(train_loader)
            spec = self.initialize(x)
            vectors, values, loss = self.backend.eig_lowrank(train_loader)
            factors = {"vectors": Factor(tuple(vectors.shape)), "values": Factor(tuple(values.shape))}
            tensors = {"vectors": vectors.double(), "values": values.double()}
            loss = torch.as_tensor(loss, dtype=torch.float64, device=self._device)
            sums = CurvatureSums(replace(spec, factors=factors), tensors, loss, n_data)
            sums.estimator = self.backend.estimator
            self.set_sums(sums)

    def _first_inputs(self, loader: Iterable) -> tuple[Any, int]:
        """Inputs of the first batch, and the number of examples in all."""
        passes.refuse_iterator(loader, "A low-rank fit")
        first, n = None, 0
        for x, y in self._batches(loader):
            first, n = (x if n == 0 else first), n + len(y)
        if n == 0:
            raise ValueError("The data loader is empty, so there is nothing to fit. An earlier fit stays as it was.")
        return first, n

    def _finalize(self, sums: CurvatureSums) -> None:
        self.H = tuple(sums.tensors[name].to(sums.spec.torch_dtype) for name in ("vectors", "values"))

    # --- algebra -------------------------------------------------------------------------------------------------

    @property
    def posterior_precision(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Parts of the precision ``U @ diag(l) @ U.T + diag(p_0)`` as ``((U, l), p_0)``, scaled by noise and temperature."""
        self._check_fitted()
        return (self.H[0], self._H_factor * self.H[1]), self.prior_precision_diag

    @property
    def V(self) -> Tensor:
        r""":math:`P_0^{-1} U`, ``(parameters, rank)``."""
        (vectors, _), prior = self.posterior_precision
        return vectors / prior[:, None]

    @property
    def Kinv(self) -> Tensor:
        r""":math:`(\mathrm{diag}(l)^{-1} + U^\top P_0^{-1} U)^{-1}`, the only inverse, ``(rank, rank)``.

        The covariance is :math:`P^{-1} = P_0^{-1} - V K^{-1} V^\top`.
        """
        root, factor = self._core(self.prior_precision_diag)
        half = torch.linalg.solve_triangular(factor, torch.diag(root), upper=False)
        return (half.T @ half).to(self._dtype)

    def _core(self, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Roots of the scaled eigenvalues, and the Cholesky factor of ``I + G``, in float64."""
        self._check_fitted()
        vectors, root = self.H[0].double(), (self._H_factor.double() * self.H[1].double()).sqrt()
        gram = root[:, None] * (vectors.T @ (vectors / prior.double()[:, None])) * root
        return root, torch.linalg.cholesky(gram + torch.eye(len(root), dtype=gram.dtype, device=gram.device))

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        return self.log_det_prior_precision + self.log_det_ratio

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, which is :math:`\log\det(I + G)`."""
        _, factor = self._core(self.prior_precision_diag)
        return 2 * factor.diagonal().log().sum()

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``."""
        (vectors, values), prior = self.posterior_precision
        delta = value - self.mean
        return (delta.square() * prior).sum(-1) + ((delta @ vectors).square() * values).sum(-1)

    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top`, ``(batch, outputs, outputs)``."""
        Js = widened(Js)
        prior = self.prior_precision_diag.double()
        scaled = Js.double() / prior
        half = self._half(scaled @ self.H[0].double(), prior)
        return (scaled @ Js.double().transpose(-1, -2) - half @ half.transpose(-1, -2)).to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly, ``(batch · outputs, batch · outputs)``."""
        return self.functional_variance(Js)

    def _half(self, projected: Tensor, prior: Tensor) -> Tensor:
        r""":math:`h` with :math:`h h^\top` the reduction of the prior's variance; ``projected`` is :math:`J P_0^{-1} U`."""
        root, factor = self._core(prior)
        return torch.linalg.solve_triangular(factor, (projected * root).mT, upper=False).mT

    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors ``(n_samples, parameters)``."""
        check_samples(n_samples)
        check_type(self)
        prior = self.prior_precision_diag.double()
        root, factor = self._core(prior)
        noise = torch.randn(
            n_samples, self.n_params, device=self._device, dtype=self._dtype, generator=generator
        ).double()
        w = self.H[0].double() * root / prior.sqrt()[:, None]
        values, rotation = torch.linalg.eigh(factor @ factor.T)  # of I + G
        shrink = -1 / (values.sqrt() * (1 + values.sqrt()))  # (λ^-½ - 1) / (λ - 1): the root of the identity above
        w = w @ rotation
        noise = noise + ((noise @ w) * shrink) @ w.T
        return self.mean + (noise / prior.sqrt()).to(self._dtype)

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        """Prior variance minus what the data took away; scalar priors share all that depends on the batch."""
        dtype, capture.dtype = capture.dtype, torch.float64
        blocks = self.sums_spec().blocks
        scalars: tuple[Tensor, Tensor] | None = None
        variances = []
        for value in prior_precisions:
            if len(value) == 1:
                scalars = scalars or self._from_unit_prior(capture, blocks, diagonal)
                prior, total, projected = value.double().expand(self.n_params), *(s / value.double() for s in scalars)
            else:
                prior = spread(value.double(), [p.numel() for p in self.params])
                total = self._prior_variance(capture, blocks, prior, diagonal)
                projected = self._projected(capture, blocks, self.H[0].double() / prior[:, None])
            half = self._half(projected, prior)
            variances.append(total - (half.square().sum(-1) if diagonal else half @ half.mT))
        return torch.stack(variances).to(dtype)

    def _from_unit_prior(self, capture: Any, blocks: Any, diagonal: bool) -> tuple[Tensor, Tensor]:
        ones = torch.ones(self.n_params, dtype=torch.float64, device=self._device)
        total = self._prior_variance(capture, blocks, ones, diagonal)
        return total, self._projected(capture, blocks, self.H[0].double())

    def _prior_variance(self, capture: Any, blocks: Any, prior: Tensor, diagonal: bool) -> Tensor:
        parts = prior.reciprocal().split([block.size for block in blocks])
        weights = [p if len(b.shape) < 2 else p.view(b.shape[0], -1) for p, b in zip(parts, blocks, strict=True)]
        return block_variance(capture, blocks, [Basis()] * len(blocks), [constant(w) for w in weights], 1, diagonal)[0]

    def _projected(self, capture: Any, blocks: Any, matrix: Tensor) -> Tensor:
        """Jacobians times a thin matrix, ``(batch, outputs, rank)``, one output at a time."""
        places = matrix.split([block.size for block in blocks])
        projected = []
        for v in contractions.output_directions(capture.f):
            gradients = capture.gradients(v)
            total = torch.zeros(len(v), matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            for block, place in zip(blocks, places, strict=True):
                for start, stop in contractions.chunks(len(v), block.size, v.device):
                    rows = contractions.row_of_block(block, gradients, capture, v, start, stop)
                    total[start:stop] += rows.double() @ place
            projected.append(total)
        return torch.stack(projected, 1)
