"""What a follow-on job is given has to be the run's: its settings, its weights, the model that its code builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import lifecycle, weights
from laplace_dist.run.run_weights import load_run_model
from laplace_dist.stages import first_batch
from laplace_dist.stages.smaller import as_halved
from laplace_dist.storage.store import Store


def refuse_other_settings(config: Config, store: Store, plan: Plan, kind: str) -> None:
    """Refuse a follow-on job that was given other weights, another model or curvature than the run's, which it would use.

    What was not given is the run's. A recalibration adds to the run's sums: every setting that changes their bits counts.

    Args:
        config: The settings.
        store: The checkpoint.
        plan: Of the run.
        kind: Of the job.

    Raises:
        SettingsError: Naming everything that differs, with both values; or the weights cannot be read.
    """
    stored = plan.settings
    if config.likelihood != stored.get("likelihood"):
        raise SettingsError(
            f"--likelihood: got {config.likelihood!r}, but the run at {store.url!r} was fitted with "
            f"{stored.get('likelihood')!r}. Give --likelihood {stored.get('likelihood')}."
        )
    config = as_halved(config, plan)
    of_sums = {"hessian_structure", "subset_of_weights", "backend", "estimator"} & stored.keys()
    absent = {"mc_samples": 1 if stored.get("estimator") == "mc" else None, "outputs": None, "kfac_approx": "expand"}
    of_sums |= {name for name in absent if getattr(config, name) is not None} | (
        {"rank", "oversampling"} & stored.keys()
    )
    left_out = {name: Config.model_fields[name].default for name in ("collate", "dict_key_x", "dict_key_y")}
    if kind == "recalibrate":
        of_sums |= (stored.keys() | left_out.keys()) - {"segment_size", "device_type"}
    given, known = sorted(of_sums & config.model_fields_set), {**left_out, **absent, **stored}
    pairs = [(f"--{name.replace('_', '-')}", known[name], getattr(config, name)) for name in given]
    pairs += [("--model", plan.model["path"], config.model), ("--model-args", plan.model["args"], config.model_args)]
    if config.weights is not None:
        digest = weights.weights_digest(weights.load_model(config))
        pairs.append((f"--weights {config.weights} (values, as sha256)", plan.weights, digest))
    changed = [f"{flag}: stored {old!r}, now {new!r}" for flag, old, new in pairs if old != new]
    if changed:
        raise SettingsError(
            f"--checkpoint {store.url!r} holds a run with other settings than were given:\n  "
            + "\n  ".join(changed)
            + "\nLeave these out or give them as they are in the run, or fit another run with them at another --checkpoint."
        )


def check_again(config: Config, store: Store, plan: Plan, splits: Mapping[str, Any]) -> None:
    """Look at the first example of the splits of a follow-on job, with the run's own model, before anything starts.

    Raises:
        SettingsError: The model is not the run's, or does not suit the data.
        CheckpointError: The run's weights are damaged.
    """
    model = load_run_model(config, store, plan)
    lifecycle.check_model(store, plan, model, "what --model builds here")
    first_batch.check(config, model, splits)
