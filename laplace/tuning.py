"""Choose the prior precision after the fit: by the evidence, or by a grid scored on validation data in one pass."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace import _clash as _clash  # says so where laplace-torch has replaced laplace/__init__.py
from laplace.data.batches import batches, is_metric, loss_of
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod, parse
from laplace.evidence import maximize_evidence
from laplace.fitted import Fitted
from laplace.linalg.inference import outside_inference_mode
from laplace.prior_search import search_prior
from laplace.scoring import parts, sweep
from laplace.search import Lattice


@outside_inference_mode()
def optimize_prior_precision(
    la: Fitted,
    pred_type: PredType | str = PredType.GLM,
    method: TuningMethod | str = TuningMethod.MARGLIK,
    n_steps: int = 100,
    lr: float = 0.1,
    init_prior_prec: float | Tensor = 1.0,
    prior_structure: PriorStructure | str = PriorStructure.SCALAR,
    val_loader: Iterable | None = None,
    loss: Any = None,
    log_prior_prec_min: float = -4,
    log_prior_prec_max: float = 4,
    grid_size: int = 100,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    verbose: bool = False,
    progress_bar: bool = False,
    log_prior_prec_base: float = 10.0,
    tune_noise: bool = False,
    extend: bool = False,
) -> None:
    """Set ``la.prior_precision`` to the best value found.

    Args:
        la: A fitted posterior.
        pred_type: Predictive to score a grid with, ``'glm'`` or ``'nn'``.
        method: ``'marglik'`` (Adam on the log prior precision) or ``'gridsearch'``.
        n_steps: Steps of Adam.
        lr: Step size of Adam.
        init_prior_prec: Where Adam starts; a tensor also fixes the structure.
        prior_structure: ``'scalar'``, ``'layerwise'`` or ``'diag'``.
        val_loader: Validation batches for the grid.
        loss: A function of all predictions at once, called with what :func:`laplace.utils.validate` gives it: probabilities
            and targets, or for regression means, variances and targets. Or a torchmetrics metric of probabilities or means
            and targets, of which each value of the grid gets its own. None: negative log likelihood, for regression that of
            the Gaussian whose variance is the predictive one plus the observation noise's.
        log_prior_prec_min: Lower end of the grid, as an exponent.
        log_prior_prec_max: Upper end of the grid, as an exponent.
        grid_size: Number of values on the grid. Where these are more than some 3 for every decade up to the largest
            curvature, the variances of all come from those of so few, within 2e-5 (:mod:`laplace.interpolation`).
        link_approx: Link of the GLM predictive.
        n_samples: Samples of predictives that draw any.
        verbose: Print the chosen value.
        progress_bar: Show progress.
        log_prior_prec_base: Base of the grid's exponents.
        tune_noise: Set ``la.sigma_noise`` of a regression to its best value together with the prior precision, as the jobs do,
            instead of keeping it. By the evidence, from the value that it has; or on a grid, which then is one of the prior
            precision in units of the noise's, so that the best noise of each value is a formula.
        extend: Search the grid from coarse to fine, and go on beyond its ends until the best value lies inside, or the loss no
            longer changes, as the jobs do; each round is a pass over the data.

    Warns:
        UserWarning: If the best value lies on the edge of the grid; under ``extend``, if the predictive is that of the MAP
            there, so that no prior precision helps, or if the loss no longer changes towards weaker priors, or with any.

    Raises:
        ValueError: On unknown arguments, a missing or empty ``val_loader``, or when no value has a finite score; for
            ``tune_noise`` without a noise, or on a grid under ``pred_type='nn'`` or a ``loss``; for ``extend`` with a ``loss``.
    """
    la._check_fitted()
    method = parse(TuningMethod, method, "method")
    _check_options(la, method, pred_type, loss, tune_noise, extend)
    if method is TuningMethod.MARGLIK:
        start = la.initial_prior_precision(init_prior_prec, prior_structure)
        noise = la.sigma_noise if tune_noise else None
        la.prior_precision, noise = maximize_evidence(la, start, noise, n_steps, lr, progress_bar)
        la.sigma_noise = la.sigma_noise if noise is None else noise
    else:
        if val_loader is None:
            raise ValueError("method='gridsearch' needs val_loader; without validation data use method='marglik'.")
        ends = log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base
        how = {"link_approx": link_approx, "pred_type": pred_type, "n_samples": n_samples, "progress_bar": progress_bar}
        grid = prior_precision_grid(*ends)
        if tune_noise or extend:
            lattice = Lattice(*ends, extends=extend)
            la.prior_precision, la.sigma_noise = search_prior(la, val_loader, lattice, tune_noise, **how)
        else:
            la.prior_precision = select_prior_precision(grid, _grid_scores(la, val_loader, grid, loss, how))
    if verbose:
        print(f"Optimized prior precision is {la.prior_precision}.")


def _grid_scores(la: Fitted, loader: Iterable, grid: Tensor, loss: Any, how: Mapping[str, Any]) -> Tensor:
    """Scores of the values of a grid: mean negative log likelihoods, or those of a user's loss."""
    if loss is not None:
        return _score_with(la, loader, grid, loss, **how)
    total, n = score_grid(la, loader, grid, **how)
    return total / n


