"""Check every object of a run, name what is wrong one by one, and collect what no manifest names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from laplace_dist.errors import CheckpointError, ForeignError, SettingsError, StorageError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, leases, orphans, ownership, settings_file, tunings, versions
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import alone
from laplace_dist.run.pointer import read_current
from laplace_dist.run.probe import open_probe
from laplace_dist.run.verify_sums import SumsCheck, compare_data
from laplace_dist.run.weights import check_weights
from laplace_dist.storage.local import TEMP
from laplace_dist.storage.store import Store


@dataclass
class Report:
    """What was found.

    Attributes:
        url: Of the run.
        objects: Number of objects in it.
        committed: Committed segments.
        segments: Planned segments.
        versions: Whole posterior versions.
        problems: `(key, what is wrong and what to do)` for every bad object.
        notes: `(key, what is still to do)` where a run ended before a step that the same command takes.
        orphans: Hours since the last write, by attempt directory or temporary file that no manifest names.
        collected: Those of them that were deleted.
        environments: How many partials, tunings and evaluations were made with which versions, device and flags.
    """

    url: str
    objects: int = 0
    committed: int = 0
    segments: int = 0
    versions: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    orphans: dict[str, float] = field(default_factory=dict)
    collected: list[str] = field(default_factory=list)
    environments: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether every object that the run has is whole; a run may be whole and still unfinished."""
        return not self.problems


def verify(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    collect_orphans_older_than: float | None = None,
    shallow: bool = False,
    data: Any = None,
) -> Report:
    """Read and check a whole run: plan, weights, manifests, arrays, sums, posterior versions, tuning, evaluation.

    Every number is read and compared with its digests; where all partials are there, they are summed again and
    compared with the window's sum, and that with the posterior version, bit for bit. Nothing is repaired.

    Args:
        url: Checkpoint directory or URL.
        storage_options: For the file system of the URL.
        collect_orphans_older_than: Delete attempts that no manifest names and that were last written more than so
            many hours ago, and before every job began that is at work: what it will name is not named yet.
        shallow: Check manifests, and that the arrays that they name are there, without reading them.
        data: The training split, as a map-style data set: every committed segment's data are read again and compared with
            the digest of what was read when it was computed.

    Raises:
        SettingsError: The URL cannot be read, holds no run, or holds one of a newer version.
        StorageError: The storage does not answer.
    """
    store = Checkpoint(url, storage_options)
    return check_run(store, collect_orphans_older_than, shallow=shallow, data=data)


def check_run(
    store: Checkpoint,
    collect_orphans_older_than: float | None = None,
    *,
    shallow: bool = False,
    data: Any = None,
    now: Callable[[], datetime] = orphans.wall_clock,
) -> Report:
    """Do what `verify` does with an open checkpoint; `now` is the clock that ages are counted from."""
    if not store.exists(layout.PLAN):
        raise SettingsError(f"--checkpoint: got {store.url!r}, where there is no run (no {layout.PLAN})")
    times = store.modified()  # before any manifest is read: what is committed after this is not taken for an orphan
    keys = [key for key in times if TEMP not in key]
    check = _Check(store, Report(store.url, len(keys)), keys, shallow)
    plan = check.attempt(layout.PLAN, lambda: ownership.read_plan(store))
    if plan is not None:
        check.run(plan, keys)
        if data is not None:
            compare_data(check, plan, data)
    check.collect(times, collect_orphans_older_than, plan, now())
    return check.report


MARGIN = 0.1  # hours by which this machine's clock and the storage's may differ


