r"""Block-diagonal posterior, dense by layer: :math:`P = \bigoplus_l \left(H_l / (\sigma^2 T) + \mathrm{diag}(p_l)\right)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.capture import contractions
from laplace.capture.variance import dense_variance
from laplace.linalg import memory
from laplace.linalg.dense import invsqrt_precision, not_positive_definite
from laplace.linalg.eigen import eigenvalues, eigh_double, shifted
from laplace.linalg.precision import widened
from laplace.noise import check_samples
from laplace.posterior.arguments import by_name
from laplace.posterior.parametric import ParametricLaplace
from laplace.posterior.refusals import check_structure
from laplace.posterior.weights import check_type
from laplace.structures.sums import CurvatureSums


class BlockDiagLaplace(ParametricLaplace):
    """Laplace approximation with the dense curvature of every layer by itself.

    All algebra is done in float64, layer by layer, as :class:`laplace.FullLaplace` does it. A scalar prior precision shifts the
    layers' spectra, which are found once; other priors take a Cholesky factor of their own. Memory is that of the layers' dense
    blocks, :math:`8 p_l^2` bytes each and up to four times the largest one to factorise it; what does not fit is refused.

    Attributes:
        H: Dense blocks of the summed curvature in the posterior's type, ``(p_l, p_l)`` for each layer in the order of the
            parameters; zero before ``fit``.

    Example:
        >>> import torch
        >>> from laplace import BlockDiagLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = BlockDiagLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    structure = "blockdiag"

    @by_name
    def __init__(self, **kwargs: Any):
        """See :class:`laplace.BaseLaplace`."""
        self._values: dict[str, Tensor] = {}
        self._eigen: dict[str, tuple[Tensor, Tensor]] = {}
        self._scale: list[Tensor] | None = None
        super().__init__(**kwargs)
        check_structure(self._backend_cls, self.structure, "it gives dense curvature of all layers together", "full")

    def _finalize(self, sums: CurvatureSums) -> None:
        self._values, self._eigen = {}, {}

    @property
    def H(self) -> list[Tensor] | None:
        """Summed curvature of every layer; zero before ``fit``, with a block for each parameter tensor."""
        if self.sums is not None:
            return [value.to(self.sums.spec.torch_dtype) for value in self.sums.tensors.values()]
        return [torch.zeros(p.numel(), p.numel(), dtype=self._dtype, device=self._device) for p in self.params]

    def _prior_changed(self) -> None:
        self._scale = None

    def use_decompositions(self, known: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over the eigenvalues and eigenvectors of sums by name, as :mod:`laplace.structures.decomposition` makes them."""
        self._check_fitted()
        self._eigen, self._values = dict(known), {}

    @property
    def _sizes(self) -> list[int]:
        """Number of parameters of every layer."""
        return [len(value) for value in self.sums.tensors.values()]

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        """The last dimension by layers, in float64."""
        return values.double().split(self._sizes, -1)

    def _eigh(self, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of one layer's curvature, in float64."""
        if name not in self._eigen:
            self._require(name)
            self._eigen[name] = eigh_double(self.sums.tensors[name], f"summed curvature {name!r}")
        return self._eigen[name]

    def _eigenvalues(self, name: str) -> Tensor:
        """The same without eigenvectors, for the evidence."""
        if name in self._eigen:
            return self._eigen[name][0]
        if name not in self._values:
            self._require(name)
            self._values[name] = eigenvalues(self.sums.tensors[name], f"summed curvature {name!r}")
        return self._values[name]

    def _require(self, name: str) -> None:
        size = len(self.sums.tensors[name])
        memory.require(
            4 * memory.tensor_bytes(size, size),
            self._device,
            f"Factorising the dense precision of {name.removesuffix('/block')!r} over {size:,} parameters",
            "Use hessian_structure='kron', 'ekfac' or 'diag', or set requires_grad=False on the parameters of that layer.",
        )

    def _double_precision(self) -> list[Tensor]:
        """Posterior precision of every layer in float64."""
        self._check_fitted()
        factor, priors = self._H_factor.double(), self._split(self.prior_precision_diag)
        for name in self.sums.tensors:
            self._require(name)
        return [factor * value + torch.diag(p) for value, p in zip(self.sums.tensors.values(), priors, strict=True)]

    @property
    def posterior_precision(self) -> list[Tensor]:
        """Posterior precision of every layer, ``(p_l, p_l)``."""
        return [value.to(self.sums.spec.torch_dtype) for value in self._double_precision()]

    def _double_scale(self) -> list[Tensor]:
        r"""Lower triangular roots :math:`L_l` of the layers' covariances, :math:`L_l L_l^\top = P_l^{-1}`, in float64."""
        if self._scale is None or any(scale.requires_grad for scale in self._scale):
            self._scale = [invsqrt_precision(value) for value in self._double_precision()]
        return self._scale

    @property
    def posterior_scale(self) -> list[Tensor]:
        r"""Lower triangular roots of the layers' covariances, in the posterior's type."""
        return [scale.to(self.sums.spec.torch_dtype) for scale in self._double_scale()]

    @property
    def posterior_covariance(self) -> list[Tensor]:
        """Posterior covariance of every layer."""
        return [(scale @ scale.T).to(self.sums.spec.torch_dtype) for scale in self._double_scale()]

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        return self.log_det_ratio + self.log_det_prior_precision

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, as one sum in float64: the two may be large where this is small.

        Raises:
            ValueError: If the precision is not positive definite.
        """
        self._check_fitted()
        if len(self.prior_precision) == 1:
            prior = self.prior_precision.double()
            terms = [self._shifted(self._eigenvalues(name), prior) / prior for name in self.sums.tensors]
            return torch.stack([t.log().sum() for t in terms]).sum()
        terms = []
        for value, prior in zip(self._double_precision(), self._split(self.prior_precision_diag), strict=True):
            factor, info = torch.linalg.cholesky_ex(value)
            if int(info) != 0:
                raise not_positive_definite()
            terms.append((2 * factor.diagonal().log() - prior.log()).sum())
        return torch.stack(terms).sum()

    def _shifted(self, values: Tensor, prior_precision: Tensor) -> Tensor:
        return shifted(self._H_factor.double() * values, prior_precision.double())

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``."""
        deltas = self._split(value.double() - self.mean.double())
        return sum(((d @ p) * d).sum(-1) for d, p in zip(deltas, self._double_precision(), strict=True))

    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top`, ``(batch, outputs, outputs)``."""
        Js = widened(Js)
        self._check_fitted()
        halves = [part @ scale for part, scale in zip(self._split(Js), self._double_scale(), strict=True)]
        return sum(half @ half.mT for half in halves).to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly, ``(batch · outputs, batch · outputs)``."""
        return self.functional_variance(Js)

    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors ``(n_samples, parameters)``."""
        check_samples(n_samples)
        check_type(self)
        self._check_fitted()
        noise = torch.randn(n_samples, self.n_params, device=self._device, dtype=self._dtype, generator=generator)
        parts = [n @ scale.T for n, scale in zip(self._split(noise), self._double_scale(), strict=True)]
        return self.mean + torch.cat(parts, 1).to(self._dtype)

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        bases = self._bases(prior_precisions)
        found = []
        for rows in contractions.jacobian_chunks(capture, self.sums_spec().blocks):
            parts = [dense_variance(part, *base, diagonal) for part, base in zip(self._split(rows), bases, strict=True)]
            found.append(sum(parts).to(rows.dtype))
        return torch.cat(found, 1)

    def _bases(self, prior_precisions: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """For every layer a basis, and in it the variances under each of some priors.

        Raises:
            ValueError: If several priors are asked for that are not scalars, under which the layers' bases differ.
        """
        if all(len(p) == 1 for p in prior_precisions):
            known = [self._eigh(name) for name in self.sums.tensors]
            return [(q, [self._shifted(values, p).reciprocal() for p in prior_precisions]) for values, q in known]
        if len(prior_precisions) > 1 or prior_precisions[0] is not self.prior_precision:
            raise ValueError("A sweep over prior precisions of a block-diagonal posterior takes scalars only.")
        return [(scale, [scale.new_ones(len(scale))]) for scale in self._double_scale()]
