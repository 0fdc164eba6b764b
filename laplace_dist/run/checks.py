"""The checks that read arrays and data, each small and plain enough to be carried out by whoever is told to.

A verification lists them and puts their findings together in the order of the list, so that it says the same wherever they
were carried out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from laplace_dist.data import example_weights, loader
from laplace_dist.data.collate import Collate
from laplace_dist.errors import ExampleError, MissingObjectError, SettingsError
from laplace_dist.plan.digests import feed
from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run import layout, partial_manifests, partials, tunings
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.findings import Checker, Findings
from laplace_dist.storage.store import Store

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a check is carried out.

    Attributes:
        store: The checkpoint.
        plan: Of the run.
        data: Opens the training split of a window by its name.
        keys: The objects that were listed, where somebody listed them.
        shallow: Look that arrays are there, without reading them.
        manifests: Those of partials that were read and are good, by their units' ids.
    """

    store: Store
    plan: Plan
    data: Callable[[str], Any]
    keys: Collection[str] = ()
    shallow: bool = False
    manifests: Mapping[str, Manifest] = field(default_factory=dict)

    def find(self, check: Check) -> Findings:
        """Carry out a check."""
        found = Findings()
        check.run(Checker(self.store, found, self.keys, shallow=self.shallow), self)
        return found

    def partials(self, checker: Checker, units: Collection[Segment], part: Part | None = None) -> list[Manifest]:
        """Return the manifests of some partials in order, with what they say of one part alone if one is given."""
        left = [unit for unit in units if unit.id not in self.manifests]
        keys = [layout.partial_key(unit.id) for unit in left]
        read: dict[str, Manifest | None] = {}
        try:
            for unit, (key, data) in zip(left, self.store.read_many(keys), strict=True):
                found = checker.attempt(key, lambda d=data, u=unit: partial_manifests.parse_manifest(d, self.plan, u))
                read[unit.id] = found if found is None or part is None else partial_manifests.of_part(found, part)
        except MissingObjectError:  # was deleted after it was listed
            for unit in left[len(read) :]:
                call = partial(partial_manifests.read_manifest, self.store, self.plan, unit)
                read[unit.id] = checker.attempt(layout.partial_key(unit.id), call)
        found = (self.manifests.get(unit.id) or read[unit.id] for unit in units)
        return [manifest for manifest in found if manifest is not None]


class Check(Protocol):
    """One check."""

    @property
    def what(self) -> str:
        """The check in a person's words; no two of a verification are equal."""

    def run(self, checker: Checker, place: Place) -> None:
        """Do so, with an own checker; raises only if the storage does not answer."""


CarryOut = Callable[[str, Sequence[Check]], Iterable[Findings]]
"""Carries out the checks of a kind, and returns their findings in their order."""


@dataclass(frozen=True)
class CheckPartials:
    """Check what lies beside the parts of some partials: Zarr groups, and losses that 0.1 kept as arrays."""

    units: tuple[Segment, ...]

    @property
    def what(self) -> str:
        """The check in a person's words."""
        return f"partials of {len(self.units)} segments from {self.units[0].id} on"

    def run(self, checker: Checker, place: Place) -> None:
        """Do so."""
        for manifest in place.partials(checker, self.units):
            checker.groups(manifest["prefix"], manifest["arrays"])
            if manifest["format_version"] == 1:
                key = layout.partial_key(manifest["segment"])
                checker.attempt(key, lambda m=manifest: partials.loss_of(place.store, m))


@dataclass(frozen=True)
class CheckArrays:
    """Check arrays that one manifest names.

    Attributes:
        of: Key of the manifest.
        arrays: `(prefix, name, entry)` of each.
    """

    of: str
    arrays: tuple[tuple[str, str, Manifest], ...]

    @property
    def what(self) -> str:
        """The check in a person's words."""
        return f"arrays of {self.of} from {self.arrays[0][1]!r} on"

    def run(self, checker: Checker, place: Place) -> None:
        """Do so."""
        for prefix, name, entry in self.arrays:
            checker.array(prefix, name, entry)


