"""A search of the prior precision in a notebook: rounds over a data loader, with the observation noise left open or kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from laplace.enums import LinkApprox
from laplace.fitted import Fitted
from laplace.scoring import profile_noise, score_candidates
from laplace.search import Found, Lattice, Scored, next_step


def search_prior(
    la: Fitted, val_loader: Iterable, lattice: Lattice, open_noise: bool, **how: Any
) -> tuple[float | Tensor, float | Tensor]:
    """The best prior precision and observation noise on validation data.

    Args:
        la: A fitted posterior; left as it is.
        val_loader: Validation batches, gone through once for every round.
        lattice: Values to search; of the prior precision in units of the noise's where that is open.
        open_noise: Find the noise too, instead of keeping it.
        **how: Of the predictive; as :func:`score_candidates` takes them.

    Returns:
        Prior precision and noise.

    Warns:
        UserWarning: If the predictive is that of the MAP there, the loss no longer changes or never does, or the search may not
            go on.

    Raises:
        ValueError: If no value has a finite score, or there is no data.
    """
    done: list[Scored] = []
    noises: dict[int, float] = {}
    bridge = how["link_approx"] in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM) and la.likelihood_object.scales_logits
    while not isinstance(step := next_step(lattice, done), Found):
        values = [lattice.value(i) for i in step.indices]
        scores = score_candidates(la, val_loader, values, [la.logit_temperature], open_noise=open_noise, **how)
        if open_noise:
            losses, noise = profile_noise(scores.totals, scores.n)
            limit = profile_noise(scores.map_totals, scores.n)[0]
            noises |= dict(zip(step.indices, noise.tolist(), strict=True))
        else:
            losses, limit = scores.totals[:, 0] / scores.n, scores.map_totals[0] / scores.n
        done.append(Scored(step, tuple(losses.tolist()), math.nan if bridge else float(limit), scores.fixed))
    value = lattice.value(step.index)
    noise = noises.get(step.index)
    prior = value if noise is None else value / noise**2
    _warn(step.where, prior, lattice)
    return prior, la.sigma_noise if noise is None else noise


def _warn(where: str, prior: float, lattice: Lattice) -> None:
    said = {
        "high": "the predictive is that of the MAP there, so that no prior precision makes it better",
        "low": "the loss no longer changes towards weaker priors",
        "flat": "the loss does not depend on it, as where the model's outputs are constant, or have no variance",
        "edge": "the search may not go on there; widen the grid"
        if not lattice.extends
        else "the loss still falls at the end of all that can be tried",
    }
    if where in said:
        warnings.warn(f"The best prior precision is {prior:.3g}: {said[where]}.", stacklevel=4)
