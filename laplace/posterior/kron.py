r"""Kronecker-factored posterior: :math:`P = \bigoplus_l \left(B_l \otimes A_l / (\sigma^2 T) + \delta_l I\right)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace.linalg.decomposed import KronDecomposed, KronSpectrum
from laplace.linalg.kronecker import Kron
from laplace.posterior.arguments import before, by_name
from laplace.posterior.decomposed import DecomposedLaplace
from laplace.posterior.parametric import ParametricLaplace
from laplace.structures.sums import CurvatureSums


class KronLaplace(DecomposedLaplace):
    r"""Laplace approximation with Kronecker-factored curvature.

    The input side of the summed factors is divided by the number of examples here and nowhere else:
    :math:`H_l \approx \sum_n g_n g_n^\top \otimes \tfrac1N \sum_n a_n a_n^\top` for a weight, and
    :math:`\sum_n g_n g_n^\top` for a bias.

    Args:
        damping: Add the root of the prior precision to each factor's eigenvalues instead of the prior precision to
            their products.
        **kwargs: As for :class:`laplace.BaseLaplace`.

    Attributes:
        H_facs: Kronecker factors of the summed curvature, :class:`laplace.utils.matrix.Kron`.
        H: Their eigendecomposition, :class:`laplace.utils.matrix.KronDecomposed`, made on first use.

    Example:
        >>> import torch
        >>> from laplace import KronLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = KronLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    structure = "kron"
    title = "Kron"

    order = before(ParametricLaplace.order, "backend_kwargs", "damping")

    @by_name
    def __init__(self, *, damping: bool = False, **kwargs: Any):
        """See the class."""
        self.damping = damping
        self.H_facs: Kron | None = None
        self._decomposed: KronDecomposed | None = None
        self._eigenvalues: KronSpectrum | None = None
        super().__init__(**kwargs)

    @property
    def damping(self) -> bool:
        """Whether the root of the prior precision is added to each factor's eigenvalues."""
        return self._damping

    @damping.setter
    def damping(self, value: bool) -> None:
        self._damping = bool(value)
        known = getattr(self, "_decomposed", None)
        if known is not None:
            self._decomposed = KronDecomposed(known.eigenvectors, known.eigenvalues, known.deltas, self._damping)
        self._eigenvalues = None

    def _settings(self) -> tuple[str, ...]:
        return (*super()._settings(), "damping")

    def _finalize(self, sums: CurvatureSums) -> None:
        self.H_facs = Kron.from_sums(sums, sums.n_data)
        self._decomposed = self._eigenvalues = None

    @property
    def H(self) -> KronDecomposed | None:
        """Eigendecomposition of the summed curvature; zero before ``fit``."""
        if self.H_facs is None:
            nothing = super().H
            return (
                None
                if nothing is None
                else KronDecomposed(nothing.eigenvectors, nothing.eigenvalues, None, self.damping)
            )
        if self._decomposed is None:
            self._decomposed = self.H_facs.decompose(damping=self.damping)
        return self._decomposed

    def use_decompositions(self, known: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over eigenvalues and eigenvectors of factors by name, as :mod:`laplace.structures.decomposition` makes them."""
        self._check_fitted()
        self._decomposed, self._eigenvalues = self.H_facs.decompose(self.damping, known), None

    @property
    def _spectrum(self) -> KronSpectrum:
        """Eigenvalues of the posterior precision. Eigenvectors cost several times as much, and the evidence needs none."""
        self._check_fitted()
        if self._eigenvalues is None:
            known = self._decomposed
            self._eigenvalues = self.H_facs.eigenvalues(self.damping) if known is None else known
        return self._shifted(self._eigenvalues, self.prior_precision)
