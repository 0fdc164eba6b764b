"""The part of a verification that is about sums: partials, parts, the window's sum, posterior versions, and the data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from laplace_dist.data import loader
from laplace_dist.data.collate import Collate
from laplace_dist.errors import ExampleError
from laplace_dist.plan.digests import feed
from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run import layout, partials, versions, windows
from laplace_dist.run.ownership import is_foreign
from laplace_dist.run.vector import Vector, overlaps


class SumsCheck:
    """Checks sums from the partials upwards; each is compared with what it is the sum of, where that is there and good.

    Args:
        check: The verification: `attempt`, `array`, `groups`, `came_from`, `report`, `store`.
        plan: Of the run.
        keys: All objects.

    Attributes:
        manifests: Good manifests of partials by the segment's id.
        window: The manifest of the window's sum, if it is there and good.
    """

    def __init__(self, check: Any, plan: Plan, keys: Collection[str]) -> None:
        self.check, self.plan, self.keys, self.store = check, plan, keys, check.store
        self.manifests: dict[str, dict[str, Any]] = {}
        self.window: dict[str, Any] | None = None
        self._sums: dict[str, np.ndarray | None] = {}

    def run(self) -> None:
        """Do so."""
        self._partials()
        if layout.WINDOW in self.keys:
            self.window = self.check.attempt(layout.WINDOW, lambda: windows.read_window(self.store, self.plan))
        loaded = self._versions()
        for part in self.plan.parts:
            self._part(part, loaded)
        self._losses()

    def _problem(self, key: str, text: str) -> None:
        self.check.report.problems.append((key, text))

    # -------------------------------------------------------------- partials

    def _partials(self) -> None:
        planned = {layout.partial_key(segment.id): segment for segment in self.plan.segments}
        present = [key for key in self.keys if re.fullmatch(r"partials/[^/]+\.json", key)]
        self.check.attempt("partials", lambda: self._read_partials(planned, sorted(present)))
        self.check.report.segments, self.check.report.committed = len(planned), len(self.manifests)

    def _read_partials(self, planned: Mapping[str, Segment], present: Collection[str]) -> None:
        for key, content in self.store.read_many(present):
            if key not in planned:
                self._unplanned(key, content)
                continue
            segment = planned[key]
            found = self.check.attempt(key, lambda c=content, s=segment: partials.parse_manifest(c, self.plan, s))
            if found is not None:
                self.manifests[segment.id] = found
                self.check.came_from(found)
                self.check.groups(found["prefix"], found["arrays"])
                if found["format_version"] == 1:
                    self.check.attempt(key, lambda m=found: partials.loss_of(self.store, m))

    def _unplanned(self, key: str, content: bytes) -> None:
        """Note a manifest of no segment of the plan: one of another run does no harm, and is all the same in the way."""
        if self.check.attempt(key, lambda: is_foreign(content, key, self.plan)):
            self.check.report.notes.append((key, f"{key} is of another run, which was deleted (--fresh). Delete it."))
        else:
            self._problem(key, f"{key} is of no segment of this plan. Delete it.")

    @property
    def _all(self) -> list[dict[str, Any]] | None:
        """The manifests in plan order if all are there and good."""
        ordered = [self.manifests[segment.id] for segment in self.plan.segments if segment.id in self.manifests]
        return ordered if len(ordered) == len(self.plan.segments) else None

    def _sum(self, part: Part) -> np.ndarray | None:
        """Read one part of every partial; return their sum in plan order if all are there and good."""
        before = len(self.check.report.problems)
        ordered = [self.manifests[segment.id] for segment in self.plan.segments if segment.id in self.manifests]
        if self.check.shallow:
            for manifest in ordered:
                if manifest["format_version"] > 1:
                    self.check.array(manifest["prefix"], part.id, manifest["arrays"][part.id])
            return None
        total = np.full(part.stop - part.start, -0.0)
        for manifest, pieces in zip(ordered, partials.read_parts(self.store, self.plan, ordered, part), strict=True):
            self.check.attempt(f"{manifest['prefix']}/{part.id}", lambda p=pieces: partials.add(total, p))
        whole = self._all is not None and len(self.check.report.problems) == before
        return total if whole else None

    # -------------------------------------------------------------- parts, window, versions

    def _part(self, part: Part, loaded: Mapping[str, Mapping[str, Any]]) -> None:
        """Check one part of everything: of the partials, of the window's sum, of the posterior versions."""
        total, key = self._sum(part), layout.part_key(part.id)
        summed = self._part_sum(part, key, total) if key in self.keys else None
        for version, manifest in loaded.items():
            current = self.window is not None and versions.version_of(self.plan, self.window) == version
            old = manifest["format_version"] == 1
            truth = total if old else summed if current else None
            where = layout.version_key(version)
            if (
                truth is not None
                and self.check.attempt(where, lambda m=manifest, t=truth: self._equals(m, part, t)) is False
            ):
                self._problem(where, f"{where}: its factors are not the sum of the committed partials. Delete it and run the "
                              "fit job again.")  # fmt: skip

    def _part_sum(self, part: Part, key: str, total: np.ndarray | None) -> np.ndarray | None:
        manifest = self.check.attempt(key, lambda: windows.read_part_manifest(self.store, self.plan, part))
        if manifest is None:
            return None
        self.check.came_from(manifest)
        value = self.check.array(manifest["prefix"], windows.SUM, manifest["arrays"][windows.SUM])
        named = self.window and self.window["parts"][part.id]["prefix"]
        if named and named != manifest["prefix"]:
            self._problem(key, f"{key} is not the one that {layout.WINDOW} names. {layout.remedy(key)}")
        same = self._all is not None and windows.inputs_digest(self._all, part) == manifest["of"]
        if self._all is not None and not same:
            self._problem(
                key, f"{key} is the sum of other partials than those that are committed. {layout.remedy(key)}"
            )
        if value is not None and total is not None and same and value.tobytes() != total.tobytes():
            self._problem(key, f"{key} is not the sum of the committed partials. {layout.remedy(key)}")
        return value

    def _versions(self) -> dict[str, dict[str, Any]]:
        """Check every posterior version alone; return the manifests of the good ones by name."""
        found = {}
        for key in sorted(self.keys):
            if not re.fullmatch(r"posteriors/[^/]+\.json", key):
                continue
            version = key.removeprefix("posteriors/").removesuffix(".json")
            manifest = self.check.attempt(key, lambda v=version: versions.read_version(self.store, self.plan, v))
            if manifest is None:
                continue
            before = len(self.check.report.problems)
            for name, place in manifest["factors"].items():
                self.check.array(place["prefix"], name, place["entry"])
            if len(self.check.report.problems) == before:
                self.check.report.versions.append(version)
                found[version] = manifest
        return found

    def _equals(self, manifest: Mapping[str, Any], part: Part, truth: np.ndarray) -> bool:
        """Compare one part of a version's factors with what they should be; 0.1 rounded them to the posterior's type."""
        arrays = {}
        for place, _, _ in overlaps(self.plan.places, part.start, part.stop):
            where = manifest["factors"][place.name]
            arrays[place.name] = self.store.read_array(where["prefix"], place.name, where["entry"])
        found = Vector(self.plan.places, arrays).read(part.start, part.stop)
        if manifest["format_version"] == 1:
            truth = truth.astype(self.plan.spec["dtype"]).astype(np.float64)
        return found.tobytes() == truth.tobytes()

    def _losses(self) -> None:
        if self.window is None:
            used = self.plan.format_version > 1 and (self.check.report.versions or layout.CURRENT in self.keys)
            if used and self.check.missing(layout.WINDOW, self.keys):
                text = f"{layout.WINDOW} is missing, though its posterior is there. Run the fit job again: it writes it anew."
                self._problem(layout.WINDOW, text)
            return
        if self._all is not None and not self.check.shallow:
            total = windows.total_loss(self.store, self._all)
            if total != self.window["loss"]:
                self._problem(layout.WINDOW, f"{layout.WINDOW}: its loss is not the sum of the partials'. "
                              f"{layout.remedy(layout.WINDOW)}")  # fmt: skip
        for part in self.plan.parts:
            if self.check.missing(layout.part_key(part.id), self.keys):
                key = layout.part_key(part.id)
                self._problem(key, f"{key} is missing, and {layout.WINDOW} names it. {layout.remedy(key)}")


