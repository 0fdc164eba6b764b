"""A run as a whole: opening, continuing, clearing it, and saying how far it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from laplace_dist.config.likelihood import likelihood_of_run
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import Plan, differences
from laplace_dist.plan.segments import Segment
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.law import check_law
from laplace_dist.run.layout import CONFIG, CURRENT, PARTIALS, PLAN, TRAINING, WINDOW, partial_key, probe_key
from laplace_dist.run.ownership import confirm, of_another, of_the_plan, read_plan
from laplace_dist.run.partial_manifests import check_manifest
from laplace_dist.run.place import check_place, clear, refuse_needed
from laplace_dist.run.probe import check_probe, open_probe, probe_digest
from laplace_dist.run.run_weights import RunWeights, are_there
from laplace_dist.run.second_pass import place_of_second, read_second_plan
from laplace_dist.run.settings_file import seal_yaml
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store


def check_model(store: Store, plan: Plan, model: nn.Module, who: str) -> Any:
    """Refuse a model whose outputs are not those of the run's, and a likelihood that makes something else of them.

    Returns the inputs that it was asked with. A run without a probe cannot tell, and gives None.

    Args:
        store: The checkpoint.
        plan: Of the run.
        model: In eval mode, with the run's weights.
        who: Whose model it is, in a person's words.

    Raises:
        SettingsError: It is another model.
        CheckpointError: The probe is missing, truncated or altered.
    """
    if plan.probe is None:
        return None
    key = probe_key(plan.probe)
    content, label = store.read(key), f"{store.url}/{key}"
    probe = open_probe(content, plan.probe, label)
    if not probe.law:  # as in older runs
        check_probe(content, plan.probe, model, label, who)
        return probe.inputs
    with of_the_plan():
        name, estimator = plan.settings["likelihood"], plan.settings["estimator"]
        likelihood = likelihood_of_run(plan.settings).fitted
    check_probe(content, plan.probe, model, label, who, likelihood.counts)
    check_law(probe.law, probe.judged, likelihood, name, estimator, who)
    return probe.inputs


def open_run(
    store: Store,
    plan: Plan,
    *,
    model: nn.Module,
    weights: RunWeights,
    probe: Callable[[], bytes | None],
    config_yaml: str,
    fresh: bool = False,
    needed: Mapping[str, str | None] = MappingProxyType({}),
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Plan, bool]:
    """Start a run, or continue the one that is there if it has the same plan.

    Args:
        store: The checkpoint.
        plan: What this command asks for.
        model: The network, in eval mode.
        weights: Of the model, which are stored if they are not yet.
        probe: Returns the model's probe, or None where its inputs cannot be stored; called for a new run.
        config_yaml: Snapshot of the settings, without secrets.
        fresh: Delete an existing run first.
        needed: What must not be deleted with it: paths and URLs by the names of their flags.
        say: Where lines for people go.

    Returns:
        The run's plan, and whether the run was there before.

    Raises:
        SettingsError: The location cannot be written to, or holds something that is no run; or the run there has another
            plan, and every field that differs is named with both values; or a newer version wrote it.
    """
    check_place(store)
    here = store.exists(PLAN)
    if not here:
        weights.refuse_others(store)
    store.check_writable()
    if fresh and here:
        refuse_needed(store, needed)
        clear(store, say)
    created = _create_plan(store, plan, probe()) if fresh or not here else None
    if created is None:
        stored = read_plan(store)
        _refuse_another_plan(store, stored, plan)
        check_model(store, stored, model, "what --model builds here")
    mine = created or stored
    if created is not None or not are_there(store):
        weights.write(store, mine)
    confirm(store, mine)
    store.replace(CONFIG, seal_yaml(config_yaml))
    return mine, created is None


def _create_plan(store: Store, plan: Plan, probe: bytes | None) -> Plan | None:
    """Create a plan, after the probe that it names, unless there is one; returns what this call created."""
    if probe is not None:
        plan = replace(plan, probe=probe_digest(probe))
        store.create(probe_key(plan.probe), probe)
    return plan if store.create(PLAN, seal_json(plan.to_values())) else None


def _refuse_another_plan(store: Store, stored: Plan, plan: Plan) -> None:
    """Compare plans but for the run's id and the probe, whose last bits depend on the machine; see `check_model` for it.

    Module groups change no bit, so they are none of what has to be the same: a run goes on with those that it has. Nor are the
    words in which its sums are described, beside which `differences` has compared these.
    """
    older = stored.format_version < plan.format_version
    changed = differences(stored, plan)
    own = ("probe", "run", "window", "module_groups", "halved_from", "spec", "further")
    same = replace(plan, **{name: getattr(stored, name) for name in own})
    if not changed and (older or stored.digest == same.digest):
        return
    raise SettingsError(
        f"--checkpoint {store.url!r} holds a run with another plan:\n  " + "\n  ".join(changed) + "\n"
        "Restore these, give another --checkpoint, or delete that run with --fresh."
    )


def refuse_another_run(store: Store, run: Plan, window: Plan) -> None:
    """Refuse a window whose plan differs from the run's in more than the data and what follows from their length.

    Raises:
        SettingsError: Every field that differs is named with both values.
    """
    settings = {**window.settings, "segment_size": run.settings["segment_size"]}
    changed = differences(run, replace(window, data=run.data, segments=run.segments, settings=settings))
    if changed:
        raise SettingsError(
            f"--checkpoint {store.url!r} holds a run with another plan than this window would have:\n  "
            + "\n  ".join(changed)
            + "\nGive these as they are in the run, or begin another run."
        )


def open_window(store: Store, plan: Plan) -> Plan:
    """Begin a window, or continue the one that is there if it has the same plan; returns its plan.

    Raises:
        SettingsError: It was begun with other data.
    """
    if store.create(PLAN, seal_json(plan.to_values())):
        return plan
    stored = read_plan(store)
    if stored.run != plan.run:  # a deleted run has left it
        store.replace(PLAN, seal_json(plan.to_values()))
        return plan
    changed = differences(stored, plan)
    if changed:
        raise SettingsError(
            f"--window {plan.window_name}: it was begun with other data or settings:\n  "
            + "\n  ".join(changed)
            + "\nGive the new data another name."
        )
    return stored


def committed(
    store: Store, plan: Plan, *, arrays: bool = True, say: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """Return the manifests of the committed units by id, each checked against the plan.

    One of another run does not count. It is left where it is: the commit of its unit takes its place, and a deletion here
    could meet that commit.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        arrays: Keep the entries of the arrays, which `read_factors` needs; without them the result is small.
        say: Where a line about each manifest of another run goes.

    Raises:
        CheckpointError: A manifest is truncated, altered, or of a unit that the plan has not.
    """
    keys = {partial_key(unit.id): unit for unit in plan.units}
    present = [key for key in store.list(PARTIALS, recursive=False) if key.endswith(".json")]
    found = {}
    for key, data in store.read_many(present):
        manifest = _of_this_run(store, key, data, plan, keys.get(key))
        if manifest is None:
            say(f"{key} does not count: a worker of a run that was deleted (--fresh) wrote it late")
            continue
        if not arrays:
            del manifest["arrays"]
        found[keys[key].id] = manifest
    return found


def _of_this_run(store: Store, key: str, data: bytes, plan: Plan, unit: Segment | None) -> dict[str, Any] | None:
    """Return a partial's manifest, checked against the plan; None for one of another run."""
    try:
        manifest = open_json(data, key)
        if of_another(manifest, plan):
            return None
    except CheckpointError:
        if unit is not None:
            raise
    if unit is None:
        groups = f", {len(plan.groups)} module groups" if len(plan.groups) > 1 else ""
        raise CheckpointError(
            f"{store.url}/{key} is of no segment of this plan ({len(plan.segments)} segments{groups}). "
            "Delete it, or start again with --fresh."
        )
    return check_manifest(manifest, plan, unit)


