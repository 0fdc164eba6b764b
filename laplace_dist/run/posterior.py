"""From a committed posterior version to an object of the core library that behaves as if fitted in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from laplace import Laplace
from laplace.backends import backend_class
from laplace.data.calling import adapted
from laplace.posterior.sketched import SketchedLowRankLaplace
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums
from laplace_dist.config.likelihood import likelihood_of_run
from laplace_dist.errors import MissingObjectError, SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import bases, decompositions
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.layout import LOSS
from laplace_dist.run.lifecycle import check_model
from laplace_dist.run.ownership import of_the_plan, read_plan
from laplace_dist.run.pointer import history_of, read_current
from laplace_dist.run.run_weights import load_run_weights
from laplace_dist.run.tunings import apply_tuning
from laplace_dist.run.versions import read_factor, read_loss, read_version
from laplace_dist.run.weights import weights_digest
from laplace_dist.storage.store import Store


def load_posterior(
    url: str,
    model: nn.Module,
    *,
    storage_options: Mapping[str, Any] | None = None,
    version: str | None = None,
    tuned: bool = True,
    load_weights: bool = False,
) -> Any:
    """Load a posterior that a job has fitted.

    Args:
        url: Checkpoint directory or URL.
        model: The network with the weights that the run was fitted at; its device is kept. It is called as the run's workers
            called it, see `laplace.data.calling`, and left as it was.
        storage_options: For the file system of the URL.
        version: Posterior version; the current one if not given.
        tuned: Take over the tuned prior precision, if there is one for the current version.
        load_weights: Load the run's own weights into the model first, from wherever the run is.

    Returns:
        A `laplace.KronLaplace` or its sibling, fitted.

    Raises:
        SettingsError: The model is not the one of the run.
        MissingObjectError: There is no run, or it has no posterior yet.
        CheckpointError: Something is truncated or altered; the message names the object.
    """
    store = Checkpoint(url, storage_options)
    plan = read_plan(store)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model: got a {type(model).__name__}; expected the torch.nn.Module that the run fitted")
    _check_kind(plan, model)
    if load_weights:
        load_run_weights(store, plan, model)
    if weights_digest(model) != plan.weights:
        raise SettingsError(
            f"model: its weights are not those of the run at {store.url!r}. Give load_weights=True, with "
            f"the model that {plan.model['path']} builds with the arguments {plan.model['args']}."
        )
    model = adapted(model, plan.settings.get("dict_key_y", "labels"))
    inputs = check_model(store, plan, model, "the given model")
    current = read_current(store)
    name = version or current["version"]
    try:
        la = build(store, plan, model, name)
    except MissingObjectError as error:
        raise gone(store, name) or error from error
    la.input_ndim = inputs.ndim if isinstance(inputs, torch.Tensor) else None
    if tuned and name == current["version"] and current["tuning"] is not None:
        apply_tuning(store, la, current["tuning"])
    return la


def _check_kind(plan: Plan, model: nn.Module) -> None:
    """Refuse a model whose parameters have other names, another precision or other gradients than those of the run."""
    with of_the_plan():
        spec, built = SumsSpec.from_json(plan.posterior_spec), f"as {plan.model['path']} builds it"
        names = list(dict.fromkeys(block.parameter for block in spec.blocks))
        every, first = plan.settings["subset_of_weights"] == "all", names[0]
    known = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in names if name not in known]:
        raise SettingsError(
            f"model: has no parameters {missing[:3]}, which the posterior of the run is over; it has {list(known)[:3]}. Give "
            f"the model {built}: what torch.compile and DataParallel return holds it as model._orig_mod and model.module."
        )
    if frozen := [name for name in names if not known[name].requires_grad]:
        raise SettingsError(
            f"model: requires_grad is False for {frozen[:3]}, which the posterior of the run is over. Set it to True there."
        )
    if every and (more := [n for n, p in model.named_parameters() if p.requires_grad and n not in names]):
        raise SettingsError(
            f"model: requires_grad is True for {more[:3]}, which the posterior of the run is not over. Set it to False there."
        )
    dtype = str(torch.promote_types(known[first].dtype, torch.float32)).removeprefix("torch.")
    if dtype != spec.dtype:
        raise SettingsError(
            f"model: is of {dtype}, and the run of {spec.dtype}. Give the model {built}, and state_dict() of the posterior "
            "to one of another precision."
        )


def gone(store: Store, version: str) -> MissingObjectError | None:
    """Return the error for a version that was collected; None for one that is missing for another reason."""
    history = history_of(read_current(store))
    if not any(entry["version"] == version and entry.get("collected") for entry in history):
        return None
    kept = dict.fromkeys(entry["version"] for entry in history if not entry.get("collected"))
    return MissingObjectError(
        f"version {version} of {store.url!r} was collected (--keep-versions); there are {', '.join(kept)}. Load one of these."
    )


def build(store: Store, plan: Plan, model: nn.Module, version: str) -> Any:
    """Return the fitted object of a posterior version, with the default prior, around a model with the run's weights.

    Raises:
        CheckpointError: A factor is missing, truncated or altered.
    """
    with of_the_plan():
        spec = SumsSpec.from_json(plan.posterior_spec)
        la = new_laplace(plan.settings, model, spec)
    manifest = read_version(store, plan, version)
    device = next(model.parameters()).device
    tensors = {  # one by one in the place and type of the sums, so that none is there twice: they may take most of the memory
        name: read_factor(store, manifest, name).to(device, torch.float64)
        for name in manifest["factors"]
        if name != LOSS
    }
    tensors[LOSS] = torch.tensor(read_loss(store, manifest), dtype=torch.float64, device=device)
    sums = CurvatureSums.from_tensors(spec, tensors, manifest["n_data"], own=True)
    if plan.further is None:
        la.set_sums(sums)
    else:
        la.set_second_sums(sums, bases.read_basis(store, plan, manifest["basis"], device))
    if (known := decompositions.read(store, plan, version, device)) is not None:
        la.use_decompositions(known)
    return la


def new_laplace(settings: Mapping[str, Any], model: nn.Module, spec: SumsSpec | None = None) -> Any:
    """Return an object of the core library that has seen no data.

    Args:
        settings: By field name: those of the plan, or all of a job.
        model: The network.
        spec: What the plan says of the sums, which includes the last layer's name; None while it is being found out.

    Raises:
        ValueError: The core library does not have this combination.
    """
    backend, arguments = backend_class(settings["backend"], settings["estimator"])
    if settings["estimator"] == "mc":
        arguments = {**arguments, "seed": settings["seed"], "num_samples": settings.get("mc_samples") or 1}
    if settings.get("outputs") is not None:
        arguments = {**arguments, "outputs": settings["outputs"]}
    if settings.get("kfac_approx", "expand") != "expand":
        arguments = {**arguments, "kfac_approx": settings["kfac_approx"]}
    subset, likelihood = settings["subset_of_weights"], likelihood_of_run(settings)
    if settings["hessian_structure"] == "lowrank":
        sketch = {name: settings[name] for name in ("rank", "oversampling", "seed")}
        return SketchedLowRankLaplace(model, likelihood, backend=backend, backend_kwargs=arguments, **sketch)
    extra = {"last_layer_name": spec.blocks[0].layer} if spec is not None and subset == "last_layer" else {}
    return Laplace(
        model,
        likelihood,
        subset_of_weights=subset,
        hessian_structure=settings["hessian_structure"],
        backend=backend,
        backend_kwargs=arguments,
        **extra,
    )
