"""Check every object of a run, name what is wrong one by one, and collect what no manifest names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from laplace_dist.errors import SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, leases, orphans, ownership, settings_file
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.checks import CarryOut, Check, CheckData, CheckFollowOns, Place
from laplace_dist.run.coverage import check_coverage
from laplace_dist.run.findings import Checker, Findings
from laplace_dist.run.probe import open_probe
from laplace_dist.run.run_weights import check_run_weights
from laplace_dist.run.verify_pointers import check_pointers
from laplace_dist.run.verify_sums import SumsCheck
from laplace_dist.run.verify_training import check_training
from laplace_dist.run.verify_windows import check_windows
from laplace_dist.storage.local import TEMP


@dataclass
class Report(Findings):
    """What was found of a run, beside what is wrong with it.

    Attributes:
        url: Of the run.
        objects: Number of objects in it.
        committed: Committed segments.
        segments: Planned segments.
        versions: Whole posterior versions.
        orphans: Hours since the last write, by attempt directory or temporary file that no manifest names.
        collected: Those of them that were deleted.
    """

    url: str = ""
    objects: int = 0
    committed: int = 0
    segments: int = 0
    versions: list[str] = field(default_factory=list)
    orphans: dict[str, float] = field(default_factory=dict)
    collected: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every object that the run has is whole; a run may be whole and still unfinished."""
        return not self.problems


def check_run(
    store: Checkpoint,
    collect_orphans_older_than: float | None = None,
    *,
    shallow: bool = False,
    data: Any = None,
    now: Callable[[], datetime] = orphans.wall_clock,
    pool: CarryOut | None = None,
) -> Report:
    """Read and check a whole run: plan, weights, manifests, arrays, sums, posterior versions, tuning, evaluation.

    Every number is read and compared with its digests; where all partials are there, they are summed again and
    compared with the window's sum, and that with the posterior version, bit for bit. Nothing is repaired. Where something is
    bad and objects were deleted meanwhile, as a recalibration does beside this, the run is checked again.

    Args:
        store: The checkpoint.
        collect_orphans_older_than: Delete attempts that no manifest names and that were last written more than so
            many hours ago, and before every job began that is at work: what it will name is not named yet.
        shallow: Check manifests, and that the arrays that they name are there, without reading them.
        data: Every segment's data are read again and compared with the digest of what was read when it was computed: the
            training split of the first window, as a map-style data set, a mapping from windows to theirs, or what opens the
            split of a window by its name, as its own settings name it. With a pool True: it opens its own.
        now: The clock that ages are counted from.
        pool: Carries out the checks that read arrays and data; the report is the same. This process does, if not given.

    Raises:
        SettingsError: The URL cannot be read, holds no run, or holds one of a newer version.
        StorageError: The storage does not answer.
    """
    for left in reversed(range(TIMES)):
        if not store.exists(layout.PLAN):
            raise SettingsError(f"--checkpoint: got {store.url!r}, where there is no run (no {layout.PLAN})")
        times = store.modified()  # before any manifest is read: what is committed after this is not taken for an orphan
        keys = [key for key in times if TEMP not in key]
        report = Report(url=store.url, objects=len(keys))
        checker = Checker(store, report, keys, shallow=shallow)
        plan = checker.attempt(layout.PLAN, lambda: ownership.read_plan(store))
        if plan is not None:
            _Run(checker, report, plan, keys).check(data, pool)
        if not (report.problems and left and _were_deleted(store, keys)):
            break
    _collect(store, report, times, collect_orphans_older_than, plan, now())
    return report


def _were_deleted(store: Checkpoint, keys: Iterable[str]) -> bool:
    """Say whether objects of a run that were listed are gone: a job drops partials or collects versions beside this."""
    lasting = {key for key in keys if layout.owned(key) and not key.startswith(_SIGNS)}
    return not lasting <= set(store.list())


_OF_VERSIONS = (layout.DECOMPOSITIONS, layout.TUNINGS, layout.EVALUATIONS)
_SIGNS = (f"{layout.JOBS}/", f"{layout.STATUS}/")  # of life, which come and go
TIMES = 3  # that a run is checked at most, where something is bad and a job beside this has deleted objects meanwhile
MARGIN = 0.1  # hours by which this machine's clock and the storage's may differ
TOGETHER = 64  # manifests of tuning and evaluation that one check looks at


