"""A worker's start on a GPU, as far as a machine without one can tell; and the commit beside the next task."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import dist_cases
import pytest
import torch

from laplace_dist import stages
from laplace_dist.errors import SettingsError
from laplace_dist.execution.tasks import Answer
from laplace_dist.execution.worker import Worker
from laplace_dist.run.layout import partial_key
from laplace_dist.stages.context import Context


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Return a worker that Ray gave a GPU; what it sets in this process is set back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    yield Worker(dist_cases.config(tmp_path / "run", gpus_per_worker=1.0), [], os.getcwd(), True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_a_gpu_that_torch_cannot_use_is_refused(worker, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SettingsError, match="gpus_per_worker=1.0: Ray gave this worker a GPU, but torch cannot use one"
    ):
        raise worker.start().outcome.rebuilt()
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_of_a_gpu_are_deterministic(worker, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    worker.start()
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert worker._context.device.type == "cuda"


class Computed:
    """A task whose commit waits until it is let go; what is told of it is kept in order."""

    def __init__(self, what, told, fails=False):
        self.what, self.told, self.fails, self.may_commit, self.plan = what, told, fails, threading.Event(), None

    def run(self, context):
        self.told.append(f"computed {self.what}")
        return self._commit

    def _commit(self):
        assert self.may_commit.wait(60)
        self.told.append(f"committed {self.what}")
        if self.fails:
            raise OSError("no answer")
        return {"examples": 1}


@pytest.fixture
def at_work(tmp_path):
    worker = Worker(dist_cases.config(tmp_path / "run"), [], os.getcwd(), False)
    worker._context = SimpleNamespace(begin=lambda task: task.run(None))
    return worker


def test_a_task_is_computed_while_the_one_before_is_committed_and_not_the_one_after(at_work):
    told = []
    one, two = (Computed(what, told) for what in ("one", "two"))
    assert at_work.run(one) == Answer(None)
    next_call = threading.Thread(target=lambda: told.append(at_work.run(two)))
    next_call.start()
    while "computed two" not in told:
        next_call.join(0.01)
    assert told == ["computed one", "computed two"], "its answer waits for the commit: two tasks' sums, not three"
    one.may_commit.set()
    next_call.join(60)
    assert told[2:] == ["committed one", Answer(None, before={"examples": 1})]
    two.may_commit.set()
    assert (at_work.finish(), told[-1]) == (Answer({"examples": 1}), "committed two")


def test_after_a_commit_that_failed_the_next_one_is_not_left_to_a_worker_that_is_ended(at_work):
    one, two = Computed("one", [], fails=True), Computed("two", [])
    one.may_commit.set(), two.may_commit.set()
    at_work.run(one)
    answer = at_work.run(two)
    assert answer.outcome == {"examples": 1} and "no answer" in str(answer.before)


@pytest.mark.parametrize("limit", [0, 2**20], ids=["large sums", "small sums"])
def test_large_sums_are_committed_before_the_next_segment(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(stages.map, "BESIDE", limit)
    with dist_cases.inline_job(dist_cases.config(tmp_path / "run")) as job:
        job.open()
        segment = job.plan.segments[0]
        done = Context(job.config).begin(stages.map.MapSegment(job.plan.digest, segment))
        assert callable(done) == (limit > 0) == (not job.store.exists(partial_key(segment.id)))
        receipt = done() if limit else done
    assert receipt["won"] and job.store.exists(partial_key(segment.id))