class _Check:
    """One verification: what is bad is written down and the rest is still checked."""

    def __init__(self, store: Store, report: Report, keys: Collection[str], shallow: bool) -> None:
        self.store, self.report, self.keys, self.shallow = store, report, set(keys), shallow
        self.plan = ""  # its digest
        self.foreign: set[str] = set()  # manifests of other runs

    def attempt(self, key: str, call: Callable[[], Any]) -> Any:
        """Return what a call returns, or None after noting that the object with this key is bad."""
        try:
            return call()
        except StorageError:
            raise
        except ForeignError as error:
            self.foreign.add(key)
            self.report.notes.append(
                (key, f"{error} A job that is deleted while it is at work (--fresh) may leave that.")
            )
        except CheckpointError as error:
            self.report.problems.append((key, str(error)))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, SettingsError):
                raise
            self.report.problems.append((key, f"{key} is altered: it has not the fields of its kind ({error!r})"))
        return None

    def missing(self, key: str, keys: Collection[str]) -> bool:
        """Say whether an object is neither among those listed first nor there now, as a job beside this may write it."""
        return key not in keys and not self.store.exists(key)

    def run(self, plan: Plan, keys: list[str]) -> None:
        store, self.plan = self.store, plan.digest
        weights = layout.WEIGHTS
        if weights in keys or any(key.startswith("partials/") for key in keys):
            self.attempt(weights, lambda: check_weights(store.read(weights), plan.weights, weights))
        if layout.CONFIG in keys or any(key.startswith("partials/") for key in keys):
            self.attempt(layout.CONFIG, lambda: settings_file.read_config(store))
        if plan.probe is not None:
            key = layout.probe_key(plan.probe)
            self.attempt(key, lambda: open_probe(store.read(key), plan.probe, key))
        sums = SumsCheck(self, plan, keys)
        sums.run()
        for key in keys:
            follows = (
                key.startswith(("tuning/", "evaluation/")) and layout.MANIFEST.fullmatch(key) and key != layout.METRICS
            )
            if follows and self.of_this_run(key, keys):
                self.follow_on(key, keys)
        self.pointers(keys, sums, plan)
        self.unmerged(keys)

    def came_from(self, manifest: Mapping[str, Any]) -> None:
        """Count the environment that a committed object was made in, whichever node of its kind it was."""
        made = manifest.get("environment") or {"version": "0.1, which recorded none"}
        kind = ", ".join(f"{name} {value}" for name, value in sorted(made.items()) if name not in ("node", "precision"))
        flags = [f"{name}={value}" for name, value in sorted(made.get("precision", {}).items()) if value != ""]
        self.report.environments["; ".join([kind, *flags])] += 1

    def of_this_run(self, key: str, keys: Collection[str]) -> bool:
        """Say whether the version is there that an object of tuning or evaluation is about, and note it if not."""
        version = layout.version_key(key.split("/")[1][:16])
        if version not in self.foreign and not self.missing(version, keys):
            return True
        text = f"{key} is about {version}, which this run does not have. A job that is deleted while it is at work (--fresh)"
        self.report.notes.append((key, f"{text} may leave that; delete it."))
        return False

    def follow_on(self, key: str, keys: Collection[str]) -> None:
        """Check a manifest of tuning or evaluation, the shards that it was made of, and the arrays that it names."""
        manifest = self.attempt(key, lambda: open_json(self.store.read(key), key))
        if manifest is None:
            return
        if manifest.get("plan", self.plan) != self.plan:
            text = f"{key} is of another run. A job that is deleted while it is at work (--fresh) may leave that."
            self.report.notes.append((key, text))
            return
        self.came_from(manifest)
        if "scores" in manifest:
            self.attempt(key, lambda: tunings.read_shard(self.store, key))
        for shard in _shards(key, manifest):
            if self.missing(shard, keys):
                text = f"{shard} is missing, and {key} was made of it. Restore it from a copy, or delete {key} and run"
                self.report.problems.append((shard, f"{text} its job again."))
        if "arrays" not in manifest:
            return
        for name, entry in manifest["arrays"].items():
            self.array(manifest["prefix"], name, entry)

    def array(self, prefix: str, name: str, entry: Mapping[str, Any]) -> np.ndarray | None:
        """Check an array that a manifest names and return it; a shallow verification only looks that it is there."""
        self.groups(prefix, [name])
        key = f"{prefix}/{name}"
        if not self.shallow:
            return self.attempt(key, lambda: self.store.read_array(prefix, name, entry))
        wanted = [[f"{key}/zarr.json"], [] if 0 in entry["shape"] else list(_first_chunk(key))]
        if any(names and not any(not self.missing(name, self.keys) for name in names) for names in wanted):
            self.report.problems.append((key, f"{key} is missing. {layout.remedy(key)}"))
        return None

    def groups(self, prefix: str, names: Collection[str]) -> None:
        """Check the metadata of the Zarr groups that hold arrays; reading the arrays alone does not need it."""
        for key in () if self.shallow else self.store.group_keys(prefix, names):
            self.attempt(key, lambda k=key: self.store.check_group(k))

    def pointers(self, keys: list[str], sums: SumsCheck, plan: Plan) -> None:
        """Check what says which version, tuning and metrics are in force."""
        problems = self.report.problems
        if self.report.versions or layout.CURRENT in keys:
            missing = [layout.partial_key(segment.id) for segment in plan.segments]
            problems += [
                (
                    key,
                    f"{key} is missing, though the run has a posterior. Run the fit job again: it recomputes that segment.",
                )
                for key in missing
                if self.missing(key, keys)
            ]
        if layout.CURRENT in keys:
            current = self.attempt(layout.CURRENT, lambda: read_current(self.store))
            named = [] if current is None else [f"posteriors/{current['version']}.json", current["tuning"]]
            problems += [
                (key, f"{key} is missing, and {layout.CURRENT} names it. Run the fit job again.")
                for key in named
                if key is not None and self.missing(key, keys)
            ]
            if current is not None and sums.window is not None:
                wanted = versions.version_of(alone(self.store, plan, sums.window))
                if wanted != current["version"]:
                    text = f"it names version {current['version']}, but the window's sum makes {wanted}"
                    problems.append((layout.CURRENT, f"{layout.CURRENT}: {text}. Run the fit job again."))
        elif self.store.exists(layout.CURRENT):
            pass  # a job that runs beside this has just written it
        elif self.report.versions and any(key.startswith(("tuning/", "evaluation/")) for key in keys):
            text = (
                f"{layout.CURRENT} is missing, though its posterior was used. Run the fit job again: it writes it anew."
            )
            problems.append((layout.CURRENT, text))
        elif self.report.versions:
            text = (
                f"{layout.CURRENT} is missing: the posterior is committed and not yet in force. Run the fit job again."
            )
            self.report.notes.append((layout.CURRENT, text))
        if layout.METRICS in keys:
            self.attempt(layout.METRICS, self.metrics)
        elif any(re.fullmatch(r"evaluation/[^/]+\.json", key) for key in keys):
            text = f"{layout.METRICS} is missing: the evaluation is committed and not yet shown. Run its job again."
            self.report.notes.append((layout.METRICS, text))

    def unmerged(self, keys: Collection[str]) -> None:
        """Note shards of tuning and evaluation that no manifest was made of: a crash before, or a deletion after."""
        shards = [re.fullmatch(r"((?:tuning|evaluation)/[^/]+)/[^/]+\.json", key) for key in keys]
        for stem in sorted({match[1] for match in shards if match}):
            if (key := f"{stem}.json") not in keys:
                text = f"{key} is missing: its shards are committed and not yet merged. Run its job again."
                self.report.notes.append((key, text))

    def metrics(self) -> None:
        """Check that `evaluation/metrics.json`, which carries no digest, repeats a sealed evaluation."""
        shown = json.loads(self.store.read(layout.METRICS))
        version = shown.pop("version")
        tuning = shown.pop("tuning")
        pattern = re.compile(rf"evaluation/{re.escape(str(version))}-[^/]+\.json")
        for key in filter(pattern.fullmatch, self.store.list("evaluation", recursive=False)):
            sealed = self.attempt(key, lambda k=key: open_json(self.store.read(k), k))
            if sealed and sealed["metrics"] == shown and sealed["settings"]["tuning"] == tuning:
                return
        raise CheckpointError(
            f"{layout.METRICS} repeats no evaluation of this run: it was altered. Run the evaluate job again."
        )

    # -------------------------------------------------------------- orphans

    def collect(
        self, times: Mapping[str, datetime], older_than: float | None, plan: Plan | None, now: datetime
    ) -> None:
        """Find what no manifest names, and delete what is old enough unless a manifest cannot be read."""
        self.report.orphans, readable = orphans.find(self.store, times, plan, now)
        if older_than is None:
            return
        if not readable or any(layout.MANIFEST.fullmatch(key) for key, _ in self.report.problems):
            self.report.problems.append(
                ("orphans", "nothing was collected: what looks like an orphan may belong to a manifest that is bad")
            )
            return
        protected = leases.hours_at_work(self.store, times)
        for place, age in self.report.orphans.items():
            if age >= older_than and (protected is None or age > protected + MARGIN):
                self.store.delete_tree(place)
                self.report.collected.append(place)


def _first_chunk(key: str) -> Iterator[str]:
    """Yield what the first chunk of an array may be called, by its number of dimensions."""
    yield f"{key}/c"
    yield from ("/".join([f"{key}/c", *["0"] * n]) for n in range(1, 8))


def _shards(key: str, manifest: Mapping[str, Any]) -> list[str]:
    """Return the keys of the shards that a tuning or an evaluation was made of."""
    shards = manifest.get("shards", [])
    if isinstance(shards, Mapping):
        return [layout.evaluation_shard_key(key, split, shard) for split, ids in shards.items() for shard in ids]
    return [layout.tuning_shard_key(key, shard) for shard in shards]
