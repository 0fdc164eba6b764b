"""What a failure means, and how often a task, the starts on a node, or a whole run may fail.

Three kinds of failure are told apart, and each has a budget of its own:

- *A node is lost*: reclaimed, crashed, cut off. That says nothing of the task, so it is not counted against it. On spot
  machines most failures are of this kind; with 4,096 segments and one attempt in fifty lost, some segment loses three.
- *A task fails on a node that lives on*: its process dies, it hangs, it raises. That is counted against the task. One
  bad example costs no more than its segment, so such a task is set aside and the others are finished first.
- *An error that would come again wherever it is tried*: waiting for it to come again is a waste, so it stops the run.

A start of a worker that fails is counted against the node that it was tried on, not against the run: see `Starts`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum

from laplace_dist.errors import OutOfMemory, RunFailed
from laplace_dist.execution.memory import OF_SUMS, WORDS, is_out_of_memory
from laplace_dist.execution.raised import Raised
from laplace_dist.execution.tasks import Event

# Once may be chance, and twice may be the same cause that has not passed yet; three processes on living nodes are none of it.
SAME_FAILURE = 3
# Failures of several kinds point at the surroundings rather than at the task, so they get twice as many attempts.
ANY_FAILURE = 2 * SAME_FAILURE
# Bad examples come singly. Ten bad segments are a fault of the data or the model, and the rest would only take time.
SET_ASIDE = 10
# With nothing finished in between, three failures per worker mean that every worker fails; ten, where there are few.
PER_WORKER, AT_LEAST = 3, 10
# Nodes lost in a row, per worker, with nothing finished in between: ten times the whole cluster. Then the tasks take longer
# than the nodes live, and no patience helps.
LOST_PER_WORKER = 10
# Starts in a row that fail on one node, over at least 3.5 s of growing rests: more than chance, and still quick.
STARTS_PER_NODE = 4
# Where Ray ended the worker because its node ran low on memory, which other programs may give back: over two minutes of rests.
STARTS_WITHOUT_MEMORY = 12

LESS_MEMORY = (
    "Run fewer workers at once (--num-workers) or on larger nodes; a smaller --batch-size, more --module-groups, "
    "--subset-of-weights last_layer or another --hessian-structure need less memory too, but are another run: give a new "
    "--checkpoint, or --fresh"
)
REMEDY = "Everything committed so far is kept: remove the cause and run the same command again."


class Verdict(Enum):
    """What an error of a task says of the next attempt at it."""

    FINAL = "it would be the same: stop at once"
    SAME_CODE = "it would be the same on every node with the same code: stop if another node says so too"
    UNKNOWN = "it would be the same if nothing has finished yet, else it is this task's own"
    OF_EXAMPLES = "it is bound to the examples of this task: the others may be good"
    MAY_PASS = "the next attempt may go well"


_FINAL = (
    *("builtins.ValueError", "torch._C._LinAlgError", "builtins.NotImplementedError"),
    *("laplace_dist.errors.CheckpointError", "laplace_dist.errors.RunFailed"),
)
_SAME_CODE = (
    *("builtins.TypeError", "builtins.AttributeError", "builtins.NameError", "builtins.ImportError"),
    *("builtins.AssertionError", "builtins.SyntaxError", "builtins.RecursionError"),
)
_MAY_PASS = (
    *("laplace_dist.errors.StorageError", "builtins.OSError", "builtins.MemoryError", "builtins.EOFError"),
    *("torch.OutOfMemoryError", "torch.AcceleratorError", "concurrent.futures._base.TimeoutError"),
)
_NETWORKS = ("aiohttp.", "botocore.", "urllib3.", "requests.", "httpx.", "google.", "azure.", "ray.")
_OF_THE_NODE = re.compile(r"CUDA error|CUDNN_STATUS|CUBLAS_STATUS|NCCL|uncorrectable", re.IGNORECASE)


def verdict(raised: Raised) -> Verdict:
    """Say what an error means for the next attempt; what is not known to last or to pass is `UNKNOWN`.

    Of a function of the user's that raised, it is the error it raised that counts: on the driver it has gone well.
    """
    if raised.is_a("laplace_dist.errors.CallFailed"):
        raised = replace(raised, classes=raised.causes)
    if _passes(raised.classes) or _OF_THE_NODE.search(raised.text) or is_out_of_memory(raised):
        return Verdict.MAY_PASS
    if raised.is_a("laplace_dist.errors.ExampleError"):
        return Verdict.MAY_PASS if _passes(raised.causes) else Verdict.OF_EXAMPLES
    if raised.is_a(*_FINAL):
        return Verdict.FINAL
    return Verdict.SAME_CODE if raised.is_a(*_SAME_CODE) else Verdict.UNKNOWN


def _passes(classes: tuple[str, ...]) -> bool:
    return any(name in _MAY_PASS or name.startswith(_NETWORKS) for name in classes)


def why_it_failed(raised: Raised) -> str:
    """Return an error that a task raised as a phrase, with what to lower if its worker ran out of memory."""
    text = raised.located()
    return f"{text.rstrip('.')}. The worker ran out of memory. {LESS_MEMORY}" if WORDS.search(text) else text


def event_of(task: object, raised: Raised, node: str = "") -> Event:
    """Return what a task's error means, as an event; every executor sorts errors by this."""
    if verdict(raised) is Verdict.FINAL:
        return Event(task, refusal=raised.rebuilt(), node=node)
    return Event(task, failure=why_it_failed(raised), raised=raised, node=node)


