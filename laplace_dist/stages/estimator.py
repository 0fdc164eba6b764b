"""Which estimate of the curvature a run uses: chosen once, by the driver, from the settings, the run there and the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError, listed

MANY = 64  # outputs of an example, above which the exact curvature of all weights is not the default
FIELDS = ("estimator", "mc_samples", "outputs")


def given(config: Config, stored: Mapping[str, Any] | None) -> Config:
    """Return the settings with the estimator that they or the run name; it stays None where neither does.

    Args:
        config: The settings.
        stored: Those of the plan of the run that is there, or None.

    Raises:
        SettingsError: They do not go together.
    """
    chosen = {name: getattr(config, name) for name in FIELDS}
    if chosen["estimator"] is None:
        if config.outputs is not None:
            chosen["estimator"] = "ggn"
        elif config.mc_samples is not None:
            chosen["estimator"] = "mc"
        elif stored is not None:
            chosen.update(estimator=stored["estimator"], outputs=stored.get("outputs"))
    if chosen["estimator"] == "mc" and chosen["mc_samples"] is None:
        there = {} if stored is None or stored["estimator"] != "mc" else stored
        chosen["mc_samples"] = there.get("mc_samples", 1)
    found = config.model_copy(update=chosen)
    _check(found)
    return found


def _check(config: Config) -> None:
    if config.mc_samples is not None and config.estimator != "mc":
        raise SettingsError(
            f"--mc-samples: got {config.mc_samples} with --estimator {config.estimator}, which draws none; leave one out"
        )
    if config.outputs is not None and config.estimator != "ggn":
        raise SettingsError(
            f"--outputs: got {config.outputs} with --estimator {config.estimator}; expected --estimator ggn"
        )
    if config.outputs is not None and config.backend != "native":
        raise SettingsError(
            f"--outputs: got {config.outputs} with --backend {config.backend}; expected --backend native"
        )


def default(la: Any, f: Tensor) -> str:
    """Return the estimator of a run that names none: exact, but for many outputs whose exact curvature takes a pass for each.

    Args:
        la: The Laplace object with the exact estimator, which knows the factors.
        f: Outputs of a few examples.
    """
    many = f[0].numel() > MANY and la.likelihood_object.fitted.can_draw
    return "mc" if many and not la.backend.is_closed_form(f) else "ggn"


def cost(config: Config, la: Any, f: Tensor, *, chosen: bool) -> str:
    """Say which estimator it is, and what it costs.

    Args:
        config: The settings, with the estimator.
        la: The Laplace object.
        f: Outputs of a few examples.
        chosen: The settings or the run name it; else it is the default.
    """
    outputs = f[0].numel()
    if config.estimator == "ef":
        return f"empirical Fisher; {_passes(1)}"
    if config.estimator == "mc":
        samples = config.mc_samples or 1
        text = f"Monte-Carlo Fisher, {samples} sample{'s' if samples > 1 else ''} per example; {_passes(samples)}"
        return text if chosen else f"{text} (of {outputs:,} outputs; --estimator ggn is exact, in about {outputs:,})"
    if config.outputs is not None:
        shown = listed([str(index) for index in config.outputs])
        every = outputs // f.shape[-1]
        passes = _passes(len(config.outputs) * every)
        return f"exact GGN of {len(config.outputs)} of {f.shape[-1]:,} outputs ({shown}), the others held constant; {passes}"
    if la.backend.is_closed_form(f):
        return f"exact GGN of {outputs:,} outputs, in closed form"
    text = f"exact GGN of {outputs:,} outputs; about {_passes(outputs)}"
    if outputs <= MANY:
        return text
    if not la.likelihood_object.fitted.can_draw:
        return f"{text} (this likelihood has no draw(f, u), with which --estimator mc takes one)"
    return f"{text} (--estimator mc takes one)"


def _passes(count: int) -> str:
    return f"{count:,} backward pass{'' if count == 1 else 'es'} a batch"
