"""The place of a run: whether one may begin there, and deleting the one that is there and nothing else."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from laplace_dist.errors import CheckpointError, SettingsError, StorageError, listed
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.layout import (
    CLEARED,
    CONFIG,
    COVERAGE,
    CURRENT,
    FOLDERS,
    PLAN,
    PROBE,
    WEIGHTS,
    WEIGHTS_INDEX,
    WEIGHTS_SHARD,
    owned,
)
from laplace_dist.run.marks import is_own
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.local import TEMP
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

_SIGNS = (CONFIG, WEIGHTS, WEIGHTS_INDEX, COVERAGE)  # by which a run is known whose plan was damaged


def check_place(store: Store) -> None:
    """Refuse a place that is not empty and holds no run; what an interrupted start or a deleted run leaves does not count.

    Raises:
        SettingsError: Naming what was found.
    """
    there = store.entries()
    if PLAN in there and is_own(PLAN, store.read):
        return
    found = [name for name in there if not _left_over(store, name)]
    if PLAN in found and any(name in there and is_own(name, store.read) for name in _SIGNS):
        return  # a run's, and damaged, which whoever reads it says
    if found:
        why = "is no plan of a run" if PLAN in found else "is not there"
        raise SettingsError(
            f"--checkpoint {store.url!r}: holds no run ({PLAN} {why}), but is not empty: {listed(found)}. Nothing was changed. "
            "Give a new or empty place, or one that holds a run."
        )


def _left_over(store: Store, name: str) -> bool:
    """Say whether an entry is what workers and drivers write, and nothing else: without a plan, it has outlived a deletion."""
    if name.startswith(TEMP) or name == "lost+found/":  # of a file system's own root
        return True
    if not name.endswith("/"):
        return is_own(name, store.read)
    keys = store.list(name.rstrip("/")) if name in FOLDERS else []
    return bool(keys) and all(is_own(key, store.read) for key in keys)


def refuse_needed(store: Store, needed: Mapping[str, str | None]) -> None:
    """Refuse to delete a run of which something is what the command was given.

    Args:
        store: The checkpoint.
        needed: Paths and URLs of files and folders by the names of their flags.

    Raises:
        SettingsError: Naming the first that would be deleted.
    """
    inside = {flag: _within(store.url, place) for flag, place in needed.items() if place is not None}
    mine = [key for key in store.list() if owned(key)] if any(key is not None for key in inside.values()) else []
    for flag, name in inside.items():
        if name is not None and any(not name or key == name or key.startswith(f"{name}/") for key in mine):
            raise SettingsError(
                f"{flag}: got {needed[flag]!r}, which would be deleted with the run at {store.url!r} that is to begin anew "
                "(--fresh). Copy it to another place and name that, or give another --checkpoint. Nothing was deleted"
            )


def _within(url: str, place: str) -> str | None:
    """Return where under a checkpoint's URL a place lies, "" if it is the checkpoint itself; None where it lies elsewhere."""
    own, other = _resolved(url), _resolved(place)
    if own == other:
        return ""
    return other.removeprefix(f"{own}/") if other.startswith(f"{own}/") else None


def _resolved(place: str) -> str:
    """Return the one name of a place: of a local one without links."""
    path = re.sub(r"^(file|local)://", "", place)
    return place.rstrip("/") if "://" in path else os.path.realpath(os.path.expanduser(path))


def clear(store: Store, say: Callable[[str], None] = lambda text: None) -> None:
    """Delete the run under a checkpoint URL, and nothing else that lies there.

    Readers follow CURRENT to manifests to arrays, so it is deleted in that order and the plan last: if this is interrupted,
    what remains is still a run. Before that the plan gets another id, so that the workers of the run stop themselves, and what
    one of them commits at that very moment counts for nobody: its arrays may be among what is deleted.

    Args:
        store: The checkpoint, which holds a run.
        say: Where a line about what is deleted and what is kept goes.
    """
    keys = store.list()
    mine = [key for key in keys if owned(key)]
    kept = [key for key in keys if not owned(key)]
    counts = Counter(key.partition("/")[0] + ("/" if "/" in key else "") for key in mine)
    what = ", ".join(f"{name} ({count})" if name.endswith("/") else name for name, count in sorted(counts.items()))
    say(f"--fresh: deleting the run at {store.url}: {what}" + (f"; kept: {listed(kept)}" if kept else ""))
    store.delete_tree(CURRENT)
    _disown(store)
    mine = [key for key in store.list() if owned(key)]
    for stage in CLEARED:
        manifests = [key for key in mine if key.startswith(stage) and key.endswith(".json")]
        for key in manifests:
            store.delete_tree(key)
        for folder in sorted({"/".join(key.split("/")[:2]) for key in mine if key.startswith(stage)} - set(manifests)):
            _delete_folder(store, folder, mine, kept)
    for name in (CONFIG, WEIGHTS, WEIGHTS_INDEX, PLAN):
        store.delete_tree(name)
    for key in sorted(key for key in mine if PROBE.fullmatch(key) or WEIGHTS_SHARD.fullmatch(key)):  # which others name
        store.delete_tree(key)


def _disown(store: Store) -> None:
    """Give the run another id, so that nothing that is committed, or will be by those at work on it, belongs to it."""
    try:
        plan = read_plan(store)
    except StorageError:
        raise
    except (CheckpointError, SettingsError):
        return  # altered, or of a newer version: no worker can go on with it either
    if plan.format_version > 1:
        store.replace(PLAN, seal_json(replace(plan, run=new_attempt()).to_values()))


def delete_owned(store: Store, folder: str) -> None:
    """Delete a folder of the run's, and nothing in it that is a user's."""
    keys = store.list(folder)
    _delete_folder(store, folder, [key for key in keys if owned(key)], [key for key in keys if not owned(key)])


def _delete_folder(store: Store, folder: str, mine: Collection[str], kept: Collection[str]) -> None:
    """Delete a folder at once, or object by object if something lies there that is not the run's."""
    if not any(key.startswith(f"{folder}/") for key in kept):
        store.delete_tree(folder)
        return
    for key in mine:
        if key.startswith(f"{folder}/"):
            store.delete_tree(key)
