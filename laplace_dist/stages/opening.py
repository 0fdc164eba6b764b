"""Opening: model, data and factors are resolved once, by the driver, and the run is begun or continued."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch import Tensor, nn

from laplace.structures.registry import SECOND_PASSES
from laplace_dist.config.compatibility import check_example_weights, no_groups
from laplace_dist.config.settings import Config
from laplace_dist.data import example_weights, loader, sources
from laplace_dist.data.collate import Collate
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan import identity
from laplace_dist.plan.estimate import groups_for, too_large
from laplace_dist.plan.groups import plan_groups
from laplace_dist.plan.identity import shared_examples
from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.run import layout, lifecycle, weights
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.combination import Window, place_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.probe import make_probe
from laplace_dist.run.run_weights import RunWeights, load_run_model
from laplace_dist.run.settings_file import seal_yaml
from laplace_dist.stages import estimator, first_batch
from laplace_dist.stages.context import initialized, plain
from laplace_dist.stages.smaller import as_halved
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Resolved:
    """What the settings name.

    Attributes:
        model: With its weights, in eval mode.
        train: The training split.
        la: The Laplace object, which knows the factors.
        data: Fingerprint of the training split.
        config: The settings, with the estimator that the run uses.
        cost: Which estimator that is, and what it costs, for people.
    """

    model: nn.Module
    train: Any
    la: Any
    data: dict[str, Any]
    config: Config
    cost: str

    @property
    def model_bytes(self) -> int:
        """What the model's parameters and buffers take."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))


def resolve(config: Config, stored: Mapping[str, Any] | None = None) -> Resolved:
    """Load model and data, look at the first batches, choose the estimator, and find out which factors there are.

    Args:
        config: The settings.
        stored: Those of the plan of the run that goes on, whose estimator is kept if none is given.

    Raises:
        SettingsError: Model, data and settings do not go together, or an example cannot be read.
    """
    config = estimator.given(config, stored)
    train = sources.load_split(config, "train")
    others = sources.check_splits(config)
    model = weights.load_model(config)
    f = first_batch.check(config, model, {"train": train, **others})["train"]
    if config.outputs is not None and config.outputs[-1] >= f.shape[-1]:
        last = f.shape[-1] - 1
        raise SettingsError(
            f"--outputs: got {config.outputs}, but the model has {last + 1} outputs, the last one being {last}"
        )
    try:
        chosen, la = _chosen(config, model, train, f)
    except (ValueError, ImportError, ExampleError) as error:
        raise error if isinstance(error, SettingsError) else SettingsError(str(error)) from error
    cost = estimator.cost(chosen, la, f, chosen=config.estimator is not None)
    return Resolved(model, train, la, fingerprint(config, train, "train"), chosen, cost)


def _chosen(config: Config, model: nn.Module, train: Any, f: Tensor) -> tuple[Config, Any]:
    """Return the settings with an estimator, and the Laplace object for it."""
    first = config if config.estimator is not None else config.model_copy(update={"estimator": "ggn"})
    la = initialized(first.model_dump(), model, train, Collate.of(config))
    if config.estimator is not None or (name := estimator.default(la, f)) == "ggn":
        return first, la
    chosen = config.model_copy(update={"estimator": name, "mc_samples": 1})
    return chosen, initialized(chosen.model_dump(), model, train, Collate.of(config))


def module_groups(
    config: Config, resolved: Resolved, memory: int | None, say: Callable[[str], None] = lambda text: None
) -> int:
    """Return the number of module groups of a run that is to be begun.

    Args:
        config: The settings.
        resolved: What they name.
        memory: Bytes that a worker can have; None where that is not known.
        say: Where a line for people goes.

    Raises:
        SettingsError: No worker has the memory for the sums.
    """
    spec = plain(resolved.la.sums_spec())
    size = resolved.model_bytes
    able = no_groups(config) is None
    count = config.module_groups or (groups_for(spec, size, memory) if able else 1)
    groups = plan_groups(spec, count)
    if why := too_large(spec, size, memory, len(groups)):
        raise SettingsError(f"--hessian-structure: got {config.hessian_structure!r}, but {why}")
    if len(groups) > 1:
        largest = max(group.nbytes for group in groups)
        say(
            f"module groups: {len(groups)}, so as many passes over the data; a worker holds at most {largest:,} bytes of sums "
            "at a time"
        )
    return len(groups)


def begin(
    resolved: Resolved,
    config: Config,
    store: Store,
    device_type: str,
    say: Callable[[str], None],
    training: Mapping[str, Any] | None = None,
    module_groups: int = 1,
    halved_from: int | None = None,
) -> tuple[Plan, bool]:
    """Begin the run, or continue the one that is there; returns its plan and whether it was there.

    Args:
        resolved: What the settings name.
        config: The settings, as resolved.
        store: The checkpoint.
        device_type: Where the workers compute, `cpu` or `cuda`.
        say: Where lines for people go.
        training: Settings of a training that change bits too.
        module_groups: Number of module groups of a run that is begun.
        halved_from: The batch size that was asked for, where it was halved.

    Raises:
        SettingsError: What is there is of another plan.
        CheckpointError: What is there is damaged.
    """
    model = resolved.model
    wanted = build_plan(
        {**config.bits(device_type=device_type), **(training or {})},
        data=resolved.data,
        weights=weights.weights_digest(model),
        model={"path": config.model, "args": config.model_args},
        spec=plain(resolved.la.sums_spec()),
        run=new_attempt(),
        window={"name": config.window or datetime.now(UTC).date().isoformat(), "number": 0},
        further=further(resolved.la),
        module_groups=module_groups,
        halved_from=halved_from,
    )
    own = RunWeights(model)
    snapshot = config.model_copy(update={"weights": f"{store.url}/{own.key}"}).to_yaml()
    _check_first_window(config, store)
    return lifecycle.open_run(
        store,
        wanted,
        model=model,
        weights=own,
        probe=lambda: _probe(resolved, config, say),
        config_yaml=snapshot,
        fresh=config.fresh,
        say=say,
    )