@dataclass(frozen=True)
class CheckFollowOns:
    """Check manifests of tuning and evaluation, the shards that they were made of, and the arrays that they name."""

    keys: tuple[str, ...]

    @property
    def what(self) -> str:
        """The check in a person's words."""
        return f"{len(self.keys)} objects from {self.keys[0]} on"

    def run(self, checker: Checker, place: Place) -> None:
        """Do so."""
        for key in self.keys:
            self._one(checker, place, key)

    def _one(self, checker: Checker, place: Place, key: str) -> None:
        manifest = checker.attempt(key, lambda: open_json(place.store.read(key), key))
        if manifest is None:
            return
        if manifest.get("plan", place.plan.digest) != place.plan.digest:
            text = f"{key} is of another run. A job that is deleted while it is at work (--fresh) may leave that."
            checker.found.notes.append((key, text))
            return
        checker.found.came_from(manifest)
        if "scores" in manifest:
            checker.attempt(key, lambda: tunings.read_shard(place.store, key))
        for shard in _shards(key, manifest):
            if checker.missing(shard):
                text = f"{shard} is missing, and {key} was made of it. Restore it from a copy, or delete {key} and run"
                checker.found.problem(shard, f"{text} its job again.")
        for name, entry in manifest.get("arrays", {}).items():
            checker.array(manifest["prefix"], name, entry)


@dataclass(frozen=True)
class CheckData:
    """Read the data of a segment again and compare them with what was read when it was computed.

    Attributes:
        window: Name of the window.
        segment: Of the window.
        key: Of the object that says what was read.
        data_sha256: What was read.
        node: Where.
        weights: What names the weights of the window's examples; None if they have none.
    """

    window: str
    segment: Segment
    key: str
    data_sha256: str
    node: str
    weights: str | None = None

    @property
    def what(self) -> str:
        """The check in a person's words."""
        return f"data of segment {self.segment} of window {self.window}"

    def run(self, checker: Checker, place: Place) -> None:
        """Do so."""
        plan, segment = place.plan, self.segment
        names = {"path": "collate", "key_x": "dict_key_x", "key_y": "dict_key_y"}
        collate = Collate(**{name: plan.settings[kept] for name, kept in names.items() if kept in plan.settings})
        digest, data = hashlib.sha256(), place.data(self.window)
        if len(data) < segment.stop:
            text = f"the training split has {len(data)} examples now"
            checker.found.problem(self.key, f"segment {segment} of window {self.window}: {text}")
            return
        try:
            if self.weights is not None:
                feed(digest, example_weights.read(data, self.weights, segment.start, segment.stop))
            for _, x, y in loader.batches(data, segment.start, segment.stop, plan.settings["batch_size"], collate):
                feed(digest, (x, y))
        except (ExampleError, SettingsError) as error:  # the latter of weights alone
            checker.found.problem(self.key, f"segment {segment} of window {self.window}: {error}")
            return
        if digest.hexdigest() != self.data_sha256:
            checker.found.problem(self.key, self._differs())

    def _differs(self) -> str:
        text = (
            f"segment {self.segment} of window {self.window} was computed from other data than the training split gives now; "
            f"it was read on node {self.node}. Find out which data are right; if these, "
        )
        if self.key == layout.partial_key(self.segment.id):
            return f"{text}delete {self.key} and run the fit job again."
        return f"{text}leave the window out with --drop-window {self.window}, and give them another name."


def _shards(key: str, manifest: Manifest) -> list[str]:
    """Return the keys of the shards that a tuning or an evaluation was made of."""
    shards = manifest.get("shards", [])
    if isinstance(shards, Mapping):
        return [layout.evaluation_shard_key(key, split, shard) for split, ids in shards.items() for shard in ids]
    return [layout.tuning_shard_key(key, shard) for shard in shards]
