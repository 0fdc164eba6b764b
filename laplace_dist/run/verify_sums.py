"""The part of a verification that is about sums: partials, parts, the window's sum, and posterior versions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from laplace_dist.errors import RunFailed
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run import layout, partial_manifests, readings, versions, windows
from laplace_dist.run.check_part import CheckPart
from laplace_dist.run.checks import CarryOut, CheckArrays, CheckPartials
from laplace_dist.run.combination import alone
from laplace_dist.run.findings import Checker
from laplace_dist.run.ownership import is_foreign

TOGETHER = 256  # segments, or factors of a version, that one check looks at,
TOGETHER_BYTES = 64 * 2**20  # and factors hold no more than these


class SumsCheck:
    """Checks sums from the partials upwards; each is compared with what it is the sum of, where that is there and good.

    Args:
        checker: Of the verification.
        plan: Of the run.
        keys: All objects.
        carry_out: Carries out the checks that read arrays.

    Attributes:
        manifests: Good manifests of partials by their units' ids.
        versions: Names of the whole posterior versions.
        window: The manifest of the window's sum, if it is there and good.
    """

    def __init__(self, checker: Checker, plan: Plan, keys: Collection[str], carry_out: CarryOut) -> None:
        self.checker, self.plan, self.keys, self.store = checker, plan, keys, checker.store
        self.manifests: dict[str, dict[str, Any]] = {}
        self.versions: list[str] = []
        self.window: dict[str, Any] | None = None
        self._carry_out = carry_out

    def run(self) -> None:
        """Do so."""
        if layout.WINDOW in self.keys:
            self.window = self.checker.attempt(layout.WINDOW, lambda: windows.read_window(self.store, self.plan))
        self._partials()
        self._parts(self._versions())
        self._losses()

    @property
    def dropped(self) -> bool:
        """Whether the partials were dropped, so that what is left of them counts for nobody."""
        return self.window is not None and bool(self.window.get("dropped"))

    @property
    def committed(self) -> int:
        """How many segments are committed, as good partials of all groups or in the window's sum."""
        missing = {unit.start for unit in self.plan.units if unit.id not in self.manifests}
        return len(self.plan.segments) - (0 if self.dropped else len(missing))

    def read(self) -> Iterator[tuple[Segment, str, Mapping[str, Any]]]:
        """Yield, of every segment of which it is known, the key that says it, `data_sha256` and `environment`.

        The groups of a segment agree on the data, or that was said; one of them speaks for all.
        """
        known, seen = dict(readings.of_units(self.plan, self.window or {})), set()
        for unit in self.plan.units:
            if unit.start in seen or not (unit.id in self.manifests or unit.id in known):
                continue
            seen.add(unit.start)
            if unit.id in self.manifests:
                yield unit, layout.partial_key(unit.id), self.manifests[unit.id]
            else:
                yield unit, layout.WINDOW, known[unit.id]

    def _problem(self, key: str, text: str) -> None:
        self.checker.found.problem(key, text)

    # -------------------------------------------------------------- partials

    def _partials(self) -> None:
        if self.window is not None and (
            self.dropped or not any(key.startswith(f"{layout.PARTIALS}/") for key in self.keys)
        ):
            self._gone()
            return
        planned = {layout.partial_key(unit.id): unit for unit in self.plan.units}
        present = [key for key in self.keys if re.fullmatch(rf"{layout.PARTIALS}/[^/]+\.json", key)]
        self.checker.attempt(layout.PARTIALS, lambda: self._read_partials(planned, sorted(present)))
        good = [unit for unit in self.plan.units if unit.id in self.manifests]
        self._agreement()
        checks = [CheckPartials(tuple(some)) for some in _batched(good, TOGETHER)]
        for found in self._carry_out("groups of partials", checks):
            self.checker.found.add(found)

    def _gone(self) -> None:
        """Count where the partials were made of a window that has none any more, as far as that is known."""
        for _, made in readings.of_units(self.plan, self.window):
            self.checker.found.came_from(made)
        if not self.window.get("read"):
            text = f"{layout.WINDOW} does not say where its partials were made and what was read, and they were dropped: an "
            self.checker.found.notes.append(
                (layout.WINDOW, f"{text}older version has made it. Nothing depends on that.")
            )

    def _read_partials(self, planned: Mapping[str, Segment], present: Collection[str]) -> None:
        for key, content in self.store.read_many(present):
            if key not in planned:
                self._unplanned(key, content)
                continue
            unit = planned[key]
            found = self.checker.attempt(
                key, lambda c=content, u=unit: partial_manifests.parse_manifest(c, self.plan, u)
            )
            if found is not None:
                self.manifests[unit.id] = found
                self.checker.found.came_from(found)

    def _agreement(self) -> None:
        """Look whether the module groups of every segment are of the same data, and the weights of all those of the plan."""
        there = [self.manifests[unit.id] for unit in self.plan.units if unit.id in self.manifests]
        try:
            partial_manifests.check_agreement(self.plan, there if len(self.plan.groups) > 1 else [])
            if (whole := self._all) is not None:
                windows.check_weight(self.plan, partial_manifests.of_first_group(self.plan, whole))
        except RunFailed as error:
            self._problem("partials", str(error))

    def _unplanned(self, key: str, content: bytes) -> None:
        """Note a manifest of no segment of the plan: one of another run does no harm, and is all the same in the way."""
        if self.checker.attempt(key, lambda: is_foreign(content, key, self.plan)):
            text = f"{key} is of another run, which was deleted (--fresh). Delete it."
            self.checker.found.notes.append((key, text))
        else:
            self._problem(key, f"{key} is of no segment of this plan. Delete it.")

    @property
    def _all(self) -> list[dict[str, Any]] | None:
        """The manifests in plan order if all are there and good."""
        ordered = [self.manifests[unit.id] for unit in self.plan.units if unit.id in self.manifests]
        return ordered if len(ordered) == len(self.plan.units) else None

    # -------------------------------------------------------------- versions, parts, window

    def _versions(self) -> dict[str, bool]:
        """Check every posterior version alone; return the names of the good ones, each with whether 0.1 wrote it."""
        found, checks = {}, []
        for key in sorted(self.keys):
            if not re.fullmatch(rf"{layout.POSTERIORS}/[^/]+\.json", key):
                continue
            version = key.removeprefix(f"{layout.POSTERIORS}/").removesuffix(".json")
            manifest = self.checker.attempt(key, lambda v=version: versions.read_version(self.store, self.plan, v))
            if manifest is not None:
                found[version] = manifest["format_version"] == 1
                arrays = [(place["prefix"], name, place["entry"]) for name, place in manifest["factors"].items()]
                checks += [(version, CheckArrays(key, tuple(some))) for some in _by_size(arrays)]
        results = self._carry_out("groups of factors", [check for _, check in checks])
        for (version, _), result in zip(checks, results, strict=True):
            self.checker.found.add(result)
            if result.problems:
                found.pop(version, None)
        self.versions = list(found)
        return found

    def _parts(self, found: Mapping[str, bool]) -> None:
        """Check the parts of everything, given the versions that are good."""
        current = None if self.window is None else versions.version_of(alone(self.store, self.plan, self.window))
        compared = tuple((version, old) for version, old in found.items() if old or version == current)
        without = frozenset(self.plan.units_by_id) - self.manifests.keys()
        named = {} if self.window is None else self.window["parts"]
        checks = [
            CheckPart(
                part, without, layout.part_key(part.id) in self.keys, named.get(part.id, {}).get("prefix"), compared
            )
            for part in self.plan.parts
        ]
        for result in self._carry_out("parts", checks):
            self.checker.found.add(result)

    def _losses(self) -> None:
        if self.window is None:
            used = self.plan.format_version > 1 and (self.versions or layout.CURRENT in self.keys)
            if used and self.checker.missing(layout.WINDOW):
                text = f"{layout.WINDOW} is missing, though its posterior is there. Run the fit job again: it writes it anew."
                self._problem(layout.WINDOW, text)
            return
        if self._all is not None and not self.checker.shallow:
            total = windows.total_loss(self.store, partial_manifests.of_first_group(self.plan, self._all))
            known = readings.readings(self.plan, self._all)
            wrong = "its loss is not the sum of the partials'" if total != self.window["loss"] else None
            if self.window.get("read") and {name: self.window.get(name) for name in known} != known:
                wrong = "it does not say of its partials what they say"
            if wrong:
                self._problem(layout.WINDOW, f"{layout.WINDOW}: {wrong}. {layout.remedy(layout.WINDOW)}")
        for part in self.plan.parts:
            if self.checker.missing(layout.part_key(part.id)):
                key = layout.part_key(part.id)
                self._problem(key, f"{key} is missing, and {layout.WINDOW} names it. {layout.remedy(key)}")


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield consecutive items, so many at a time."""
    yield from (items[start : start + size] for start in range(0, len(items), size))


def _by_size(
    arrays: Iterable[tuple[str, str, Mapping[str, Any]]],
) -> Iterator[list[tuple[str, str, Mapping[str, Any]]]]:
    """Yield arrays, a large one alone and small ones together."""
    group, held = [], 0
    for array in arrays:
        if group and (held + array[2]["stored_bytes"] > TOGETHER_BYTES or len(group) == TOGETHER):
            yield group
            group, held = [], 0
        group.append(array)
        held += array[2]["stored_bytes"]
    if group:
        yield group
