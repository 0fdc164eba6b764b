"""One seed, one schedule of whole runs: who takes part, what goes wrong, and what must hold all the same."""

from __future__ import annotations

import contextlib
import io
import uuid
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

from simulated_runs import TWO_PASSES, MiniatureJob, SerialPool, Worker, kind_of, load, serial

from laplace_dist.errors import (
    CheckpointError,
    ForeignError,
    MissingObjectError,
    RunFailed,
    SettingsError,
    StorageError,
)
from laplace_dist.run import layout, ownership
from laplace_dist.run.leases import GONE
from laplace_dist.run.verify import Report, check_run
from laplace_dist.testing.schedule import Actor, Crash, Schedule
from laplace_dist.testing.simulated_store import FAULTS, Objects, SimulatedStore
from laplace_dist.testing.simulated_workers import ActorPool

RATES = (0.0, 0.0005, 0.002, 0.006)  # of each fault, at each operation
COMMANDS = 5  # how often somebody runs the command of a driver that has failed


@dataclass
class Outcome:
    """What a schedule came to.

    Attributes:
        seed: Of the schedule.
        failures: What must not be.
        fired: How often each fault fired, and how drivers and readers fared.
        steps: How many there were.
        trace: All of them.
    """

    seed: int
    failures: list[str]
    fired: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    trace: list[str] = field(default_factory=list)


