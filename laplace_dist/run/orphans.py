"""What crashed attempts leave behind: arrays that no manifest names, found by their age."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta

from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.layout import ATTEMPT, MANIFEST
from laplace_dist.run.leases import GONE
from laplace_dist.run.ownership import of_another, read_plan
from laplace_dist.storage.local import TEMP
from laplace_dist.storage.store import Store

RELISTS = 5  # while a job deletes the run beside this


def wall_clock() -> datetime:
    """Return the time that ages are counted from."""
    return datetime.now(UTC)


def find(
    store: Checkpoint, times: Mapping[str, datetime], plan: Plan | None, now: datetime
) -> tuple[dict[str, float], bool]:
    """Return the hours since the last write of every attempt that no manifest names, and whether all could be read.

    Those in windows, which are laid out like checkpoints of their own, are among them.

    Args:
        store: The checkpoint.
        times: When every object was last written, as listed before this call reads the manifests: what is committed in
            between is named by then, so that it is not taken for an orphan.
        plan: Of the run: what a manifest of another one names counts as not named. None if it cannot be read.
        now: The time.
    """
    found, readable = _in_one(store, times, plan, now)
    for prefix in sorted({match[1] for key in times if (match := layout.WITHIN.match(key))}):
        place = store.under(prefix)
        own = {key.removeprefix(f"{prefix}/"): time for key, time in times.items() if key.startswith(f"{prefix}/")}
        ages, whole = _in_one(place, own, _plan_of(place), now)
        found |= {f"{prefix}/{key}": age for key, age in ages.items()}
        readable = readable and whole
    return found, readable


def _plan_of(place: Checkpoint) -> Plan | None:
    """Return a window's plan; None where it was deleted and has left orphans, or is bad, which is named elsewhere."""
    try:
        return read_plan(place)
    except CheckpointError:
        return None


def _in_one(
    store: Store, times: Mapping[str, datetime], plan: Plan | None, now: datetime
) -> tuple[dict[str, float], bool]:
    """Return the same of what is laid out as one checkpoint."""
    newest: dict[str, datetime] = {}
    for key, time in times.items():
        match = ATTEMPT.fullmatch(key)
        place = key if TEMP in key else match and match[1]
        if place:
            newest[place] = max(time, newest.get(place, time))
    named, readable = _named(store, times, plan)
    newest |= {
        key: time
        for key, time in times.items()
        if key.startswith(f"{layout.JOBS}/") and now - time > timedelta(hours=GONE)
    }
    ages = {
        place: max(0.0, (now - time).total_seconds() / 3600) for place, time in newest.items() if place not in named
    }
    return ages, readable


def _named(store: Store, before: Collection[str], plan: Plan | None) -> tuple[set[str], bool]:
    """Return the attempt directories that manifests name, and whether all manifests could be read.

    Args:
        store: The checkpoint.
        before: Keys that were listed before: a manifest among them counts too, if it is still there, and so does one that
            would name an attempt among them. A listing that leaves out a manifest makes no orphan of what it names.
        plan: Of the run.
    """
    for _ in range(RELISTS):
        try:
            return _read_named(store, before, plan)
        except MissingObjectError:  # listed, and deleted since: with it, what it named is named no more
            continue
    return set(), False


def _read_named(store: Store, before: Collection[str], plan: Plan | None) -> tuple[set[str], bool]:
    named: set[str] = set()
    now = set(store.list())
    unlisted = {key for key in {*before, *_namers(before)} - now if MANIFEST.fullmatch(key) and store.exists(key)}
    listed = now | unlisted
    keys = sorted(key for key in listed if MANIFEST.fullmatch(key) and key != layout.METRICS)
    for key, content in store.read_many(keys):
        try:
            manifest = open_json(content, key)
        except (CheckpointError, SettingsError):
            return named, False
        if plan is not None and of_another(manifest, plan):
            continue
        places = [manifest, *manifest.get("factors", {}).values(), *manifest.get("parts", {}).values()]
        named |= {place["prefix"] for place in places if "prefix" in place}
    return named, True


def _namers(keys: Collection[str]) -> set[str]:
    """Return the keys of the manifests that would name the attempts among some keys, by where these lie."""
    attempts = {match[1] for key in keys if (match := ATTEMPT.fullmatch(key))}
    return {layout.WINDOW, *(f"{attempt.rpartition('/')[0]}.json" for attempt in attempts)}
