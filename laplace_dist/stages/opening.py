"""Opening: the driver begins a run or continues it, and the windows of new data that are added to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from laplace.structures.registry import SECOND_PASSES
from laplace_dist.config.compatibility import check_example_weights
from laplace_dist.config.import_path import IMPORT_PATH
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.data import loader, sources
from laplace_dist.data.collate import Collate
from laplace_dist.errors import SettingsError
from laplace_dist.plan.identity import shared_examples
from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.run import layout, lifecycle, weights
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.combination import Window, place_of
from laplace_dist.run.law import FAILURES, difference, law_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.probe import make_probe
from laplace_dist.run.run_weights import RunWeights
from laplace_dist.run.settings_file import seal_yaml
from laplace_dist.stages import estimator
from laplace_dist.stages.context import plain
from laplace_dist.stages.follow_on import check_again
from laplace_dist.stages.resolving import Resolved, fingerprint
from laplace_dist.stages.smaller import as_halved
from laplace_dist.storage.store import Store


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
    stored = read_plan(store).settings if store.exists(layout.PLAN) and not config.fresh else None
    wanted = build_plan(
        {**_bits(config, device_type, stored), **(training or {})},
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
        needed={"--weights": config.weights, "--data": None if IMPORT_PATH.fullmatch(config.data) else config.data},
        say=say,
    )


def _bits(config: Config, device_type: str, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that change bits; targets are drawn as in the run that is there, which an older version has begun."""
    found = config.bits(device_type=device_type)
    if stored is None or stored.get("estimator") != config.estimator:
        return found
    kept = {name: stored[name] for name in ("sampling",) if name in stored}
    return {**{name: value for name, value in found.items() if name != "sampling"}, **kept}


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
        _bits(config, device_type, run.settings),
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
    _refuse_shared(config, data, [window for window in there if window.name in beside])
    place = place_of(store, run, config.window)
    plan = lifecycle.open_window(place, wanted)
    place.replace(layout.CONFIG, seal_yaml(config.to_yaml()))  # by which its data are found again
    return Window(place, plan), config.window in known


def _refuse_shared(config: Config, data: Mapping[str, Any], windows: Sequence[Window]) -> None:
    """Refuse data of which examples are those of a window that they would count beside."""
    for window in windows:
        if same := shared_examples(window.plan.data, data, config.shared_examples):
            raise SettingsError(
                f"--data: window {config.window} shares examples with window {window.name} ({same}), which would count twice. "
                "Give data that no window has, or leave that one out with --windows or --drop-window."
            )


def _probe(resolved: Resolved, config: Config, say: Callable[[str], None]) -> bytes | None:
    def batch(count: int) -> Any:
        return loader.read_batch(resolved.train, 0, count, Collate.of(config))[0]

    def law(count: int, outputs: Tensor) -> dict[str, Tensor]:
        if len(outputs) != count:
            raise SettingsError(
                f"--model: it returns {tuple(outputs.shape)} for {count} examples; expected (batch, …, outputs)"
            )
        y = loader.read_batch(resolved.train, 0, count, Collate.of(config))[1]
        try:
            one, two = (law_of(likelihood_of(config.likelihood).fitted, outputs, y, config.estimator) for _ in range(2))
        except FAILURES as error:  # which every batch would meet
            raise SettingsError(f"--likelihood: {config.likelihood!r} fails on the first examples: {error}") from error
        if what := difference(one, two, outputs):
            raise SettingsError(
                f"--likelihood: {config.likelihood!r} makes something else of the same examples each time: {what}. Let it draw "
                "no random numbers, and keep nothing from one call to the next."
            )
        return one

    try:
        return make_probe(resolved.model, batch, len(resolved.train), law)
    except TypeError as error:
        say(
            f"the inputs hold {error}, which cannot be stored with the run: whether --model's code is still the same "
            "will not be checked, only its weights and the data"
        )
        return None
