"""Threads that take turns: at every step a seeded draw decides who goes on, so that a seed that fails fails again.

Only the actor that holds the baton runs; it hands it over where it says `step`, which the simulated store does at each of its
operations. The clock is the schedule's own and moves with the steps.
"""

from __future__ import annotations

import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable

SECONDS = 5.0  # that a step takes, on the schedule's clock


class Crash(BaseException):
    """The process is gone: nothing catches this."""


class Stopped(BaseException):
    """The whole schedule is over, because something has failed."""


class Actor:
    """One process: a driver, a worker, a reader; what it does runs in a thread of its own, by turns.

    Attributes:
        name: For the trace.
        dead: Whether it has crashed: a dead process does nothing more.
        over: Whether it has ended.
    """

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.schedule, self.name = schedule, name
        self.dead = self.over = False
        self.ready: Callable[[], bool] = lambda: True
        self.baton = threading.Semaphore(0)

    def step(self, what: str, *, yields: bool = False) -> None:
        """Let time pass, and others go on.

        Args:
            what: This step, for the trace.
            yields: Let another go on, if any can.

        Raises:
            Crash: It is dead.
        """
        if self.dead:
            raise Crash
        self.schedule.turn(self, what, yields)
        if self.dead:  # killed meanwhile
            raise Crash

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Do nothing until something holds."""
        self.ready = ready
        try:
            while not ready():
                self.step("waits", yields=True)
        finally:
            self.ready = lambda: True

    def die(self) -> None:
        """Crash here."""
        self.dead = True
        raise Crash


class Schedule:
    """Who goes when, drawn from a seed.

    Args:
        seed: Of all that is drawn.
        limit: Steps after which the schedule has failed: whoever works comes to an end.

    Attributes:
        random: The one source of chance.
        now: Seconds that have passed.
        steps: How many there were.
        fired: How often each fault fired.
        trace: The last steps.
        failures: What went wrong, as text.
    """

    def __init__(self, seed: int, limit: int = 20_000) -> None:
        self.random = random.Random(seed)
        self.now, self.steps, self.limit = 0.0, 0, limit
        self.fired: Counter[str] = Counter()
        self.trace: list[str] = []
        self.failures: list[str] = []
        self._stay = self.random.choice([0.2, 0.6, 0.9])
        self._actors: list[Actor] = []
        self._ended = threading.Semaphore(0)

    def start(self, name: str, act: Callable[[Actor], None]) -> Actor:
        """Add an actor, which begins when its turn comes."""
        actor = Actor(self, name)
        self._actors.append(actor)
        threading.Thread(target=self._live, args=(actor, act), daemon=True).start()
        return actor

    def run(self) -> None:
        """Let all actors go until every one has ended."""
        if self._actors:
            self._next().baton.release()
            self._ended.acquire()

    def fail(self, text: str) -> None:
        """Note what went wrong, and end the schedule."""
        self.failures.append(text)
        raise Stopped

    def turn(self, actor: Actor, what: str, yields: bool) -> None:
        """Take a step of an actor, and hand the baton on."""
        if self.failures:
            raise Stopped
        self.steps += 1
        self.now += SECONDS
        self.trace.append(f"{actor.name}: {what}")
        if self.steps > self.limit:
            self.fail(f"no end after {self.steps} steps")
        if not yields and self.random.random() < self._stay:
            return
        chosen = self._next(actor if yields else None)
        if chosen is not actor:
            chosen.baton.release()
            actor.baton.acquire()
            if self.failures:
                raise Stopped

    def _next(self, reluctant: Actor | None = None) -> Actor:
        """Draw who goes on; somebody who only waits only if nobody else can."""
        ready = [actor for actor in self._actors if actor.ready()] or self._actors
        others = [actor for actor in ready if actor is not reluctant]
        return self.random.choice(others or ready)

    def _live(self, actor: Actor, act: Callable[[Actor], None]) -> None:
        actor.baton.acquire()
        try:
            act(actor)
        except (Crash, Stopped):
            pass
        except BaseException:  # the error of any actor is the schedule's
            self.failures.append(f"{actor.name}: {traceback.format_exc()}")
        actor.over = True
        self._actors.remove(actor)
        if self._actors:
            (self._actors[0] if self.failures else self._next()).baton.release()
        else:
            self._ended.release()
