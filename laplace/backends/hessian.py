r"""The Hessian :math:`\sum_n \nabla^2_\theta \ell_n` itself, without the Gauss-Newton approximation."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from laplace.backends.interface import CurvatureInterface
from laplace.backends.options import honours
from laplace.linalg.kronecker import Kron
from laplace.structures import lowrank


class HessianInterface(CurvatureInterface):
    """Dense Hessian and its eigenpairs from products with vectors; a subclass says how these are computed.

    The Hessian of a network is positive semi-definite only near a minimum. A dense posterior at weights where it is not may
    not exist; a low-rank posterior keeps its positive eigenvalues.
    """

    estimator = "hessian"

    @classmethod
    def has_structure(cls, structure: str) -> bool:
        """Dense curvature and its eigenpairs alone."""
        return structure in ("full", "lowrank")

    def curvature_product(self, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss of one batch, and its Hessian times ``vectors`` ``(parameters, k)``."""
        raise NotImplementedError(f"{type(self).__name__} has no products with vectors.")

    @honours()
    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense Hessian of one batch ``(parameters, parameters)``."""
        loss, dense = self._dense(x, y)
        indices = self.subnetwork_indices
        return loss, dense if indices is None else dense[indices][:, indices]

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Refused: a Hessian has no Kronecker factors."""
        self._refuse("kron")

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a Hessian's diagonal may be negative, so it is no posterior precision."""
        self._refuse("diag")

    def _dense(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        size = sum(p.numel() for p in self.params)
        identity = torch.eye(size, dtype=self.sums_dtype, device=self.params[0].device)
        loss, dense = self.curvature_product(x, y, identity, self._offset)
        return loss, (dense + dense.T) / 2

    def _refuse(self, structure: str) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} has no {structure!r} structure; valid are 'full' and 'lowrank'. For {structure!r} use a "
            "GGN or EF backend, such as the default one."
        )


class NativeHessian(HessianInterface):
    """Hessian by differentiating the gradient along vectors; needs no other package and takes any model.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import NativeHessian
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "lowrank", backend=NativeHessian)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def curvature_product(self, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss of one batch, and its Hessian times ``vectors`` ``(parameters, k)``."""
        return lowrank.hessian_product(self, x, y, vectors, offset)


__all__ = ["HessianInterface", "NativeHessian"]