@dataclass
class _Record:
    """What has gone wrong with one task on living nodes: how often, by kind, and where."""

    kinds: Counter[str] = field(default_factory=Counter)
    nodes: dict[str, set[str]] = field(default_factory=dict)


@dataclass
class Budget:
    """Counts the failures of a stage's tasks and decides when to stop trying one of them, or all.

    Attributes:
        set_aside: What became of the tasks that are tried no more, one sentence each.
    """

    set_aside: list[str] = field(default_factory=list)
    _tasks: dict[str, _Record] = field(default_factory=dict)
    _in_a_row: int = 0
    _lost_in_a_row: int = 0
    _finished: int = 0

    def success(self, event: Event) -> None:
        """Record a finished task."""
        self._finished += 1
        self._in_a_row = self._lost_in_a_row = 0
        self._tasks.pop(event.task.what, None)

    def failure(self, event: Event, workers: int) -> bool:
        """Record a failure; returns whether the task is to be tried again.

        Args:
            event: The failure.
            workers: How many have been at work at once.

        Raises:
            RunFailed: A budget of the whole run is spent, or the failure would come again wherever it was tried.
        """
        if event.lost:
            self._lost(event, workers)
            return True
        what, kind = event.task.what, kind_of(event)
        record = self._tasks.setdefault(what, _Record())
        before = record.nodes.setdefault(kind, set())
        elsewhere = bool(before) and (event.node == "" or bool(before - {event.node}))
        before.add(event.node)
        record.kinds[kind] += 1
        if event.raised is not None:
            self._stop_if_it_lasts(event, kind, elsewhere)
        spent = self._spent(event, record, kind)
        self._in_a_row += 1
        if self._in_a_row >= max(AT_LEAST, PER_WORKER * workers):
            last = f"{self._in_a_row} failures in a row with nothing finished in between; the last one: {what}"
            raise self._ended(event, sentences([*self.set_aside, f"{last}: {event.failure}"]))
        return not spent

    def check(self) -> None:
        """Fail if a task was set aside.

        Raises:
            RunFailed: Naming each of them.
        """
        if self.set_aside:
            raise RunFailed(sentences(self.set_aside))

    def _lost(self, event: Event, workers: int) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= LOST_PER_WORKER * max(AT_LEAST, workers):
            raise RunFailed(
                f"{self._lost_in_a_row} nodes were lost with nothing finished in between; the last one: "
                f"{event.task.what}: {event.failure.rstrip('.')}. The nodes live shorter than a task takes: a smaller "
                f"--segment-size makes tasks shorter (another run: give a new --checkpoint), or use other nodes. Or they are "
                "ended for their memory, as a pod is (OOMKilled): run fewer workers on a node (--num-workers), or larger "
                f"ones. {REMEDY}"
            )

    def _stop_if_it_lasts(self, event: Event, kind: str, elsewhere: bool) -> None:
        says = verdict(event.raised)
        if says is Verdict.MAY_PASS:
            return
        others = [what for what, record in self._tasks.items() if what != event.task.what and kind in record.kinds]
        if not self._finished and others:
            why = f"{others[0]} failed in the same way, and nothing has finished"
        elif elsewhere and (says is Verdict.SAME_CODE or (says is Verdict.UNKNOWN and not self._finished)):
            why = f"it failed in the same way {'on another node' if event.node else 'before'}"
        else:
            return
        raise RunFailed(
            sentences(
                [*self.set_aside, f"{event.task.what}: {event.failure.rstrip('.')}; {why}, so trying again is no use"]
            )
        )

    def _spent(self, event: Event, record: _Record, kind: str) -> bool:
        """Say whether a task has failed for good, and set it aside if so."""
        same = record.kinds[kind] >= SAME_FAILURE
        if not same and record.kinds.total() < ANY_FAILURE:
            return False
        times = record.kinds[kind] if same else record.kinds.total()
        self.set_aside.append(f"{event.task.what} failed {times} times, the last time because {event.failure}")
        if self._too_large(event):
            raise self._ended(event, sentences(self.set_aside))
        if len(self.set_aside) >= SET_ASIDE:
            self.check()
        return True

    def _too_large(self, event: Event) -> bool:
        """Say whether memory ran out although nothing has finished: then the other tasks would fare no better."""
        refused = event.raised is not None and is_out_of_memory(event.raised)
        return not self._finished and (refused or event.memory)

    def _ended(self, event: Event, text: str) -> RunFailed:
        if not self._too_large(event):
            return RunFailed(text)
        return OutOfMemory(text, of_sums=event.raised is not None and event.raised.is_a(OF_SUMS))


def kind_of(event: Event) -> str:
    """Return a failure without what differs where it is the same: attempt ids, addresses, times."""
    return re.sub(r"\w*\d\w*", "#", str(event.raised) if event.raised is not None else event.failure)


def sentences(causes: list[str]) -> str:
    """Return causes as sentences, one a line, with what to do."""
    text = "\n".join(f"{cause.rstrip('.')}." for cause in causes)
    return f"{text}{' ' if len(causes) == 1 else chr(10)}{REMEDY}"
