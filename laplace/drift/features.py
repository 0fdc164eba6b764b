r"""How far the inputs of the last layer lie from those of a reference: one number per example.

The score is the squared Mahalanobis distance to the nearest class mean with one covariance for all classes (Lee et al., "A
simple unified framework for detecting out-of-distribution samples and adversarial attacks", NeurIPS 2018), after a random
projection to a few dimensions, which keeps distances (Johnson and Lindenstrauss, 1984) and what has to be stored small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.calls import input_of

WIDTH = 32  # dimensions after the projection
_SHRINKAGE = 0.1  # share of the average variance that is added to every direction


class LastInputs:
    """Keeps what the last linear layer of a model is given, while the model runs as it is.

    Args:
        model: The network. It is left as it is: the hooks are there only within `with`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._handles, self._kept = model, [], None

    def __enter__(self) -> LastInputs:
        self._kept = None
        layers = [module for module in self._model.modules() if isinstance(module, nn.Linear)]
        self._handles = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._kept = input_of(args, kwargs)

    def projected(self) -> Tensor | None:
        """Return the inputs of the linear layer that ran last, averaged over positions, ``(batch, at most 32)`` float64.

        None where no linear layer ran.
        """
        if self._kept is None:
            return None
        x = self._kept.detach()
        return project(x.flatten(1, -2).mean(1) if x.ndim > 2 else x)


def project(x: Tensor, width: int = WIDTH) -> Tensor:
    r"""Project rows to a few dimensions by a fixed Gaussian matrix; rows that are short enough stay as they are.

    Args:
        x: ``(examples, dimensions)``.
        width: Dimensions of the result, at most.
    """
    x = x.double()
    if x.shape[1] <= width:
        return x
    generator = torch.Generator().manual_seed(x.shape[1])
    matrix = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64) / width**0.5
    return x @ matrix.to(x.device)


@dataclass(frozen=True)
class Distance:
    """A squared Mahalanobis distance to the nearest of several means.

    Attributes:
        means: ``(classes, dimensions)``.
        root: Inverse of the covariance's Cholesky factor, ``(dimensions, dimensions)``.
    """

    means: Tensor
    root: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the distances of rows ``(examples, dimensions)``."""
        white, means = x.double() @ self.root.T, self.means @ self.root.T
        return torch.cdist(white, means, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"means": self.means.tolist(), "root": self.root.tolist()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Distance:
        """Return the distance that :meth:`to_plain` gave these values."""
        return cls(*(torch.tensor(values[name], dtype=torch.float64) for name in ("means", "root")))


def fit_distance(x: Tensor, classes: Tensor | None = None) -> Distance:
    r"""Fit the means of the classes and one covariance, with a tenth of the average variance added to every direction.

    Args:
        x: Rows of the reference, ``(examples, dimensions)``.
        classes: Of the rows, as predicted; one class if not given.
    """
    x = x.double()
    classes = torch.zeros(len(x), dtype=torch.long) if classes is None else classes.long()
    labels, which = classes.unique(return_inverse=True)
    counts = torch.bincount(which, minlength=len(labels))
    means = torch.zeros(len(labels), x.shape[1], dtype=torch.float64).index_add_(0, which, x) / counts[:, None]
    centred = x - means[which]
    covariance = centred.T @ centred / len(x)
    scale = covariance.diagonal().mean()
    ridge = _SHRINKAGE * scale if scale > 0 else torch.ones((), dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(x.shape[1], dtype=torch.float64))
    return Distance(means, torch.linalg.inv(factor))
