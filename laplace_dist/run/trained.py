"""From the objects of a training to its committed files and back: the state to go on from, and the best posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laplace.data.calling import adapted
from laplace.empirical_bayes import Hyperparameters
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import training
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.layout import training_file_key
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.posterior import new_laplace
from laplace_dist.storage.store import Store

LISTED = 256  # prior precisions that an epoch's manifest has one by one
QUANTILES = 5  # that it has of more: smallest, quartiles, largest


def hyper_of(la: Any) -> dict[str, Any]:
    """Return prior precision and noise as an epoch's manifest has them: small, for whoever looks.

    Args:
        la: The posterior.

    Returns:
        `prior_precision`, one by one or as quantiles of more than `LISTED`; `values`, how many there are; `sigma_noise`, None
        where the likelihood has none.
    """
    prior = la.prior_precision.detach().double().flatten().cpu()
    shown = prior
    if len(prior) > LISTED:
        shown = prior.sort().values[torch.linspace(0, len(prior) - 1, QUANTILES).round().long()]
    noise = la.sigma_noise.item() if la.likelihood_object.has_noise else None
    return {"prior_precision": shown.tolist(), "values": len(prior), "sigma_noise": noise}


def write_state(store: Store, plan: Plan, la: Any, optimizer: Optimizer, hyper: Hyperparameters) -> str:
    """Write all that it takes to go on after an epoch; returns the file's sha256."""
    own = hyper.state_dict()
    tensors, values = _flat("optimizer", optimizer.state_dict())
    more, hypers = _flat("hyper", own["optimizer"])
    tensors |= more | _named("model", la.model.state_dict())
    tensors |= {f"log/{i}": log for i, log in enumerate(own["logs"])}
    tensors |= {name: own[name] for name in ("prior_precision", "sigma_noise")}
    return training.write_file(store, plan, tensors, {"optimizer": values, "hyper": hypers})


def read_state(store: Store, digest: str, la: Any, optimizer: Optimizer, hyper: Hyperparameters) -> None:
    """Give model, optimizer and hyperparameters what `write_state` has written.

    Raises:
        CheckpointError: It is missing, truncated, altered or of another model.
    """
    tensors, values = training.read_file(store, digest)
    try:
        la.model.load_state_dict(_under("model", tensors))
        optimizer.load_state_dict(_nested("optimizer", tensors, values["optimizer"]))
        hyper.load_state_dict(
            {
                "logs": [tensors[f"log/{i}"] for i in range(len(hyper.logs))],
                "optimizer": _nested("hyper", tensors, values["hyper"]),
                "prior_precision": tensors["prior_precision"],
                "sigma_noise": tensors["sigma_noise"],
            }
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{training_file_key(digest)} does not fit the run's model: {error}") from error


def write_posterior(store: Store, plan: Plan, la: Any) -> str:
    """Write a posterior with its weights; returns the file's sha256."""
    tensors = {**_named("model", la.model.state_dict()), **_named("sums", la.sums.to_tensors())}
    tensors |= {"prior_precision": la.prior_precision, "sigma_noise": la.sigma_noise}
    return training.write_file(store, plan, tensors, {"n_data": la.n_data})


def read_posterior(store: Store, plan: Plan, digest: str, la: Any) -> None:
    """Make an object of the core library, and its model, what `write_posterior` has written.

    Raises:
        CheckpointError: It is missing, truncated, altered or of another model.
    """
    tensors, values = training.read_file(store, digest)
    try:
        la.model.load_state_dict(_under("model", tensors))
        la.set_sums(
            CurvatureSums.from_tensors(
                SumsSpec.from_json(plan.spec), _under("sums", tensors), values["n_data"], own=True
            )
        )
        la.prior_precision, la.sigma_noise = tensors["prior_precision"], tensors["sigma_noise"]
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{training_file_key(digest)} does not fit the run's model: {error}") from error


def load_trained(url: str, model: nn.Module, *, storage_options: Mapping[str, Any] | None = None) -> Any:
    """Load the best posterior of a training by empirical Bayes.

    Args:
        url: Checkpoint directory or URL.
        model: The network, as `--model` builds it; it gets the weights of the best epoch.
        storage_options: For the file system of the URL.

    Returns:
        A `laplace.KronLaplace` or its sibling, fitted, with the prior and noise of the best evidence.

    Raises:
        SettingsError: The model is not the one of the run.
        MissingObjectError: There is no training, or it has not estimated the evidence yet.
        CheckpointError: Something is truncated or altered; the message names the object.
    """
    store = Checkpoint(url, storage_options)
    plan = read_plan(store)
    history = training.epochs(store, plan)
    if not history or history[-1].best is None:
        raise MissingObjectError(
            f"the training at {store.url!r} has no posterior: {len(history)} epochs are committed, and the evidence was not "
            "estimated in any. Run its job to the end, or with a smaller --n-epochs-burnin or --marglik-frequency."
        )
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model: got a {type(model).__name__}; expected the torch.nn.Module that the run trained")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [b["parameter"] for b in plan.spec["blocks"] if shapes.get(b["parameter"]) != tuple(b["shape"])]
    if wrong:
        raise SettingsError(
            f"model: it is not the one of the training at {store.url!r}: {', '.join(wrong[:4])} differ; give the model that "
            f"{plan.model['path']} builds with the arguments {plan.model['args']}"
        )
    adapted_model = adapted(model.eval(), plan.settings.get("dict_key_y", "labels"))
    la = new_laplace(plan.settings, adapted_model, SumsSpec.from_json(plan.spec))
    la.temperature = plan.settings["temperature"]
    read_posterior(store, plan, history[-1].best, la)
    return la


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _flat(prefix: str, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an optimizer's state by name, and its other values."""
    tensors = {
        f"{prefix}/{i}/{key}": value
        for i, entries in state["state"].items()
        for key, value in entries.items()
        if isinstance(value, torch.Tensor)
    }
    return tensors, {"groups": state["param_groups"]}


def _nested(prefix: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state from its tensors and other values."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _under(prefix, tensors).items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    return {"state": state, "param_groups": values["groups"]}