def missing_units(store: Store, plan: Plan) -> list[Segment]:
    """Return the units that are not committed, told by the names of objects alone; all are, once the window's sum is there."""
    present = set(store.list(PARTIALS, recursive=False))
    return [] if store.exists(WINDOW) else [unit for unit in plan.units if partial_key(unit.id) not in present]


def whole_segments(plan: Plan, missing: Sequence[Segment]) -> set[int]:
    """Return the first examples of the segments of which no unit is among those that are missing."""
    return {segment.start for segment in plan.segments} - {unit.start for unit in missing}


def remaining(plan: Plan, committed: Collection[str] | Mapping[str, Any]) -> list[Segment]:
    """Return the units of the plan that are not among the committed ids, in plan order."""
    return [unit for unit in plan.units if unit.id not in committed]


def status(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say how far the run at a checkpoint URL is, by listing: no manifest but the plan is read.

    Returns:
        `url`, `plan` (digest), `examples`, `examples_committed`, `segments`, `segments_committed`, `complete`, and
        `posterior`: whether a posterior version is current. `module_groups` is the number of passes over the data that the
        sums are divided into, where there are several: a segment counts as committed once all of them are, and
        `partials_committed` counts a segment's passes one by one. Of structures that take two passes over the data the
        segments are those of the first, and `second_pass` is the number of those that are committed in the second. Of a
        training `epochs` is the number of committed epochs.

    Raises:
        MissingObjectError: There is no run.
        CheckpointError: Part of it is truncated or altered.
    """
    store = Checkpoint(url, storage_options)
    plan = read_plan(store)
    missing = missing_units(store, plan)
    done = whole_segments(plan, missing)
    second = {} if plan.further is None else {"second_pass": _in_second_pass(store, plan)}
    trained = len(store.list(f"{TRAINING}/epochs", recursive=False))
    second |= {"epochs": trained} if trained else {}
    if len(plan.groups) > 1:
        second |= {"module_groups": len(plan.groups), "partials_committed": len(plan.units) - len(missing)}
    whole = {len(done), second.get("second_pass", len(done))} == {len(plan.segments)}
    return {
        **second,
        "url": store.url,
        "plan": plan.digest,
        "examples": plan.n_examples,
        "examples_committed": sum(s.stop - s.start for s in plan.segments if s.start in done),
        "segments": len(plan.segments),
        "segments_committed": len(done),
        "complete": whole,
        "posterior": store.exists(CURRENT),
    }


def _in_second_pass(store: Checkpoint, plan: Plan) -> int:
    """Return the number of segments that are committed in the second pass; it may not have begun."""
    place = place_of_second(store, plan)
    try:
        second = read_second_plan(place, plan)
    except MissingObjectError:
        return 0
    return 0 if second is None else len(whole_segments(second, missing_units(place, second)))
