"""The observation noise of every output, from the residuals of a trained network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from laplace.capture.evaluation import eval_mode
from laplace.data.batches import batches


@torch.no_grad()
def residual_noise(model: nn.Module, loader: Iterable, dict_key_y: str = "labels") -> Tensor:
    r"""Root mean squared residual of every output, the maximum likelihood estimate of its noise, float64.

    For :class:`laplace.likelihoods.GaussianPerOutput`, whose common factor the evidence or a grid then tunes: an overfitted
    network's residuals are too small on the data that it was trained on, so give others where there are any.

    Args:
        model: A trained network with outputs ``(batch, …, outputs)``.
        loader: Batches of inputs and targets.
        dict_key_y: Key of the targets in dict-like batches.

    Raises:
        ValueError: If there is no data, targets have another shape than outputs, or the residuals of an output are all zero.
    """
    total, n = None, 0
    device = next(model.parameters()).device
    with eval_mode(model):
        for x, y in batches(loader, device, dict_key_y):
            f = model(x).double()
            if f.shape != y.shape:
                raise ValueError(f"Targets of shape {tuple(y.shape)} do not match outputs of shape {tuple(f.shape)}.")
            squares = (f - y.double()).square().reshape(-1, f.shape[-1])
            total, n = squares.sum(0) + (0 if total is None else total), n + len(squares)
    if total is None:
        raise ValueError("The data loader is empty, so there are no residuals.")
    if not bool((total > 0).all()):
        raise ValueError(f"The residuals of outputs {(total == 0).nonzero().flatten().tolist()} are all zero.")
    return (total / n).sqrt()