def further(la: Any) -> dict[str, Any] | None:
    """Return name and specification of the second pass over the data, of structures that take two."""
    second = SECOND_PASSES.get(la.structure)
    return None if second is None else {"name": second.name, "spec": plain(second.spec(la.sums_spec()))}


def _check_first_window(config: Config, store: Store) -> None:
    """Refuse another name for the first window of the run that is there."""
    if config.window is None or config.fresh or not store.exists(layout.PLAN):
        return
    name = read_plan(store).window_name
    if config.window != name:
        raise SettingsError(
            f"--window: got {config.window!r}, but the fit at {store.url!r} is that of window {name!r}. Add another window "
            "with jobs/recalibrate.py, or give another --checkpoint."
        )


def begin_window(
    config: Config, store: Store, there: Sequence[Window], device_type: str, beside: Collection[str]
) -> tuple[Window, bool]:
    """Begin a window of new data, or continue it; returns it and whether it was there.

    Args:
        config: The settings, with the window's name; the data's `train` split is the window.
        store: The checkpoint.
        there: The windows of the run, the first one, whose plan is the run's, among them.
        device_type: Where the workers compute, `cpu` or `cuda`.
        beside: Names of the windows that the posterior is to be made of beside this one.

    Raises:
        SettingsError: The settings, the model or the weights are not the run's; the data are one of those windows', or this one
            was begun with other data.
    """
    run = next(window.plan for window in there if window.store is store)
    known = {window.name: window for window in there}
    if config.window == run.window_name:
        raise SettingsError(
            f"--window: got {config.window!r}, which is that of the fit itself. Give the new window another name."
        )
    config = as_halved(estimator.given(config, run.settings), run)
    check_example_weights(config)
    weighted = [window for window in there if "weights" in window.plan.data]
    sources.refuse_forgotten_weights(config, {w.plan.data["weights"]["name"]: w.name for w in weighted})
    train = sources.load_split(config, "train")
    check_again(config, store, run, {"train": train, **sources.check_splits(config)})
    data = fingerprint(config, train, "train")
    number = max(window.plan.window_number for window in there) + 1
    wanted = build_plan(
        config.bits(device_type=device_type),
        data=data,
        weights=run.weights,
        model={"path": config.model, "args": config.model_args},
        spec=run.spec,
        probe=run.probe,
        run=run.run_id,
        window={"name": config.window, "number": number},
        further=run.further,
        module_groups=run.module_groups or 1,
        halved_from=run.halved_from,
    )
    lifecycle.refuse_another_run(store, run, wanted)
    for window in there:
        if window.name not in beside:
            continue
        if same := shared_examples(window.plan.data, data, config.shared_examples):
            raise SettingsError(
                f"--data: window {config.window} shares examples with window {window.name} ({same}), which would count twice. "
                "Give data that no window has, or leave that one out with --windows or --drop-window."
            )
    place = place_of(store, run, config.window)
    plan = lifecycle.open_window(place, wanted)
    place.replace(layout.CONFIG, seal_yaml(config.to_yaml()))  # by which its data are found again
    return Window(place, plan), config.window in known


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
    left_out = {name: Config.model_fields[name].default for name in ("collate", "dict_key_x", "dict_key_y")}
    if kind == "recalibrate":
        of_sums |= (stored.keys() | left_out.keys()) - {"segment_size", "device_type"}
    given, known = sorted(of_sums & config.model_fields_set), {**left_out, **stored}
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


def fingerprint(config: Config, dataset: Any, split: str) -> dict[str, Any]:
    """Return a split's fingerprint, of the training split with what its weights are told by, if there are any.

    Raises:
        SettingsError: An example cannot be read, or its weight is none; naming the example.
    """
    name = config.example_weights
    try:
        found = identity.fingerprint(dataset, split, Collate.of(config))
        weighted = name is not None and split == "train"
        return {**found, "weights": example_weights.facts(dataset, name)} if weighted else found
    except ExampleError as error:
        raise SettingsError(str(error)) from error


def _probe(resolved: Resolved, config: Config, say: Callable[[str], None]) -> bytes | None:
    def batch(count: int) -> Any:
        return loader.read_batch(resolved.train, 0, count, Collate.of(config))[0]

    try:
        return make_probe(resolved.model, batch, len(resolved.train))
    except TypeError as error:
        say(
            f"the inputs hold {error}, which cannot be stored with the run: whether --model's code is still the same "
            "will not be checked, only its weights and the data"
        )
        return None
