"""What a run keeps with `--keep-versions`, and collecting the rest: old versions, and windows that nothing needs any more.

Kept are the versions that were current last, this recalibration's candidate, the windows that they are sums of, and the
tunings and evaluations that history and decision name. Before anything is deleted the history says so, by compare-and-set, so
that no rollback can make current what goes; then what refers to others goes first. Whoever reads meanwhile has the old bytes or
an error that names the object. What a crash leaves undone, the next collection does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import evaluations, layout, leases, monitoring, pointer, recalibrations, versions
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import LAST, place_of, windows_of
from laplace_dist.run.ownership import confirm, read_plan
from laplace_dist.run.place import delete_owned

_STEM = re.compile(
    r"(?:(?:decompositions|posteriors|tuning|evaluation)/|report/spectra-)([0-9a-f]{16})(?:-[0-9a-f]{16})?"
)


def collect(
    store: Checkpoint,
    plan: Plan,
    job: str,
    *,
    keep: int,
    sides: Collection[Mapping[str, Any]],
    chosen: str,
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Delete what is neither kept nor in use; nothing while another job is at work, which may name it later.

    Args:
        store: The checkpoint.
        plan: Of the run.
        job: Id of this job's sign of life; it holds the lease of recalibrations.
        keep: How many of the versions that were current stay, the current one counted.
        sides: `version`, `tuning` and `evaluation` of the candidate and of what it was compared with.
        chosen: Of the windows: with `last:K` those that the last K have left behind go too.
        say: Where a line for people goes.

    Returns:
        The keys of what was deleted, without `.json`.

    Raises:
        CheckpointError: The manifest of a version that is to stay is missing or altered; nothing is deleted.
        SettingsError: The run was deleted meanwhile, or is another one.
    """
    if leases.others_at_work(store, job):
        say("nothing is collected while another job is at work on the run; the next recalibration will")
        return []
    content = store.read(layout.CURRENT)
    live = [entry for entry in pointer.history_of(open_json(content, layout.CURRENT)) if not entry.get("collected")]
    last = list(dict.fromkeys(entry["version"] for entry in reversed(live)))[:keep]
    stay = {*last, *(side["version"] for side in list(sides)[:1])}
    named = {key for e in (*live, *sides) for key in (e["tuning"], e.get("evaluation"))}
    named |= {shown := evaluations.shown(store), (monitoring.read_state(store, plan) or {}).get("evaluation")}
    windows = _idle_windows(store, plan, stay, pointer.left_out(open_json(content, layout.CURRENT)), chosen)
    outdated = [layout.METRICS.removesuffix(".json")] if shown and not shown.startswith(_of(stay)) else []
    stems = [*outdated, *_stems(store, stay, named), *windows]
    old = {entry["version"] for entry in live} - set(last)
    if not stems and not old:
        return []
    confirm(store, plan)
    if not pointer.mark_collected(store, content, old, new_attempt()):
        say("nothing is collected: another job has changed what is current at this moment")
        return []
    gone = []
    for stem in stems:
        if not recalibrations.holds(store, job):
            say("another recalibration has taken over; it collects the rest")
            break
        _delete(store, stem)
        gone.append(stem)
    return gone


def _of(stay: Collection[str]) -> tuple[str, ...]:
    return tuple(f"{layout.EVALUATIONS}/{version}-" for version in stay)


def _stems(store: Checkpoint, stay: Collection[str], named: Collection[str | None]) -> Iterator[str]:
    """Yield the keys, without `.json`, of versions that do not stay, and of tunings and evaluations that nothing names."""
    for folder in (layout.REPORTS, layout.DECOMPOSITIONS, layout.POSTERIORS, layout.TUNINGS, layout.EVALUATIONS):
        own = (match for key in store.list(folder) if layout.owned(key) and (match := _STEM.match(key)))
        for stem, version in sorted({(match[0], match[1]) for match in own}):
            if version not in stay or (folder in (layout.TUNINGS, layout.EVALUATIONS) and f"{stem}.json" not in named):
                yield stem


def _idle_windows(
    store: Checkpoint, plan: Plan, stay: Collection[str], left_out: Sequence[str], chosen: str
) -> list[str]:
    """Return the folders of windows that no version that stays is a sum of and that none will be, and of what is no window.

    The first window is the run's own and stays.
    """
    needed = {plan.window_name}
    for version in stay:
        manifest = versions.read_version(store, plan, version)
        needed |= {term["window"] for term in manifest.get("windows") or []}
    there = [window.name for window in windows_of(store, plan)]
    kept = LAST.fullmatch(chosen)
    recent = [name for name in there if name not in left_out]
    idle = {name for name in there if name in left_out}
    idle |= set(recent[: -int(kept[1])]) if kept else set()
    folders = {key.split("/")[1] for key in store.list(layout.WINDOWS) if key.count("/") > 1}
    unowned = {name for name in folders - set(there) if _is_left_over(store, plan, name)}
    return [f"{layout.WINDOWS}/{name}" for name in sorted((idle | unowned) - needed)]


def _is_left_over(store: Checkpoint, plan: Plan, name: str) -> bool:
    """Say whether a folder without a plan of the run holds what a window has, as a collection that was killed leaves it."""
    try:
        read_plan(place_of(store, plan, name))
    except MissingObjectError:
        return all(layout.owned(key) for key in store.list(f"{layout.WINDOWS}/{name}"))
    return False


def _delete(store: Checkpoint, stem: str) -> None:
    """Delete what makes a thing exist for readers, then the rest of it."""
    folder = stem.partition("/")[0]
    if folder == layout.DECOMPOSITIONS:
        first = [key for key in store.list(stem, recursive=False) if key.endswith(".json")]
    else:
        first = [f"{stem}/{layout.PLAN}" if folder == layout.WINDOWS else f"{stem}.json"]
    for key in first:
        store.delete_tree(key)
    delete_owned(store, stem)
