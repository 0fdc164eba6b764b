"""The Ray actors that carry out tasks: started, given one task at a time, dropped when anything goes wrong with them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.execution.counters import Counters
from laplace_dist.execution.failures import (
    REMEDY,
    STARTS_PER_NODE,
    STARTS_WITHOUT_MEMORY,
    Verdict,
    event_of,
    verdict,
    why_it_failed,
)
from laplace_dist.execution.flights import Committing, Flight, Hired
from laplace_dist.execution.liveness import SECOND_LOOK, Deaths, short_of_memory, why_it_died
from laplace_dist.execution.raised import Raised
from laplace_dist.execution.scaling import Placement
from laplace_dist.execution.starts import RESTS, Starts
from laplace_dist.execution.tasks import Answer, Event, Task
from laplace_dist.execution.timeouts import Limit
from laplace_dist.execution.worker import Worker, import_path

HINT_SECONDS = 30.0  # between two lines that say what is waited for
# A worker without a task for so long is ended where an autoscaler may give its node back: longer than a driver works between
# two stages, and short beside what a node costs. Another one starts within ten seconds.
SPARE_SECONDS = 120.0
FIRST_HINT_SECONDS = 15.0  # before the first one: workers come to life within ten


class Pool:
    """Driver-owned actors, one call in flight each; a lost one is replaced, never restarted by Ray.

    A worker whose task is computed and being committed takes the next one; where there is none, it is asked to finish.

    Args:
        config: The job's settings, handed to every worker.
        placement: Says on which node the next worker is started.
        say: Where lines for people go.
        answers: Says whether something listens at `host:port`, as a node does that lives; for tests.
        counters: Hear of everything that happens.
    """

    def __init__(
        self,
        config: Config,
        placement: Placement,
        say: Callable[[str], None] = print,
        answers: Callable[[str], bool] | None = None,
        counters: Counters | None = None,
    ) -> None:
        import ray

        self._ray, self._placement, self._say = ray, placement, say
        need = placement.need
        self._class = ray.remote(Worker)
        self._options = {"num_cpus": need["CPU"], "num_gpus": need["GPU"], "max_restarts": 0, "max_task_retries": 0}
        if "memory" in need:
            self._options["memory"] = int(need["memory"])
        self._arguments = (config, import_path(), os.getcwd(), need["GPU"] > 0)
        self._idle: list[Hired] = []
        self._flight: dict[Any, Flight] = {}
        self._deaths = Deaths(placement, *([answers] if answers else []))
        self._starts = Starts()
        self._counters = counters
        self._failed_on: dict[str, set[str]] = {}
        self._hint_at = time.monotonic() + FIRST_HINT_SECONDS
        placement.refresh(time.monotonic())

    @property
    def size(self) -> int:
        """Number of workers that there would be with enough to do; it follows the cluster."""
        return self._placement.size

    @property
    def idle(self) -> int:
        """Number of workers that wait for a task."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """Number of workers with a task in flight, with those that died and of which it is not yet known why."""
        in_flight = sum(flight.task is not None for flight in [*self._flight.values(), *self._deaths.flights])
        return in_flight + sum(hired.commits is not None for hired in self._idle)

    @property
    def alive(self) -> int:
        """Number of workers that have come to life and of which nothing else is known."""
        return len(self._idle) + sum(flight.task is not None for flight in self._flight.values())

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most the pool's size; they come to life in the background.

        None is started on a node for a while after one could not be there: nodes that are gone take time to be noticed.
        """
        now = time.monotonic()
        starting = Counter(flight.hired.node for flight in self._flight.values() if flight.task is None)
        taken = Counter(hired.node for hired in self._hired())
        in_doubt = {flight.hired.node for flight in self._deaths.flights}
        self._placement.ask(min(wanted, self.size))
        missing = min(wanted, self.size) - taken.total()
        for node in self._placement.places(
            missing, starting, taken, lambda node: node not in in_doubt and self._starts.may_start(node, now)
        ):
            self._start(node, now)

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker; to one on another node, if there is one, than where it has failed or is at work."""
        failed = {*self._failed_on.get(task.what, ()), *(f.hired.node for f in self._flight.values() if f.task is task)}
        at = next((i for i in reversed(range(len(self._idle))) if self._idle[i].node not in failed), -1)
        hired = self._idle.pop(at)
        self._flight[hired.actor.run.remote(task)] = Flight(hired, task, time.monotonic())

    def wait(self, seconds: float, limit: Limit) -> list[Event]:
        """Return what happened: tasks that finished, failed, took too long; or that no worker can be started."""
        self._finish_commits()
        events = [event for ref in self._ready(seconds) for event in self._settle(ref)]
        now = time.monotonic()
        events += self._overdue(now, limit)
        self._placement.refresh(now)
        events += [event for death in self._deaths.judged(now) for event in self._died(*death)]
        events += self._leave(now)
        self._hint(now)
        found = [event for event in events if event is not None]
        if self._counters is not None:
            self._counters.count(found, self.alive)
        return found

    def close(self) -> None:
        """End every worker."""
        for hired in self._hired():
            self._end(hired)
        self._idle, self._flight = [], {}

    # -------------------------------------------------------------- starting

    def _hired(self) -> list[Hired]:
        return [*self._idle, *(flight.hired for flight in self._flight.values())]

    def _end(self, hired: Hired) -> None:
        self._ray.kill(hired.actor, no_restart=True)
        self._placement.look_again()

    def _start(self, node: str, now: float) -> None:
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self._class.options(scheduling_strategy=there, **self._options).remote(*self._arguments)
        self._flight[actor.start.remote()] = Flight(Hired(actor, node), None, now)

    def _not_started(
        self, flight: Flight, why: str, final: Exception | None = None, memory: bool = False
    ) -> Event | None:
        """Record a start that failed on a node that lives; returns the end of the run if most nodes are like that."""
        node = flight.hired.node
        known = node in self._starts.left_out
        now = time.monotonic()
        out = self._starts.failed(node, why, begun=flight.begun, now=now, final=final is not None, memory=memory)
        if not out:
            self._say(f"a worker could not start on {self._name(node)}, and another one is tried: {why}")
            return None
        if known:
            return None
        if self._starts.spent(self._placement.usable):
            return Event(None, refusal=self._no_starts(final, why))
        times = "" if final is not None else f" {STARTS_WITHOUT_MEMORY if memory else STARTS_PER_NODE} times in a row"
        self._say(f"{self._name(node)} is left out, since workers do not start there ({why.rstrip('.')}){times}")
        return None

    def _no_starts(self, final: Exception | None, why: str) -> Exception:
        if isinstance(final, (SettingsError, CheckpointError, RunFailed)):
            return final
        out, of = len(self._starts.left_out), len(self._placement.usable)
        where = "the only node" if of == 1 else f"{out} of {of} nodes"
        return RunFailed(f"starting a worker fails on {where}, the last time because {why.rstrip('.')}. {REMEDY}")

    def _name(self, node: str) -> str:
        found = self._placement.nodes.get(node)
        return f"node {node[:8]} ({found.address.rpartition(':')[0]})" if found else f"node {node[:8]}"

    # -------------------------------------------------------------- what becomes of a call

    def _ready(self, seconds: float) -> list[Any]:
        """Wait for a call to return, at most for so long, and return all that have."""
        if self._deaths.flights:
            seconds = min(seconds, SECOND_LOOK / 4)
        if not self._flight:
            time.sleep(min(seconds, RESTS[0]))
            return []
        self._ray.wait(list(self._flight), num_returns=1, timeout=seconds)
        # All that have finished by now: if this process was suspended, they are not late.
        return self._ray.wait(list(self._flight), num_returns=len(self._flight), timeout=0)[0]

    def _finish_commits(self) -> None:
        """Ask the workers that commit and have been given nothing else to finish that."""
        for hired in [hired for hired in self._idle if hired.commits is not None]:
            self._idle.remove(hired)
            begun = time.monotonic() - hired.commits.seconds  # the commit belongs to the task's own time
            call = hired.actor.finish.remote()
            self._flight[call] = Flight(replace(hired, commits=None), hired.commits.task, begun)

    def _settle(self, ref: Any) -> list[Event | None]:
        flight = self._flight.pop(ref)
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(ref)
        except errors.RayTaskError as error:  # raised by Ray around the worker's code: its arguments could not be read
            answer = Answer(Raised.of(error.cause if isinstance(error.cause, Exception) else error))
        except errors.RayError as error:
            self._end(flight.hired)
            self._deaths.record(flight, error, time.monotonic())
            return []
        if isinstance(answer.outcome, Raised) or isinstance(answer.before, Raised):
            self._end(flight.hired)
        else:
            computed = Committing(flight.task, time.monotonic() - flight.begun) if answer.outcome is None else None
            now = time.monotonic()
            self._idle.append(replace(flight.hired, commits=computed, since=now, kills=answer.kills))
        return [self._before(flight, answer), self._own(flight, answer)]

    def _before(self, flight: Flight, answer: Answer) -> Event | None:
        """Return what became of the task whose commit went on during the call."""
        before = flight.hired.commits
        if before is None or answer.before is None:
            return flight.hired.commit_lost
        return self._outcome(flight, before.task, answer.before, before.seconds)

    def _own(self, flight: Flight, answer: Answer) -> Event | None:
        """Return what became of the call's own task, unless its commit goes on."""
        seconds = time.monotonic() - flight.begun
        if flight.task is not None:
            return None if answer.outcome is None else self._outcome(flight, flight.task, answer.outcome, seconds)
        if not isinstance(answer.outcome, Raised):
            self._starts.succeeded(flight.hired.node)
            return None
        final = answer.outcome.rebuilt() if verdict(answer.outcome) is Verdict.FINAL else None
        return self._not_started(flight, why_it_failed(answer.outcome), final)

    def _outcome(self, flight: Flight, task: Task, outcome: Any, seconds: float) -> Event:
        if isinstance(outcome, Raised):
            return event_of(task, outcome, self._failed(flight.hired.node, task))
        self._failed_on.pop(task.what, None)
        return Event(task, receipt=outcome, seconds=seconds)

    def _died(self, flight: Flight, error: Exception, lost: bool, killed: bool) -> list[Event | None]:
        why, memory = why_it_died(error, lost, killed), not lost and (killed or short_of_memory(error))
        if flight.task is None:
            return [None if lost else self._not_started(flight, why, memory=memory)]
        at = "" if lost else self._failed(flight.hired.node, flight.task)
        return [flight.hired.commit_lost, Event(flight.task, failure=why, lost=lost, memory=memory, node=at)]

    def _overdue(self, now: float, limit: Limit) -> list[Event | None]:
        late = [
            (ref, flight)
            for ref, flight in self._flight.items()
            if flight.task is not None and limit.seconds is not None and now - flight.begun > limit.seconds
        ]
        events = []
        for ref, flight in late:
            del self._flight[ref]
            self._end(flight.hired)
            why = f"its worker seems to hang: it took longer than {limit}"
            at = self._failed(flight.hired.node, flight.task)
            events += [flight.hired.commit_lost, Event(flight.task, failure=why, node=at)]
        return events

    def _leave(self, now: float) -> list[Event | None]:
        """Let go of the idle workers whose nodes are gone, and of those that keep a node from being given back."""
        gone = [hired for hired in self._idle if hired.node not in self._placement.nodes]
        spare = [hired for hired in self._idle if hired not in gone and self._is_spare(hired, now)]
        for hired in spare:
            self._end(hired)
        self._idle = [hired for hired in self._idle if hired not in gone and hired not in spare]
        return [hired.commit_lost for hired in gone]

    def _is_spare(self, hired: Hired, now: float) -> bool:
        return self._placement.elastic and hired.commits is None and now - hired.since > SPARE_SECONDS

    def _failed(self, node: str, task: Task) -> str:
        """Remember where a task has failed; returns the node, or nothing where there is no other."""
        self._failed_on.setdefault(task.what, set()).add(node)
        return node if len(self._placement.usable) > 1 else ""

    # -------------------------------------------------------------- what people are told

    def _hint(self, now: float) -> None:
        """Say from time to time that workers wait for room, since Ray itself says nothing here."""
        if self._idle or self.busy:
            self._hint_at = now + HINT_SECONDS
        elif now > self._hint_at:
            self._hint_at = now + HINT_SECONDS
            under_way = f"{len(self._flight)} worker(s) to start" if self._flight else "room for a worker"
            self._say(f"waiting for {under_way}: {self._placement.describe()}")
