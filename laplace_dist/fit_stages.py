"""The stages of a fit, and what every job has: settings, the checkpoint, a session of workers, the record of what it does."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from laplace_dist.config import compatibility
from laplace_dist.config.absolute import absolute
from laplace_dist.config.given import check_given
from laplace_dist.config.settings import Config
from laplace_dist.errors import CheckpointError, MissingObjectError, OutOfMemory, RunFailed, SettingsError
from laplace_dist.execution.session import ExecutorType, Session
from laplace_dist.execution.tasks import Task
from laplace_dist.plan.groups import plan_groups
from laplace_dist.plan.plan import Plan, same_sums
from laplace_dist.plan.worker_memory import expected_bytes
from laplace_dist.report.html.subject import is_up_to_date
from laplace_dist.report.html.task import WriteReport
from laplace_dist.report.planned import weights_line
from laplace_dist.report.progress import Progress
from laplace_dist.run import bases, coverage, layout, lifecycle, ownership, place, pointer, versions, windows
from laplace_dist.run.checkpoint import open_store
from laplace_dist.run.combination import Term, Window, alone, terms_of
from laplace_dist.run.journal import Journal
from laplace_dist.run.partial_manifests import manifests
from laplace_dist.run.second_pass import open_second, place_of_second
from laplace_dist.stages import basis, follow_on, map, opening, reduce, resolving
from laplace_dist.stages.batch_memory import batch_bytes
from laplace_dist.stages.context import plain
from laplace_dist.stages.smaller import as_halved, one_example, smaller
from laplace_dist.storage.store import Store

_LATER = (  # than the first partial
    *(layout.PARTS, layout.WINDOWS, layout.POSTERIORS, layout.PASSES),
    *(layout.TUNINGS, layout.EVALUATIONS, layout.RECALIBRATIONS),
)


@dataclass
class FitStages:
    """A job over one checkpoint, and the stages of a fit. A stage asks the store what is done and submits tasks for the rest.

    Nothing here holds a factor: tasks return small receipts, and Ray is joined when the first task is submitted.

    Attributes:
        given: The settings as given; relative paths are made absolute, since workers may have another directory.
        executor: Where the tasks are carried out, such as `Inline`; what `--ray-address` says if not given.
        kind: `fit`, `tune`, `evaluate` or `recalibrate`.
        say: Where lines for people go; to the logger `laplace_dist` if not given.
    """

    given: Config
    executor: ExecutorType | None = None
    kind: str = "fit"
    say: Callable[[str], None] = logging.getLogger("laplace_dist").info
    _continued: bool = field(default=False, init=False)
    _checked: bool = field(default=False, init=False)
    _loaded: dict[str, Any] = field(default_factory=dict, init=False)
    _prints: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_given(self.given, self.executor)
        self.config = absolute(self.given)
        self.store: Store = open_store(self.config)
        self.journal = Journal(self.store, self.kind, self.config.window)
        self.session = Session(
            self.config, self.store, self.executor, lambda text: self.say(text), journal=self.journal
        )

    @cached_property
    def device_type(self) -> str:
        """Where the workers compute, `cpu` or `cuda`: as the settings say, else as the run has begun, else as there are."""
        if self.config.device != "auto":
            return self.config.device
        if self.store.exists(layout.PLAN) and not self.config.fresh:
            return self.plan.settings["device_type"]
        return self.session.executor.device_type()

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run at the checkpoint."""
        return ownership.read_plan(self.store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        self.journal.end(error)
        self.session.close()
        if error is not None and self.journal.has_begun:
            place = shlex.quote(self.store.url)
            self.say(f"report: not made by this job; python jobs/report.py {place} shows what there is")

    def current_version(self) -> str:
        """Return the posterior version that a follow-on job works on.

        What was not given is the run's; the likelihood has to be given as it was for the fit, since what the scores of the data
        mean depends on it.

        Raises:
            SettingsError: The run has none yet, was fitted with other settings or weights, or cannot be written to.
        """
        try:
            version = pointer.read_current(self.store)["version"]
        except MissingObjectError as error:
            ownership.refuse_no_run(self.store)
            raise SettingsError(f"--checkpoint: got {self.given.checkpoint!r}; {error}") from error
        follow_on.refuse_other_settings(self.config, self.store, self.plan, self.kind)
        self.config = self.config.model_copy(update={"hessian_structure": self.plan.settings.get("hessian_structure")})
        self.store.check_writable()
        return version

    # -------------------------------------------------------------- the stages of fit

    def open(self) -> None:
        """Resolve model, data and factors once, and start the run or continue the one that is there."""
        compatibility.check_predictive(self.config)
        place.check_place(self.store)
        there = self.store.exists(layout.PLAN) and not self.config.fresh
        resolved = resolving.resolve(self.config, self.plan.settings if there else None)
        self.config = config = resolved.config
        self._checked = True
        self.store.check_writable()  # before a cluster may be asked for its devices
        if there:
            self.config = config = as_halved(config, self.plan)
        else:
            self.session.executor.admit(self.device_type)
        how = {
            "module_groups": self._groups(resolved, self.plan if there else None),
            "halved_from": None if config.batch_size == self.given.batch_size else self.given.batch_size,
        }
        self.plan, self._continued = opening.begin(resolved, config, self.store, self.device_type, self.say, **how)
        held = resolved.model_bytes + batch_bytes(config, resolved, self.device_type)
        self.session.expected = expected_bytes(self.plan.spec, len(self.plan.groups), held)
        self.window = Window(self.store, self.plan)
        self.say(f"{'continuing' if self._continued else 'starting'} the run at {self.store.url}")
        self.say(f"estimator: {resolved.cost}")
        self.say_weights()
        if not self._continued:
            rows = coverage.rows_of(resolved.la.sums_spec(), resolved.model)
            there = coverage.write_coverage(self.store, rows)
            self.say("\n".join([*coverage.lines(rows), f"coverage: every parameter is in {there}"]))

    def say_weights(self) -> None:
        """Say how much the examples of the window count, where they have weights."""
        plan = self.window.plan
        if "weights" in plan.data:
            self.say(f"example weights: {weights_line(plan.n_examples, plan.data['weights'])}")

    def _groups(self, resolved: resolving.Resolved, stored: Plan | None) -> int:
        """Return the number of module groups; refuse sums that no worker has the memory for, before the run is begun.

        A run that is there goes on with its own: its partials are divided so, and another number would leave them unused.
        """
        spec, wanted = plain(resolved.la.sums_spec()), self.config.module_groups
        if stored is not None:
            there = len(stored.groups)
            if wanted is not None and same_sums(spec, stored.spec) and len(plan_groups(spec, wanted)) != there:
                raise SettingsError(
                    f"--module-groups: got {wanted}, but the run at {self.store.url!r} is divided into {there}, and so are its "
                    "partials. The result is the same, bit for bit: leave it out to go on, or begin anew with --fresh."
                )
            return there
        return resolving.module_groups(self.config, resolved, self.session.executor.memory(self.device_type), self.say)

    def map(self) -> None:
        """Accumulate the segments of the window that have no committed partial, in the first pass over its data.

        Nothing of a window whose sum is committed and whose partials a recalibration has dropped.
        """
        while not windows.is_dropped(self.window.store, self.window.plan):
            try:
                self._map(self.window, "segments")
                return
            except OutOfMemory as error:
                self._begin_smaller(error)

    def _begin_smaller(self, error: OutOfMemory) -> None:
        """Begin the run again with what takes less memory, if nothing of it is committed; else raise the error."""
        first = self.window.store is self.store and not self.store.list(layout.PARTIALS, recursive=False)
        first = first and not any(self.store.list(folder) for folder in _LATER)
        less = smaller(self.given, self.plan, error) if first else None
        if less is None:
            at_one = first and not error.of_sums and self.plan.settings["batch_size"] == 1
            raise (
                one_example(error, self.session.expected, self.session.executor.memory(self.device_type))
                if at_one
                else error
            )
        (name, value), size = next(iter(less.items())), self.plan.settings["batch_size"]
        what = "the sums" if error.of_sums else f"a batch of {size}"
        self.say(f"map: {error}")
        self.say(
            f"map: no worker has the memory for {what}, and nothing is committed yet: the run begins again with "
            f"--{name.replace('_', '-')} {value}, which its plan records"
        )
        self.session.end_workers()
        self.config = self.config.model_copy(update={**less, "fresh": True})
        self.open()
        self.config = self.config.model_copy(update={"fresh": False})

    def _map(self, window: Window, unit: str) -> None:
        store, plan = window.store, window.plan
        done = lifecycle.committed(store, plan, arrays=False, say=lambda text: self.say(f"map: {text}"))
        if self._continued and len(done) < len(plan.units):
            comparisons = map.comparisons(plan, done)
            self._run(comparisons, Progress("map", "segments compared with the data", len(comparisons)))
        unit += f" in {len(plan.groups)} module groups" if len(plan.groups) > 1 else ""
        self._run(map.tasks(plan, done), Progress("map", unit, len(plan.units), len(done)))

    def reduce(self) -> str:
        """Sum the partials to a posterior version, if that is not done yet, and make it current."""
        if (done := pointer.version_of_0_1(self.store, self.plan)) is not None:
            return done
        version = self.combine(terms_of([(self.sum_window(), 1.0)]))
        pointer.write_current(self.store, self.plan, version, None, first=True)
        current = pointer.read_current(self.store)
        if current.get("history"):
            self.say(
                f"reduce: version {current['version']} is current, which a recalibration has promoted, and stays so"
            )
            return current["version"]
        tuned = current["tuning"] is None or ownership.has(self.store, self.plan, current["tuning"])
        if current["version"] != version or not tuned:
            pointer.write_current(self.store, self.plan, version, None)
        return version

    def is_recalibrated(self) -> bool:
        """Whether what is current is so by a promotion or a rollback, and not by the fit alone."""
        return bool(pointer.read_current(self.store).get("history"))

    def sum_window(self) -> Window:
        """Commit the window's sum; of structures that take two passes over the data, do the second one and commit its sum.

        Windows after the first take the basis that the first one's sum gave, so that their sums add, and no first pass.
        """
        if self.plan.further is None:
            self._sum(self.window)
            return self.window
        first = self.window.store is self.store
        found = self.find_basis(self._sum(self.window)) if first else self._known_basis()
        place = place_of_second(self.window.store, self.window.plan)
        second = Window(place, open_second(place, self.window.plan, bases.digest_of(found)))
        if windows.find_window(second.store, second.plan) is None:
            self._map(second, "segments, second pass")
            self._sum(second)
        return self.window

    def find_basis(self, of: Mapping[str, Any]) -> dict[str, Any]:
        """Commit the basis of the second pass, if that is not done yet; returns its manifest.

        Args:
            of: Manifest of the first window's sum.
        """
        if not ownership.has(self.store, self.plan, layout.basis_key(self.plan.further["name"])):
            tasks = basis.tasks(self.plan)
            receipts = self._run(tasks, Progress("basis", "groups of arrays", len(tasks)), keep=True, alike=False)
            (term,) = alone(self.store, self.plan, of)
            bases.commit_basis(self.store, self.plan, term.digest, [receipt["factors"] for receipt in receipts])
        return bases.read_manifest(self.store, self.plan)

    def _known_basis(self) -> dict[str, Any]:
        """Return the manifest of the run's basis, which its fit has committed."""
        try:
            return bases.read_manifest(self.store, self.plan)
        except MissingObjectError as error:
            raise SettingsError(f"--checkpoint: the fit at {self.store.url!r} is not finished ({error})") from error

    def _sum(self, window: Window) -> dict[str, Any]:
        """Sum the parts of a window that are not summed yet and commit its sum; returns its manifest."""
        store, plan = window.store, window.plan
        if (done := windows.find_window(store, plan)) is not None:
            return done
        committed = list(manifests(store, plan))
        tasks = reduce.part_tasks(store, plan, committed)
        self._run(tasks, Progress("reduce", "parts", len(plan.parts), len(plan.parts) - len(tasks)))
        return windows.commit_window(store, plan, committed)

    def combine(self, terms: Sequence[Term]) -> str:
        """Commit the posterior version that windows make, if that is not done yet; returns its name."""
        version = versions.version_of(terms)
        if not ownership.has(self.store, self.plan, layout.version_key(version)):
            tasks = reduce.factor_tasks(self.plan, terms)
            receipts = self._run(tasks, Progress("reduce", "groups of factors", len(tasks)), keep=True, alike=False)
            versions.commit_version(self.store, self.plan, terms, [receipt["factors"] for receipt in receipts])
        return version

    def report(self, evaluation: str | None = None) -> str | None:
        """Write the page that shows the run, unless the settings say not to, and return where it is.

        Args:
            evaluation: Key of the evaluation that it shows; the latest if not given.
        """
        if self.config.skip_report:
            return None
        place = f"{self.store.url.rstrip('/')}/{layout.REPORT}"
        if self.session.pool is None and is_up_to_date(self.store, evaluation):
            return place
        self.journal.write("done")  # but for the page, which shows the record
        try:
            self._run([WriteReport(self.plan.digest, evaluation)], Progress("report", "pages", 1))
        except (RunFailed, CheckpointError, SettingsError) as error:  # which is no reason to call the job a failure
            self.say(f"report: not written ({error}). Everything else is done; jobs/report.py makes it again.")
            return None
        return place

    def _run(self, tasks: Iterable[Task], progress: Progress, **how: bool) -> list[Mapping[str, Any]]:
        """Carry out the tasks of a stage; see `Session.run`."""
        return self.session.run(tasks, self.device_type, progress, run=self.plan.digest, **how)
