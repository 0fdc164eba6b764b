"""Which posterior version is current, which tuning is in force, and how it came to that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import CURRENT
from laplace_dist.run.ownership import confirm
from laplace_dist.run.versions import windows_in
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

ROLLED_BACK = "rolled back"  # why an entry of the history came to be


def read_current(store: Store) -> dict[str, Any]:
    """Return which posterior version is current, under `version`, and the key of its tuning or None, under `tuning`.

    Raises:
        MissingObjectError: No posterior version has been committed.
        CheckpointError: It is truncated or altered.
    """
    return _opened(store, _content(store))


def _content(store: Store) -> bytes:
    try:
        return store.read(CURRENT)
    except MissingObjectError as error:
        raise MissingObjectError(
            f"{store.url}/{CURRENT} is missing: this run has no posterior yet. Run its fit job to the end."
        ) from error


def _opened(store: Store, content: bytes) -> dict[str, Any]:
    current = open_json(content, CURRENT)
    if current["tuning"] is not None and not current["tuning"].startswith(f"tuning/{current['version']}-"):
        raise CheckpointError(
            f"{CURRENT} is altered: {current['tuning']} is no tuning of version {current['version']}. Delete it and run "
            "the fit job again."
        )
    return current


def version_of_0_1(store: Store, plan: Plan) -> str | None:
    """Return the posterior version of a finished run of 0.1, whose sums were not kept apart from it; None for other runs."""
    if plan.format_version > 1 or not store.exists(CURRENT):
        return None
    return read_current(store)["version"]


def tuning_of(store: Store) -> str | None:
    """Return the key of the tuning that is in force, or None where there is none.

    Raises:
        CheckpointError: What says so is truncated or altered.
    """
    try:
        return read_current(store)["tuning"]
    except MissingObjectError:
        return None


def history_of(current: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was current, from the fit's version to the current one; what no recalibration has touched has one entry."""
    first = {"version": current["version"], "tuning": current["tuning"], "why": "the first"}
    return list(current.get("history") or [first])


def left_out(current: Mapping[str, Any]) -> list[str]:
    """Return the windows that were dropped, which stay out until they are named again."""
    return list(history_of(current)[-1].get("left_out", []))


def rolled_back(current: Mapping[str, Any]) -> set[str]:
    """Return the versions from which somebody has rolled back, and which nobody has promoted since."""
    found: set[str] = set()
    history = history_of(current)
    for before, entry in zip(history, history[1:], strict=False):
        if entry["why"] == ROLLED_BACK:
            found.add(before["version"])
        found.discard(entry["version"])
    return found


def write_current(store: Store, plan: Plan, version: str, tuning: str | None, *, first: bool = False) -> None:
    """Make a posterior version current, with the tuning that belongs to it.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        version: Name of the posterior version.
        tuning: Key of a tuning, or None.
        first: Only if none is current yet, so that another driver's tuning of the same version stays in force.

    Raises:
        SettingsError: The run was deleted meanwhile, or is another one; or a recalibration has promoted another version.
    """
    content = {"format_version": FORMAT_VERSION, "version": version, "tuning": tuning}
    confirm(store, plan)
    if first:
        store.create(CURRENT, seal_json(content))
        return
    try:
        before = _content(store)
    except MissingObjectError:
        store.replace(CURRENT, seal_json(content))
        return
    current = _opened(store, before)
    if not current.get("history"):
        store.replace(CURRENT, seal_json(content))
    elif current["version"] != version or not _append(store, before, {"tuning": tuning, "why": "tuned"}):
        raise SettingsError(
            f"another job has made version {read_current(store)['version']} current at {store.url!r} while this one worked on "
            f"{version}, and that stays. Run the same command again."
        )


def promote(
    store: Store,
    plan: Plan,
    before: bytes,
    version: str,
    tuning: str | None,
    why: str,
    *,
    evaluation: str | None = None,
    left_out: Sequence[str] = (),
    window: str | None = None,
) -> bool:
    """Make a posterior version current if nobody has changed what is current meanwhile, and keep the history.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        before: The bytes of `CURRENT.json` on which the decision rests.
        version: Name of the posterior version.
        tuning: Key of its tuning, or None.
        why: In a person's words.
        evaluation: Key of the evaluation by which it was accepted, or None.
        left_out: The windows that stay out from now on.
        window: Name of the recalibration that has decided so.

    Returns:
        Whether it was done; False if another job was first.

    Raises:
        SettingsError: The run was deleted meanwhile, or is another one; or the storage cannot compare and set.
    """
    entry = {"version": version, "tuning": tuning, "why": why, "evaluation": evaluation, "left_out": list(left_out)}
    entry["window"] = window
    confirm(store, plan)
    return _append(store, before, entry)


def roll_back(store: Store, plan: Plan, version: str) -> None:
    """Make a posterior version current again that was so before, with the tuning and without the windows of then.

    The windows that it does not have and the one before has stay out too, until they are named: a schedule would bring them
    back. Nothing to do for the one that is current.

    Raises:
        SettingsError: The version is not in the history, or was collected; or another job has changed what is current at this
            moment.
    """
    content = _content(store)
    history = history_of(_opened(store, content))
    found = [entry for entry in history if entry["version"] == version]
    if not found or found[-1].get("collected"):
        known = ", ".join(dict.fromkeys(e["version"] for e in history if not e.get("collected")))
        why = "which was collected (--keep-versions)" if found else "which was never current"
        raise SettingsError(
            f"--rollback: got {version!r}, {why} at {store.url!r}; versions that were current and are there: {known}"
        )
    if found[-1] is history[-1]:
        return
    confirm(store, plan)
    has = [windows_in(store, plan, name) for name in (history[-1]["version"], version)]
    out = [name for name in has[0] if name not in has[1]]
    out = [*(name for name in found[-1].get("left_out", []) if name not in out), *out]
    if not _append(store, content, {**found[-1], "left_out": out, "why": ROLLED_BACK}):
        raise SettingsError(
            f"--rollback: another job has changed what is current at {store.url!r} at this moment. Look again."
        )


def mark_collected(store: Store, before: bytes, versions: set[str], collection: str) -> bool:
    """Say in the history that versions are gone, before they are: from then on no rollback can make one current.

    The bytes change in any case, so that a job that has stood still since it read them can promote nothing that is deleted now.

    Args:
        store: The checkpoint.
        before: The bytes of `CURRENT.json` on which the decision rests.
        versions: Those that go.
        collection: An id.

    Returns:
        Whether the history says so; False if another job has changed it meanwhile.
    """
    current = open_json(before, CURRENT)
    history = [{**e, "collected": True} if e["version"] in versions else e for e in history_of(current)]
    return store.swap(CURRENT, before, seal_json({**current, "history": history, "collection": collection}))


def _append(store: Store, before: bytes, entry: Mapping[str, Any]) -> bool:
    """Make an entry current; of what it does not say, that of the entry before stays."""
    old = open_json(before, CURRENT)
    history = history_of(old)
    kept = {"version": history[-1]["version"], "left_out": history[-1].get("left_out", [])}
    whole = {name: value for name, value in {**kept, **entry}.items() if value not in (None, [])} | {
        "tuning": entry["tuning"]
    }
    values = {"format_version": FORMAT_VERSION, "version": whole["version"], "tuning": whole["tuning"]}
    return store.swap(CURRENT, before, seal_json({**values, "history": [*history, whole]}))
