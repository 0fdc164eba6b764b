"""Small helpers under their customary import path; :mod:`laplace.utils` has them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laplace.posterior.base import spread
from laplace.posterior.full import invsqrt_precision as invsqrt_precision
from laplace.predictive import gaussian_samples
from laplace.utils.batches import batches, is_metric, joined
from laplace.utils.enums import Likelihood, LinkApprox, PredType, PriorStructure, parse
from laplace.utils.matrix import symeig as symeig
from laplace.utils.subset import SoDSampler as SoDSampler

if TYPE_CHECKING:
    from laplace.posterior.parametric import ParametricLaplace

normal_samples = gaussian_samples


def get_nll(out_dist: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log likelihood of class probabilities ``(batch, classes)`` at labels ``(batch,)``, in nats."""
    return nn.functional.nll_loss(out_dist.log(), targets)


@torch.no_grad()
def validate(
    laplace: ParametricLaplace,
    val_loader: Iterable,
    loss: Any | Callable[..., Tensor | float],
    pred_type: PredType | str = PredType.GLM,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    dict_key_y: str = "labels",
) -> float:
    """Loss of the predictive on validation data.

    Args:
        laplace: A fitted posterior.
        val_loader: Validation batches.
        loss: A torchmetrics metric, which is reset first and gets ``(probabilities or means, targets)`` of every batch;
            or a function of all probabilities and targets at once, for regression of all means, variances and targets.
        pred_type: ``'glm'`` or ``'nn'``.
        link_approx: Link of the GLM predictive.
        n_samples: Samples of predictives that draw any.
        dict_key_y: Key of the targets in dict-like batches.

    Raises:
        ValueError: If the loader is empty.
    """
    running = is_metric(loss)
    if running:
        loss = loss.to(laplace._device) if hasattr(loss, "to") else loss
        loss.reset()
    rows: list[tuple[Tensor, ...]] = []
    seen = False
    for x, y in batches(val_loader, laplace._device, dict_key_y):
        seen = True
        out = laplace(
            x,
            pred_type=pred_type,
            link_approx=link_approx,
            n_samples=n_samples,
            fitting=laplace.likelihood is Likelihood.REWARD_MODELING,
        )
        out = out if isinstance(out, tuple) else (out,)
        if running:
            loss.update(out[0], y)
        else:
            rows.append((*out, y))
    if not seen:
        raise ValueError("The validation data is empty.")
    return float(loss.compute() if running else loss(*joined(rows)))


def parameters_per_layer(model: nn.Module) -> list[int]:
    """Number of entries of every parameter tensor with ``requires_grad``."""
    return [p.numel() for p in model.parameters() if p.requires_grad]


def expand_prior_precision(prior_prec: Tensor, model: nn.Module) -> Tensor:
    """One prior precision per parameter, from a scalar, one value per parameter tensor, or one per parameter.

    Raises:
        ValueError: On another number of values.
    """
    return spread(prior_prec.reshape(-1), parameters_per_layer(model))


def fix_prior_prec_structure(
    prior_prec_init: float | Tensor,
    prior_structure: PriorStructure | str,
    n_layers: int,
    n_params: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A prior precision of the given structure that is ``prior_prec_init`` everywhere."""
    structure = parse(PriorStructure, prior_structure, "prior_structure")
    sizes = {PriorStructure.SCALAR: 1, PriorStructure.LAYERWISE: n_layers, PriorStructure.DIAG: n_params}
    return torch.as_tensor(prior_prec_init, device=device, dtype=dtype).reshape(1).repeat(sizes[structure])


def kron(t1: Tensor, t2: Tensor) -> Tensor:
    """Kronecker product of two matrices."""
    return torch.kron(t1, t2)


def block_diag(blocks: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrix of a list of matrices."""
    return torch.block_diag(*blocks)


def diagonal_add_scalar(X: Tensor, value: float | Tensor) -> Tensor:
    """``X + value · I`` for a square matrix, as a new tensor."""
    return X + value * torch.eye(len(X), dtype=X.dtype, device=X.device)
