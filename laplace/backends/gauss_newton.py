r"""Curvature of Gauss-Newton type from Jacobians: the GGN, its Monte-Carlo Fisher estimate, and the empirical Fisher.

All are :math:`\sum_n J_n^\top \left(\sum_k v_{nk} v_{nk}^\top\right) J_n` with directions :math:`v_{nk}` in output space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from laplace.backends.interface import CurvatureInterface
from laplace.backends.options import honours
from laplace.enums import Likelihood
from laplace.linalg.gram import gram, sum_of_squares
from laplace.noise import fresh_seed
from laplace.structures import lowrank


class _Directional(CurvatureInterface):
    r"""Curvature :math:`\sum_n \sum_k J_n^\top v_{nk} v_{nk}^\top J_n` along the ``directions`` :math:`v` of a subclass."""

    @honours("mc_samples")
    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense curvature of one batch ``(parameters, parameters)``, from dense Jacobians."""
        loss, rows = self._rows(x, y)
        return loss, gram(rows)

    @honours("mc_samples")
    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Its diagonal ``(parameters,)``."""
        loss, rows = self._rows(x, y)
        return loss, sum_of_squares(rows)

    def curvature_product(self, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss of one batch, and its curvature times ``vectors`` ``(parameters, k)``."""
        return lowrank.gauss_newton_product(self, x, y, vectors, offset)

    def _rows(self, x: Any, y: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
        """Summed loss, and for every direction the rows ``(batch, parameters)``."""
        js, f = self.jacobians(x)
        self.likelihood_object.check(f, y, self._offset)
        loss = self.likelihood_object.loss(f, y)
        directions, js = self.directions(f.double(), y, self._offset), js.flatten(1, -2)
        return loss, (torch.bmm(v.to(js.dtype).reshape(len(f), 1, -1), js)[:, 0] for v in directions)


class GGNInterface(_Directional):
    """Generalised Gauss-Newton from dense Jacobians, or its Monte-Carlo Fisher estimate.

    Args:
        model: As for :class:`CurvatureInterface`, like all further arguments but the two below.
        likelihood: See there.
        last_layer: See there.
        subnetwork_indices: See there.
        dict_key_x: See there.
        dict_key_y: See there.
        low_rank: See there.
        stochastic: Sample labels from the model (Fisher) instead of summing over classes (GGN).
        num_samples: Labels drawn per example if ``stochastic``.
        seed: Seed of these draws. None draws a seed from torch's global generator at every batch.

    Raises:
        ValueError: If ``num_samples`` is not positive.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import GGNInterface
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "diag", backend=GGNInterface)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        seed: int | None = None,
        low_rank: int = 10,
    ):
        """See the class."""
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")
        self.stochastic = stochastic
        self.num_samples = num_samples
        self.seed = seed
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, low_rank)

    @property
    def estimator(self) -> str:
        """``'ggn'``, or ``'mc'`` where it is sampled."""
        return "mc" if self.stochastic else "ggn"

    def directions(self, f: Tensor, y: Tensor, offset: int = 0):
        """Output directions whose outer products sum to the output Hessian or its estimate, each shaped like ``f``."""
        if not self.stochastic:
            return self.likelihood_object.hessian_root(f, y)
        seed = fresh_seed() if self.seed is None else self.seed
        return self.likelihood_object.sampled_gradients(f, y, self.num_samples, seed, offset)


class EFInterface(_Directional):
    r"""Empirical Fisher :math:`\sum_n \nabla\ell_n \nabla\ell_n^\top` at the data's own labels.

    The gradients are those at unit noise and temperature; posteriors scale their sum by :math:`1/(\sigma^2 T)` as they scale
    the GGN, as laplace-torch does. The empirical Fisher of the scaled likelihood itself would have the square of that.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import EFInterface
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "diag", backend=EFInterface)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    estimator = "ef"

    def directions(self, f: Tensor, y: Tensor, offset: int = 0):
        """The one gradient per example, of the outputs ``f``."""
        return iter([self.likelihood_object.gradient(f, y)])
