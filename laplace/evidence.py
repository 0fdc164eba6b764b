"""The Laplace approximation of the log marginal likelihood, and the prior precision and noise that maximise it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from laplace.fitted import Fitted


def log_marginal_likelihood(
    la: Fitted, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
) -> Tensor:
    r"""Laplace approximation of the evidence in float64, differentiable in both arguments.

    .. math:: \log p(\mathcal D) \approx \log p(\mathcal D \mid \theta)
        - \tfrac12 \left(\log\tfrac{\det P}{\det P_0} + (\theta - \mu_0)^\top P_0 (\theta - \mu_0)\right)

    Args:
        la: A fitted posterior.
        prior_precision: Replaces the current prior precision.
        sigma_noise: Replaces the current observation noise (regression).

    Raises:
        NotFittedError: Before ``fit``.
        ValueError: If ``sigma_noise`` is given for a likelihood without noise.
    """
    la._check_fitted()
    before = la.prior_precision
    if prior_precision is not None:
        la.prior_precision = prior_precision
    if sigma_noise is not None:
        try:
            la.sigma_noise = sigma_noise
        except ValueError:
            la.prior_precision = before
            raise
    return la.log_likelihood - 0.5 * (la.log_det_ratio + la.scatter)


def maximize_evidence(
    la: Fitted,
    prior_precision: Tensor,
    sigma_noise: Tensor | float | None = None,
    n_steps: int = 100,
    lr: float = 0.1,
    progress_bar: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Climb the log marginal likelihood by Adam on logarithms; it needs the factors alone, no data.

    Args:
        la: A fitted posterior; left as it is.
        prior_precision: Where the prior precision starts; its length is the prior's structure.
        sigma_noise: Where the observation noise starts, or None to keep the posterior's own.
        n_steps: Steps of Adam.
        lr: Step size of Adam.
        progress_bar: Show progress over steps.

    Returns:
        Prior precision and observation noise (None where it was kept).

    Raises:
        ValueError: If the evidence or its gradient becomes NaN or Inf.
    """
    start = (
        [prior_precision] if sigma_noise is None else [prior_precision, torch.as_tensor(sigma_noise, device=la._device)]
    )
    logs = [value.detach().to(la._device, la._dtype).log().requires_grad_(True) for value in start]
    optimizer = torch.optim.Adam(logs, lr=lr)
    before = la.prior_precision.detach(), la.sigma_noise.detach()
    try:
        with torch.enable_grad():
            for step in _steps(n_steps, progress_bar):
                optimizer.zero_grad()
                evidence = la.log_marginal_likelihood(*[log.exp() for log in logs])
                (-evidence).backward()
                if not all(bool(torch.isfinite(value).all()) for value in (evidence, *(log.grad for log in logs))):
                    raise ValueError(
                        f"The log marginal likelihood is {evidence.item()} at step {step}, and it or its gradient is not "
                        f"finite, at weights up to {float(la.mean.abs().max()):.3g}. Lower lr={lr}, or start nearer."
                    )
                optimizer.step()
    finally:
        la.prior_precision, la.sigma_noise = before
    best = [log.detach().exp() for log in logs]
    return best[0], best[1] if len(best) > 1 else None


def _steps(n_steps: int, progress_bar: bool) -> Iterable[int]:
    if not progress_bar:
        return range(n_steps)
    from tqdm.auto import tqdm

    return tqdm(range(n_steps), desc="[Optimizing marginal likelihood]")
