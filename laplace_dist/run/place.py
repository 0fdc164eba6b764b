"""The place of a run: whether one may begin there, and deleting the one that is there and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

from laplace_dist.errors import CheckpointError, SettingsError, StorageError, listed
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.layout import CLEARED, CONFIG, CURRENT, PLAN, PROBE, WEIGHTS, owned
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.settings_file import is_sealed_yaml
from laplace_dist.run.weights import is_sealed
from laplace_dist.storage.local import TEMP
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

# A job that wrote them at the moment at which its run was deleted leaves these alone behind; a user's own have no such seal.
_SEALED = {CONFIG: is_sealed_yaml, WEIGHTS: is_sealed}
_FOLDERS = (
    "recalibration/",
    "windows/",
    "moments/",
    "partials/",
    "parts/",
    "posteriors/",
    "tuning/",
    "evaluation/",
    "report/",
    "status/",
)


def _left_over(store: Store, folder: str) -> bool:
    """Say whether a folder holds what workers write and nothing else: without a plan, one has outlived its run's deletion."""
    keys = store.list(folder.rstrip("/"))
    return bool(keys) and all(map(owned, keys))


def check_place(store: Store) -> None:
    """Refuse a place that is not empty and holds no run; what an interrupted start or a deleted run leaves does not count.

    Raises:
        SettingsError: Naming what was found.
    """
    found = [name for name in store.entries() if not owned(name) or name in _SEALED]
    found = [name for name in found if name not in _SEALED or not _SEALED[name](store.read(name))]
    found = [name for name in found if not name.startswith(TEMP) and not (name in _FOLDERS and _left_over(store, name))]
    found = [name for name in found if name != "lost+found/"]  # of a file system's own root
    if found and not store.exists(PLAN):
        raise SettingsError(
            f"--checkpoint {store.url!r}: holds no run (no {PLAN}), but is not empty: {listed(found)}. Nothing was changed. "
            "Give a new or empty place, or one that holds a run."
        )


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
    for name in (CONFIG, WEIGHTS, PLAN):
        store.delete_tree(name)
    for key in sorted(key for key in mine if PROBE.fullmatch(key)):  # which the plan names
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


def _delete_folder(store: Store, folder: str, mine: Collection[str], kept: Collection[str]) -> None:
    """Delete a folder at once, or object by object if something lies there that is not the run's."""
    if not any(key.startswith(f"{folder}/") for key in kept):
        store.delete_tree(folder)
        return
    for key in mine:
        if key.startswith(f"{folder}/"):
            store.delete_tree(key)