def compare_data(check: Any, plan: Plan, data: Any) -> None:
    """Read the data of every committed segment again and compare them with what was read when it was computed.

    Args:
        check: The verification.
        plan: Of the run.
        data: The training split.
    """
    names = {"path": "collate", "key_x": "dict_key_x", "key_y": "dict_key_y"}
    collate = Collate(**{field: plan.settings[name] for field, name in names.items() if name in plan.settings})
    for segment in plan.segments:
        key = layout.partial_key(segment.id)
        if key not in check.keys:
            continue
        manifest = check.attempt(key, lambda s=segment: partials.read_manifest(check.store, plan, s))
        if manifest is None or manifest.get("data_sha256") is None:
            continue
        digest = hashlib.sha256()
        try:
            for _, x, y in loader.batches(data, segment.start, segment.stop, plan.settings["batch_size"], collate):
                feed(digest, (x, y))
        except ExampleError as error:
            check.report.problems.append((key, f"segment {segment}: {error}"))
            continue
        if digest.hexdigest() != manifest["data_sha256"]:
            check.report.problems.append(
                (
                    key,
                    f"segment {segment} was computed from other data than the training split gives now; it was read on node "
                    f"{manifest['environment']['node']}. Find out which data are right; if these, delete {key} and run the "
                    "fit job again.",
                )
            )
