"""Counters for whoever watches a cluster: what Ray exports to Prometheus beside its own metrics."""

from __future__ import annotations

from collections.abc import Iterable

from laplace_dist.execution.tasks import Event


class Counters:
    """Tasks and examples done, failures and losses, bytes stored, by kind of task; and the workers that live."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        kind = ("task",)
        self._tasks = Counter("laplace_dist_tasks", "Tasks that were done.", kind)
        self._examples = Counter("laplace_dist_examples", "Examples of tasks that were done.", kind)
        self._bytes = Counter("laplace_dist_stored_bytes", "Bytes of arrays that tasks have committed.", kind)
        self._retries = Counter("laplace_dist_retries", "Failures on nodes that live on.", kind)
        self._lost = Counter("laplace_dist_lost", "Tasks that were lost with their nodes.", kind)
        self._workers = Gauge("laplace_dist_workers", "Workers that live.")
        self._shown: int | None = None

    def count(self, events: Iterable[Event], alive: int) -> None:
        """Count what happened.

        Args:
            events: What became of tasks.
            alive: Workers that live now.
        """
        for event in events:
            if event.task is None or event.refusal is not None:
                continue
            tags = {"task": type(event.task).__name__}
            if event.failure is not None:
                (self._lost if event.lost else self._retries).inc(1, tags)
                continue
            self._tasks.inc(1, tags)
            for counter, name in ((self._examples, "examples"), (self._bytes, "bytes")):
                if amount := event.receipt.get(name, 0):
                    counter.inc(amount, tags)
        if alive != self._shown:
            self._workers.set(alive)
            self._shown = alive