class _Run:
    """The verification of a run whose plan can be read: the order of the checks, and which objects belong together."""

    def __init__(self, checker: Checker, report: Report, plan: Plan, keys: list[str]) -> None:
        self.checker, self.report, self.plan, self.keys, self.store = checker, report, plan, keys, checker.store

    def check(self, data: Any, pool: CarryOut | None) -> None:
        self._check_small_objects()
        plan, carry_out = self.plan, pool or self._here
        self._place = Place(self.store, plan, self._opener(data), self.checker.keys, self.checker.shallow)
        sums = SumsCheck(self.checker, plan, self.keys, carry_out)
        self._place = replace(self._place, manifests=sums.manifests)
        sums.run()
        self.report.segments, self.report.committed = len(plan.segments), sums.committed
        self.report.versions = sums.versions
        follows = [key for key in self.keys if self._follows(key) and self._of_this_run(key)]
        some = [tuple(follows[start : start + TOGETHER]) for start in range(0, len(follows), TOGETHER)]
        self._add(carry_out("tunings and evaluations", [CheckFollowOns(keys) for keys in some]))
        there = check_windows(self.checker, plan, self.keys, self.report.versions, sums)
        check_training(self.checker, plan)
        check_pointers(self.checker, plan, self.report.versions, sums)
        if data is not None:
            checks = [check for name in there for check in self._comparisons(data, name, *there[name])]
            self._add(carry_out("segments compared with the data", checks))

    def _check_small_objects(self) -> None:
        """Check what the run was begun with, weights, settings and probe, and what is said of it."""
        store, plan, keys, attempt = self.store, self.plan, self.checker.keys, self.checker.attempt
        begun = any(key.startswith(f"{layout.PARTIALS}/") for key in keys)
        stored = layout.WEIGHTS_INDEX if layout.WEIGHTS_INDEX in keys else layout.WEIGHTS
        if stored in keys or begun:
            attempt(stored, lambda: check_run_weights(store, plan.weights, stored))
        if layout.CONFIG in keys or begun:
            attempt(layout.CONFIG, lambda: settings_file.read_config(store))
        if plan.probe is not None:
            key = layout.probe_key(plan.probe)
            attempt(key, lambda: open_probe(store.read(key), plan.probe, key))
        if layout.COVERAGE in keys:
            attempt(layout.COVERAGE, lambda: check_coverage(store))
        for key in (key for key in keys if key.startswith((f"{layout.STATUS}/", "report/spectra-"))):
            attempt(key, lambda key=key: open_json(store.read(key), key))

    def _opener(self, data: Any) -> Callable[[str], Any]:
        """Return what opens the training split of a window."""
        if callable(data):
            return data
        return data.__getitem__ if isinstance(data, Mapping) else lambda _: data

    def _comparisons(self, data: Any, name: str, prefix: str, sums: SumsCheck) -> Iterator[CheckData]:
        """Yield the comparisons of a window with its data, or note why there are none."""
        first, place = name == self.plan.window_name, f"{layout.WINDOWS}/{name}"
        own = f"{place}/{layout.CONFIG}"
        if isinstance(data, Mapping):
            why = None if name in data else "none were given"
        elif data is True or callable(data):
            why = None if first or own in self.checker.keys else f"{own} is not there, which would say which they are"
        else:
            why = None if first else "only those of the first window were given"
        if why is not None:
            self.report.notes.append((place, f"the data of window {name} were not compared: {why}."))
            return
        known = [(segment, prefix + key, read) for segment, key, read in sums.read() if read.get("data_sha256")]
        weights = (sums.plan.data.get("weights") or {}).get("name")
        for segment, key, read in known:
            yield CheckData(name, segment, key, read["data_sha256"], read["environment"]["node"], weights)
        if unknown := (0 if sums.window is None else len(sums.plan.segments)) - len(known):
            text = (
                f"the data of {unknown} segment(s) of window {name} were not compared: an older version has read them,"
            )
            self.report.notes.append((place, f"{text} which did not keep what it had read."))

    def _here(self, _: str, checks: Sequence[Check]) -> Iterator[Findings]:
        """Carry out checks in this process, one after the other."""
        return (self._place.find(check) for check in checks)

    def _add(self, results: Iterable[Findings]) -> None:
        for found in results:
            self.report.add(found)

    def _follows(self, key: str) -> bool:
        """Say whether an object is a manifest of a decomposition, a tuning or an evaluation, or of one of their shards."""
        within = key.startswith(tuple(f"{folder}/" for folder in _OF_VERSIONS))
        return within and bool(layout.MANIFEST.fullmatch(key)) and key != layout.METRICS

    def _of_this_run(self, key: str) -> bool:
        """Say whether the version is there that an object of tuning or evaluation is about, and note it if not."""
        version = layout.version_key(key.split("/")[1][:16])
        if version not in self.checker.foreign and not self.checker.missing(version):
            return True
        text = f"{key} is about {version}, which this run does not have. A job that is deleted while it is at work (--fresh)"
        self.report.notes.append((key, f"{text} may leave that; delete it."))
        return False


def _collect(
    store: Checkpoint,
    report: Report,
    times: Mapping[str, datetime],
    older_than: float | None,
    plan: Plan | None,
    now: datetime,
) -> None:
    """Find what no manifest names, and delete what is old enough unless a manifest cannot be read."""
    report.orphans, readable = orphans.find(store, times, plan, now)
    if older_than is None:
        return
    if not readable or any(layout.MANIFEST.fullmatch(key) for key, _ in report.problems):
        report.problem(
            "orphans", "nothing was collected: what looks like an orphan may belong to a manifest that is bad"
        )
        return
    protected = leases.hours_at_work(store, times)
    for place, age in report.orphans.items():
        if age >= older_than and (protected is None or age > protected + MARGIN):
            store.delete_tree(place)
            report.collected.append(place)
