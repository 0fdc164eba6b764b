"""The numbers of a training by empirical Bayes: what was trained, and how evidence, loss, prior and noise went by epoch."""

from __future__ import annotations

from typing import Any

from laplace_dist.config.training import Training
from laplace_dist.plan.plan import Plan
from laplace_dist.report.html.fitted import fitted
from laplace_dist.report.html.running import running
from laplace_dist.run import layout, training
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.training import Epoch
from laplace_dist.storage.store import Store


def of_training(store: Store, plan: Plan) -> dict[str, Any]:
    """Return the sections of a training's report.

    Args:
        store: The checkpoint.
        plan: Of the run.

    Raises:
        CheckpointError: An epoch's manifest is missing, truncated or altered.
    """
    history = training.epochs(store, plan)
    own = _settings(plan, max(1, len(history)))
    found = _trained(history)
    found |= {"settings": own.model_dump(), "prior_structure": plan.settings.get("prior_structure", "scalar")}
    weights = f"{store.url.rstrip('/')}/{layout.TRAINED}" if store.exists(layout.TRAINED) else None
    return {
        "fitted": fitted(store, plan, None, own) | {"environment": _environment(store, history)},
        "training": found | {"weights": weights},
        "running": running(store, plan, None),
        "notes": _notes(found),
    }


def _environment(store: Store, history: list[Epoch]) -> dict[str, Any] | None:
    """Return what the last epoch's driver ran on."""
    if not history:
        return None
    key = layout.epoch_key(history[-1].number)
    return open_json(store.read(key), key)["environment"]


def _settings(plan: Plan, epochs: int) -> Training:
    """Return the settings of the training; how many epochs it was to have is not the plan's, so those that it has."""
    kept = {name: plan.settings[name] for name in Training.model_fields if name in plan.settings}
    return Training(**kept, n_epochs=epochs)


def _trained(history: list[Epoch]) -> dict[str, Any]:
    """Return the epochs, the first estimate and that of the chosen epoch."""
    epochs = [_epoch(epoch) for epoch in history]
    best = history[-1].best_epoch if history else None
    estimated = [epoch for epoch in epochs if epoch["log_marginal_likelihood"] is not None]
    return {
        "epochs": epochs,
        "best_epoch": best,
        "best": None if best is None else epochs[best - 1],
        "first": estimated[0] if estimated else None,
    }


def _epoch(epoch: Epoch) -> dict[str, Any]:
    """Return an epoch's numbers; prior and noise are those that its last estimate was made at."""
    hyper = epoch.hyper or {"prior_precision": [], "values": None, "sigma_noise": None}
    return {
        "epoch": epoch.number,
        "loss": epoch.loss,
        "log_marginal_likelihood": -epoch.margliks[-1] if epoch.margliks else None,
        **hyper,
    }


def _notes(found: dict[str, Any]) -> list[str]:
    epochs, best = found["epochs"], found["best_epoch"]
    if not epochs:
        return ["No epoch is committed yet: run the training's job to the end."]
    if best is None:
        return [
            "The evidence was not estimated in any epoch, so the weights are those of the last one and there is no posterior. "
            "Give more --n-epochs, or begin anew with a smaller --n-epochs-burnin or --marglik-frequency."
        ]
    if best == found["epochs"][-1]["epoch"] and best > 1:
        return [
            "The evidence was best in the last epoch, and may rise further: the same command with more --n-epochs goes on."
        ]
    return []