def _check_options(la: Fitted, method: TuningMethod, pred_type: Any, loss: Any, tune_noise: bool, extend: bool) -> None:
    """Refuse options that mean nothing together."""
    grid = method is TuningMethod.GRIDSEARCH
    if tune_noise and not la.likelihood_object.has_noise:
        raise ValueError(f"tune_noise=True has no meaning for {la.likelihood_object.identity}, which has no noise.")
    if tune_noise and grid and (loss is not None or parse(PredType, pred_type, "pred_type") is not PredType.GLM):
        raise ValueError(
            "tune_noise=True on a grid takes the noise from the loss of the Gaussian of pred_type='glm'; leave out loss and "
            "pred_type, or use method='marglik'."
        )
    if extend and (loss is not None or not grid):
        raise ValueError("extend=True is for method='gridsearch' with the negative log likelihood; leave out loss.")


def prior_precision_grid(log_min: float = -4, log_max: float = 4, size: int = 100, base: float = 10.0) -> Tensor:
    """Values ``base ** linspace(log_min, log_max, size)`` in float64.

    Raises:
        ValueError: If the grid would be empty or inverted.
    """
    if size < 1 or log_min > log_max:
        raise ValueError(
            f"A grid from {log_min} to {log_max} with {size} values is empty; give size >= 1 and min <= max."
        )
    return torch.logspace(log_min, log_max, size, base=base, dtype=torch.float64, device="cpu")


def score_grid(
    la: Fitted,
    loader: Iterable,
    grid: Tensor,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    seed: int = 0,
    progress_bar: bool = False,
) -> tuple[Tensor, int]:
    """Summed loss of every prior precision on the grid, each by itself, in one pass over the data.

    Args:
        la: A fitted posterior; left as it is.
        loader: Validation batches.
        grid: Scalar prior precisions.
        link_approx: Link of the GLM predictive.
        pred_type: ``'glm'`` or ``'nn'``.
        n_samples: Samples of predictives that draw any.
        seed: Seed of these samples; all values of the grid see the same draws.
        progress_bar: Show progress over batches.

    Returns:
        Negative log likelihoods summed over examples, ``(len(grid),)`` float64, and the number of terms (examples, or
        examples times outputs for regression). Both add up over shards of the data.

    Raises:
        ValueError: If the loader is empty, or targets do not fit the predictions.
    """
    la._check_weights()
    total, n = torch.zeros(len(grid), dtype=torch.float64, device="cpu"), 0
    examples, law, noise = 0, la.likelihood_object.fitted, float(la.sigma_noise.detach())
    arguments = grid, link_approx, pred_type, n_samples, seed, [la.logit_temperature]
    for x, y in parts(la, loader, progress_bar):
        for index, _, prediction, _ in sweep(la, x, *arguments, with_map=False, offset=examples):
            if index == 0:
                law.check_scored(prediction, y, examples)
            total[index] += law.tuning_loss(prediction, y, noise)
        n, examples = n + y.numel(), examples + len(y)
    if n == 0:
        raise ValueError("The validation data is empty.")
    return total, n


def _score_with(
    la, loader, grid: Tensor, loss: Any, link_approx, pred_type, n_samples: int, progress_bar: bool = False
) -> Tensor:
    """Scores under a user's loss: a metric of its own per value, or a function of all predictions."""
    running = is_metric(loss)
    metrics = [copy.deepcopy(loss).to(la._device) for _ in grid] if running else []
    for metric in metrics:
        metric.reset()
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in grid]
    la._check_weights()
    seen = 0
    arguments = grid, link_approx, pred_type, n_samples, 0, [la.logit_temperature]
    for x, y in parts(la, loader, progress_bar):
        how = {"spread": not running, "diagonal": False, "with_map": False, "offset": seen}
        seen += len(y)
        for index, _, prediction, _ in sweep(la, x, *arguments, **how):
            shown = as_tuple(la.likelihood_object.fitted.public(prediction))
            if running:
                metrics[index].update(shown[0], y)
            else:
                rows[index].append((*shown, y))
    if not seen:
        raise ValueError("The validation data is empty.")
    scores = [metric.compute() for metric in metrics] if running else [loss_of(loss, values) for values in rows]
    return torch.tensor([float(score) for score in scores], dtype=torch.float64, device="cpu")


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A prediction as several tensors, of which there may be one."""
    return value if isinstance(value, tuple) else (value,)


def select_prior_precision(grid: Tensor, scores: Tensor) -> Tensor:
    """The value of the grid with the lowest finite score; of equal scores, the middle one.

    Warns:
        UserWarning: If it lies on the edge of the grid, so that the optimum may lie outside.

    Raises:
        ValueError: If no score is finite.
    """
    finite = torch.isfinite(scores)
    if not bool(finite.any()):
        raise ValueError("No prior precision on the grid has a finite score; look at the predictions and the targets.")
    usable = torch.where(finite, scores, torch.full_like(scores, math.inf))
    ties = (usable == usable.min()).nonzero().flatten()
    best = int(ties[len(ties) // 2])
    if len(grid) > 1 and len(ties) < len(grid) and best in (0, len(grid) - 1):
        warnings.warn(
            f"The best prior precision {float(grid[best]):.3g} lies on the edge of the grid "
            f"[{float(grid[0]):.3g}, {float(grid[-1]):.3g}]; widen it.",
            stacklevel=2,
        )
    return grid[best]


@torch.no_grad()
def validate(
    laplace: Fitted,
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
            fitting=True,
        )
        out = as_tuple(out)
        if running:
            loss.update(out[0], y)
        else:
            rows.append((*out, y))
    if not seen:
        raise ValueError("The validation data is empty.")
    return float(loss.compute()) if running else loss_of(loss, rows)
