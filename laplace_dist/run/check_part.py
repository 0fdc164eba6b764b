"""The check of one part of everything that is a sum: it is read once, and compared with what it is the sum of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laplace_dist.plan.parts import Part
from laplace_dist.run import layout, partial_manifests, partials, versions, windows
from laplace_dist.run.checks import Manifest, Place
from laplace_dist.run.findings import Checker
from laplace_dist.run.vector import Vector, overlaps


@dataclass(frozen=True)
class CheckPart:
    """Check one part of everything: of the partials, of the window's sum, of the posterior versions.

    Attributes:
        part: The part.
        without: Ids of the units whose partials are not committed, or bad.
        summed: Whether there is a sum of the part.
        named: Prefix of the sum that the window's manifest names, if there is one.
        versions: Names of good posterior versions, each with whether 0.1 wrote it: then its factors are the sum of the
            partials, else that of the window.
    """

    part: Part
    without: frozenset[str]
    summed: bool
    named: str | None
    versions: tuple[tuple[str, bool], ...]

    @property
    def what(self) -> str:
        """The check in a person's words."""
        return f"part {self.part.id} of everything"

    def run(self, checker: Checker, place: Place) -> None:
        """Do so."""
        units = partial_manifests.units_of(place.plan, self.part)
        manifests = place.partials(checker, [unit for unit in units if unit.id not in self.without], self.part)
        whole = len(manifests) == len(units)
        total = self._sum(checker, place, manifests)
        total = total if whole and not checker.found.problems else None
        summed = self._window(checker, place, manifests if whole else None, total) if self.summed else None
        for version, of_partials in self.versions:
            truth = total if of_partials else summed
            if truth is not None:
                self._version(checker, place, version, truth)

    def _sum(self, checker: Checker, place: Place, manifests: Sequence[Manifest]) -> np.ndarray | None:
        """Read one part of every partial; return their sum in plan order, which counts only if no array was bad."""
        part = self.part
        if checker.shallow:
            for manifest in manifests:
                if manifest["format_version"] > 1:
                    checker.array(manifest["prefix"], part.id, manifest["arrays"][part.id])
            return None
        total = np.full(part.stop - part.start, -0.0)
        for manifest, pieces in zip(
            manifests, partials.read_parts(place.store, place.plan, manifests, part), strict=True
        ):
            checker.attempt(f"{manifest['prefix']}/{part.id}", lambda p=pieces: partials.add(total, p))
        return total

    def _window(
        self, checker: Checker, place: Place, manifests: Sequence[Manifest] | None, total: np.ndarray | None
    ) -> np.ndarray | None:
        """Check the sum of the part, which is returned, against all partials."""
        key, found = layout.part_key(self.part.id), checker.found
        manifest = checker.attempt(key, lambda: windows.read_part_manifest(place.store, place.plan, self.part))
        if manifest is None:
            return None
        found.came_from(manifest)
        value = checker.array(manifest["prefix"], windows.SUM, manifest["arrays"][windows.SUM])
        if self.named and self.named != manifest["prefix"]:
            found.problem(key, f"{key} is not the one that {layout.WINDOW} names. {layout.remedy(key)}")
        same = manifests is not None and windows.inputs_digest(manifests, self.part) == manifest["of"]
        if manifests is not None and not same:
            text = f"{key} is the sum of other partials than those that are committed. {layout.remedy(key)}"
            found.problem(key, text)
        if value is not None and total is not None and same and value.tobytes() != total.tobytes():
            found.problem(key, f"{key} is not the sum of the committed partials. {layout.remedy(key)}")
        return value

    def _version(self, checker: Checker, place: Place, version: str, truth: np.ndarray) -> None:
        """Compare one part of a version's factors with what they should be; 0.1 rounded them to the posterior's type."""
        plan, key = place.plan, layout.version_key(version)

        def equals() -> bool:
            manifest, arrays = versions.read_version(place.store, plan, version), {}
            for factor, _, _ in overlaps(plan.places, self.part.start, self.part.stop):
                where = manifest["factors"][factor.name]
                arrays[factor.name] = place.store.read_array(where["prefix"], factor.name, where["entry"])
            found = Vector(plan.places, arrays).read(self.part.start, self.part.stop)
            old = manifest["format_version"] == 1
            wanted = truth.astype(plan.spec["dtype"]).astype(np.float64) if old else truth
            return found.tobytes() == wanted.tobytes()

        if checker.attempt(key, equals) is False:
            text = f"{key}: its factors are not the sum of the committed partials. Delete it and run the fit job again."
            checker.found.problem(key, text)