class Simulation:
    """The actors of one schedule, and what they have in common.

    Args:
        seed: Of everything.
    """

    def __init__(self, seed: int) -> None:
        self.schedule = Schedule(seed)
        self.random = self.schedule.random
        self.objects = Objects(lambda: self.schedule.now)
        self.faults = {fault: self.random.choice(RATES) for fault in FAULTS}
        self.hung = self.random.choice([0.0, 0.0, 0.02])
        self.deleting = False  # whether any driver says --fresh
        self.at_work: dict[str, MiniatureJob] = {}

    def client(self, actor: Actor | None = None, job: str = "") -> SimulatedStore:
        """Return a client; only those of jobs meet faults."""
        return SimulatedStore(self.objects, actor, self.faults if job else None, job)

    def run(self) -> None:
        """Let everybody go, then bring the run that is left to its end and look at it."""
        start, draw = self.schedule.start, self.random.random
        own = self.random.choice([0, 0, TWO_PASSES])
        start("A", lambda actor: self.driver(actor, own))
        if draw() < 0.5:
            start("B", lambda actor: self.driver(actor, own))
        if draw() < 0.5:
            self.deleting, kind = True, self.random.choice([0, 1, 1, TWO_PASSES])
            start("F", lambda actor: self.driver(actor, kind, self.random.randrange(2, 250)))
        if draw() < 0.4:
            start("collector", self.collector)
        if draw() < 0.6:
            start("reader", self.reader)
        self.schedule.run()
        if not self.schedule.failures:
            self.finish()

    # -------------------------------------------------------------- who takes part

    def driver(self, actor: Actor, kind: int, fresh_after: int = 0) -> None:
        """Run a command, and run it again when it has failed."""
        for _ in range(fresh_after):
            actor.step("is not there yet", yields=True)
        fresh = fresh_after > 0
        for _ in range(COMMANDS):
            try:
                self.command(actor, kind, fresh)
                return
            except Crash:
                actor.dead = False  # a new process
                self.note("driver: crashed")
            except StorageError:
                self.note("driver: stopped by the storage")
            except RunFailed:
                self.note("driver: gave up a task")
            except SettingsError as error:
                self.note("driver: stopped for another run")
                if not self.deleting:
                    self.schedule.fail(f"{actor.name} was refused: {error}")
                if "another plan" in str(error) or not fresh:
                    return
            except CheckpointError as error:
                self.note(f"driver: {type(error).__name__}")
                if not self.deleting:
                    self.schedule.fail(f"{actor.name} met {error!r}")

    def command(self, actor: Actor, kind: int, fresh: bool) -> None:
        random = self.random
        size = random.choice([1, 2, 3])
        name = f"{random.getrandbits(128):032x}"
        job = MiniatureJob(
            self.client(actor, name),
            lambda: ActorPool(actor, size, lambda worker: Worker(self.client(worker, name)), self.hung),
            lambda: self.schedule.now,
            kind,
            name,
            fresh,
        )
        self.at_work[name] = job
        try:
            version = job.whole()
        finally:
            del self.at_work[name]
        self.note("driver: finished")
        self.finished(actor, job, version)

    def finished(self, actor: Actor, job: MiniatureJob, version: str) -> None:
        """Compare what a driver leaves behind with the serial sum, unless the run is another one by now."""
        still = self.client()
        if not still.exists(layout.PLAN) or ownership.read_plan(still).digest != job.plan.digest:
            return
        try:
            found = load(still)[1]
        except (ForeignError, MissingObjectError):
            if not self.deleting:
                raise
            self.note("finished, and a deleted run's pointer came after it")
            return
        if found != serial(job.kind):
            self.schedule.fail(f"{actor.name} has finished, and the sum is not the serial one")

    def reader(self, actor: Actor) -> None:
        """Load the posterior again and again: nothing, or exactly the sum of the plan."""
        store = self.client(actor)
        for _ in range(self.random.randrange(5, 40)):
            actor.step("looks", yields=True)
            try:
                plan, found = load(store)
            except (MissingObjectError, ForeignError) as error:
                begins = isinstance(error, MissingObjectError) and any(
                    k in str(error) for k in (layout.PLAN, layout.CURRENT)
                )
                if not begins and not self.deleting:
                    self.schedule.fail(f"a reader met {error!r}")
                self.note("reader: nothing yet" if begins else f"reader: {type(error).__name__}")
                continue
            self.note("reader: the sum")
            if found != serial(kind_of(plan)):
                self.schedule.fail("a reader saw what is no serial sum")

    def collector(self, actor: Actor) -> None:
        """Collect whatever looks like an orphan, however young."""
        store = self.client(actor)
        store.delete_tree = lambda prefix: self.collect(store, prefix)
        for _ in range(self.random.randrange(2, 8)):
            for _ in range(self.random.randrange(5, 60)):
                actor.step("rests", yields=True)
            try:
                collected = check_run(store, 0.0, now=store.now).collected
            except SettingsError:  # no run yet
                continue
            self.schedule.fired["collector: collected"] += len(collected)

    def collect(self, store: SimulatedStore, prefix: str) -> None:
        """Delete an orphan; what a job has written that is at work, on the run that is there, is none."""
        plan = ownership.read_plan(self.client()).digest if self.client().exists(layout.PLAN) else None
        for key in self.objects.under(prefix):
            job = self.at_work.get(self.objects.writers.get(key, ""))
            if job and job.at_work_on == plan and self.schedule.now - job.session.lease._shown < 3600 * GONE:
                self.schedule.fail(f"{prefix} is collected, and the job that wrote it is at work")
        SimulatedStore.delete_tree(store, prefix)

    def note(self, what: str) -> None:
        self.schedule.fired[what] += 1

    # -------------------------------------------------------------- the end

    def finish(self) -> None:
        """Run the command of the run that is left, undisturbed: all is whole, and what is left over can be collected."""
        store = self.client()
        there = store.exists(layout.PLAN)
        kind = kind_of(ownership.read_plan(store)) if there else 0
        arguments = store, lambda: SerialPool(store), lambda: self.schedule.now, kind, "f" * 32
        said: list[str] = []
        MiniatureJob(*arguments, say=said.append).whole()
        self.schedule.fired["end: lines about partials of a deleted run"] += len(said)
        self.schedule.now += 2 * 86400
        collected = self.check(kind, 1.0).collected
        left = self.check(kind).orphans
        if left:
            self.schedule.failures.append(f"left after collecting {collected}: {left}")
        before = dict(self.objects.data)
        MiniatureJob(*arguments).whole()
        changed = {
            key for key in before.keys() | self.objects.data.keys() if before.get(key) != self.objects.data.get(key)
        }
        if changed:
            self.schedule.failures.append(f"running a finished job again changed {sorted(changed)}")

    def check(self, kind: int, collect: float | None = None) -> Report:
        """Look at the numbers and at every object."""
        store = self.client()
        if load(store)[1] != serial(kind):
            self.schedule.failures.append("the sum is not the serial one")
        report = check_run(store, collect, now=store.now)
        self.schedule.failures += [f"verify: {key}: {text}" for key, text in report.problems]
        return report


def simulate(seed: int) -> Outcome:
    """Carry out the schedule of a seed."""
    simulation = Simulation(seed)
    schedule = simulation.schedule

    def drawn() -> uuid.UUID:
        return uuid.UUID(int=schedule.random.getrandbits(128))

    with mock.patch("uuid.uuid4", drawn), contextlib.redirect_stdout(io.StringIO()):
        try:
            simulation.run()
        except Exception as error:  # of the undisturbed end
            schedule.failures.append(f"the end: {error!r}")
    return Outcome(seed, schedule.failures, schedule.fired, schedule.steps, schedule.trace)
