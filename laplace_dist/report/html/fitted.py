"""What was fitted: model, coverage, estimator, data, windows, versions, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laplace_dist.config.command import RECALIBRATE, command_of
from laplace_dist.config.settings import Config
from laplace_dist.config.training import Training
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError, listed
from laplace_dist.plan.plan import Plan
from laplace_dist.run import coverage, settings_file
from laplace_dist.run.combination import place_of
from laplace_dist.run.versions import read_version
from laplace_dist.storage.store import Store

LISTED = 2000  # parameters on the page; all of them are in the run's coverage file
NAMES = {"ggn": "exact GGN", "mc": "Monte-Carlo Fisher", "ef": "empirical Fisher"}


def fitted(store: Store, plan: Plan, version: str | None, training: Training | None = None) -> dict[str, Any]:
    """Return what a person has to know to judge, and to repeat, the fit or the training.

    Args:
        store: The checkpoint.
        plan: Of the run.
        version: The posterior version, or None if there is none yet.
        training: The further settings of a training by empirical Bayes.
    """
    settings = plan.settings
    rows = coverage.read_coverage(store, plan)
    manifest = {} if version is None else read_version(store, plan, version)
    terms = manifest.get("windows") or [{"window": plan.window_name, "weight": 1.0}]
    return {
        "checkpoint": store.url,
        "model": plan.model,
        "likelihood": settings.get("likelihood"),
        "subset_of_weights": settings.get("subset_of_weights"),
        "hessian_structure": settings.get("hessian_structure"),
        "backend": settings.get("backend"),
        "estimator": _estimator(settings),
        "settings": {**settings},
        "examples": manifest.get("n_data", plan.n_examples),
        "segments": len(plan.segments),
        "data": {"length": plan.data["length"], "sha256": plan.data["sha256"], **_weights(plan)},
        "weights_sha256": plan.weights,
        "outputs": plan.spec.get("n_outputs"),
        "version": version,
        "windows": [{"window": term["window"], "weight": term["weight"]} for term in terms],
        "environment": manifest.get("environment"),
        "coverage": {
            "summary": [vars(share) | {"name": coverage.KINDS[share.kind]} for share in coverage.summary(rows)],
            "rows": [vars(row) for row in rows[:LISTED]],
            "parameters": len(rows),
        },
        **_command(store, plan, training),
        **_recalibrations(store, plan, [term["window"] for term in terms]),
    }


def _weights(plan: Plan) -> dict[str, Any]:
    """Return how much the examples of the first window count, where they have weights."""
    weights = plan.data.get("weights")
    return {"weights": None if weights is None else {name: weights[name] for name in ("name", "sum", "zero")}}


def _estimator(settings: Mapping[str, Any]) -> str:
    """Return the estimator in a person's words, with the number of samples, or the outputs that were chosen."""
    name = NAMES.get(settings.get("estimator"), str(settings.get("estimator")))
    if settings.get("estimator") == "mc":
        samples = settings.get("mc_samples") or 1
        return f"{name} with {samples} sample{'s' if samples > 1 else ''} per example"
    if settings.get("outputs") is not None:
        return f"{name} of the outputs {listed([str(index) for index in settings['outputs']])}"
    return name


def _recalibrations(store: Store, plan: Plan, windows: Sequence[str]) -> dict[str, Any]:
    """Return the commands that add a version's windows to the fit's, and the names of those whose settings were not kept."""
    commands, unknown = [], []
    for name in windows:
        if name == plan.window_name:
            continue
        try:
            config = _config(place_of(store, plan, name))
        except (MissingObjectError, CheckpointError, SettingsError):
            unknown.append(name)
        else:
            commands.append(command_of(config, RECALIBRATE))
    return {"recalibrations": commands, "not_kept": unknown}


def _config(store: Store) -> Config:
    """Return the settings that a run, or a window, keeps."""
    return Config(**{name.replace("-", "_"): value for name, value in settings_file.read_config(store).items()})


def _command(store: Store, plan: Plan, training: Training | None) -> dict[str, Any]:
    """Return the command, and the names of the data, from the settings that the run keeps."""
    try:
        config = _config(store)
    except (MissingObjectError, CheckpointError, SettingsError):
        return {"command": None, "source": None}
    source = {"data": config.data, "data_args": config.data_args, "out_of_distribution": config.ood}
    job = f"jobs/fit_{plan.settings.get('hessian_structure', 'kron')}.py"
    if training is not None:  # which has neither tuning nor evaluation to skip
        job, config = "jobs/marglik_train.py", config.model_copy(update={"skip_tune": False, "skip_evaluate": False})
    return {"command": command_of(config, job, training), "source": source}
