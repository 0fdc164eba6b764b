"""What people are told of a search on validation data: which limit it reached, whether it helps, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config

NO_TEMPERATURE = (
    "No temperature is best: the loss still falls at the end of all that can be tried, or does not depend on it, as where all "
    "predictions on the validation data are right. It stays 1."
)


NO_DEPENDENCE = (
    "The loss does not depend on the prior: no prior precision changes it, as where the model's outputs are constant, or have "
    "no variance. Look at the model and its weights."
)


def ending(limit: str | None, prior: float | None, helps: bool, given: Sequence[float] | None) -> list[str]:
    """Say which limit a search of the prior precision has reached, if any.

    Args:
        limit: `MAP`, `prior`, `edge` or None.
        prior: What was chosen.
        helps: Whether the predictive is another one than MAP's.
        given: The range in which the search had to stay.
    """
    if limit == "MAP":
        text = f"The loss is lowest where the prior precision is so large ({prior:.3g}) that the predictive is MAP's"
        return [
            f"{text}, but for the temperature."
            if helps
            else f"{text}: no prior precision makes this posterior better than MAP."
        ]
    if limit == "prior":
        return [
            f"The loss no longer changes towards weaker priors: {prior:.3g} stands for all smaller prior precisions."
        ]
    if limit == "edge":
        at = (
            "the end of all that can be tried"
            if given is None
            else f"an end of --prior-range {given[0]:g} {given[1]:g}"
        )
        return [f"The best prior precision, {prior:.3g}, lies at {at}; a better one may lie outside."]
    return []


def passed_over(compared: Mapping[str, Any], left: Sequence[float] | None = None) -> list[str]:
    """Say that the value of the lowest loss was not taken.

    Args:
        compared: Differences from MAP, by figure, of the one that was.
        left: The range that was given, if the one that was taken lies outside.
    """
    shown = ", ".join(f"{name.upper()} {found['value']:+z.4f}" for name, found in compared.items())
    text = f"The value of the lowest loss is shown to be worse than MAP. Kept is the best that is not ({shown} against MAP)."
    return [
        text if left is None else f"{text} It lies outside --prior-range {left[0]:g} {left[1]:g}, where all are worse."
    ]


def evidence_is_worse(compared: Mapping[str, Any]) -> str:
    """Say that what the evidence has chosen was not taken.

    Args:
        compared: Differences from MAP, by figure; empty where its loss is not finite.
    """
    how = f"worse than MAP on the validation data ({_worse(compared)})" if compared else "of no finite loss"
    return f"The prior of the highest evidence is shown to be {how}. A search on the validation data has chosen a scalar one."


def _worse(compared: Mapping[str, Any]) -> str:
    """Name the figures that are shown to be worse."""
    over = {name: found for name, found in compared.items() if found["low"] > 0}
    return " and ".join(
        f"{name.upper()} by {found['value']:.4f}, interval {found['low']:+z.4f} to {found['high']:+z.4f}"
        for name, found in over.items()
    )


def worse_than_map(compared: Mapping[str, Any], prior: float | None, link: str = "") -> str:
    """Say that nothing is better than MAP, and what is kept.

    Args:
        compared: Differences from MAP, by figure, of the value of the lowest loss.
        prior: The prior precision that is kept, under which the predictive is MAP's; None where none does that.
        link: Under which none does.
    """
    text = "No prior precision makes this posterior better than MAP"
    text += f": the best one is shown to be worse on the validation data ({_worse(compared)})."
    if prior is None:
        return f"{text} Under --link-approx {link} none makes the predictive that of MAP either, so that it stays: use probit."
    return f"{text} Kept is the limit in which the predictive is MAP's, prior precision {prior:.3g}."


def advice(plan: Mapping[str, Any], config: Config) -> str:
    """Say what to try where nothing makes the posterior better than MAP.

    Args:
        plan: Settings of the run.
        config: Those of the job.
    """
    ways = ["--subset-of-weights last_layer"] if plan["subset_of_weights"] == "all" else []
    ways.append(
        f"--hessian-structure {' or '.join(n for n in ('kron', 'diag', 'full') if n != plan['hessian_structure'])}"
    )
    if config.recalibrate == "prior" and likelihood_of(config.likelihood).scales_logits:
        ways.append("--recalibrate both, which divides the logits by a temperature")
    return f"To try: {'; '.join(ways)}."


def chosen(prior: Any, noise: float | None, temperature: float, method: str) -> str:
    """Say what a tuning has chosen.

    Args:
        prior: Prior precision, an array of one or more values.
        noise: Observation noise, where there is one.
        temperature: Of the logits.
        method: How.
    """
    several = f"{prior.numel()} values, {prior.min():.4g} to {prior.max():.4g}"
    text = f"prior precision {prior.item():.4g}" if prior.numel() == 1 else f"prior precision {several}"
    text += "" if noise is None else f", observation noise {noise:.4g}"
    text += "" if math.isclose(temperature, 1) else f", temperature of the logits {temperature:.4g}"
    return f"{text} ({method})"
