"""Runs that run out of memory: smaller batches are another plan, which is begun only while nothing is committed."""

from __future__ import annotations

import json

import dist_cases
import memory_cases
import pytest
import torch
from safetensors.torch import save_file

import laplace_dist
from laplace_dist.errors import OutOfMemory, RunFailed, SettingsError
from laplace_dist.execution import liveness
from laplace_dist.execution.failures import Budget, event_of
from laplace_dist.execution.inline import Inline, InlinePool
from laplace_dist.execution.kernel_kills import ask_node, kernel_kills
from laplace_dist.execution.liveness import LESS_MEMORY
from laplace_dist.execution.raised import Raised
from laplace_dist.execution.tasks import Event
from laplace_dist.job import evaluate_posterior
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan


@pytest.fixture
def weights(tmp_path):
    """The weights of the network, so that models that starve in other ways are one model."""
    place = tmp_path / "weights.safetensors"
    save_file(memory_cases.hungry().state_dict(), place)
    return str(place)


def config(place, weights, batch_size=16, **changes):
    arguments = {name: changes.pop(name) for name in ("most", "error", "marker", "once") if name in changes}
    return dist_cases.config(
        place,
        model="memory_cases:hungry",
        model_args=arguments,
        weights=weights,
        batch_size=batch_size,
        **{"segment_size": 16, **changes},
    )


def fit(chosen, executor=laplace_dist.Inline):
    return laplace_dist.fit(chosen, executor=executor)


def plan_of(place):
    return read_plan(Checkpoint(str(place)))


def sums_of(place):
    found = laplace_dist.load_posterior(str(place), memory_cases.hungry(), load_weights=True).sums.to_tensors()
    return {name: value.numpy().tobytes() for name, value in found.items()}


@pytest.mark.parametrize("error", ["cuda", "cpu", "python"])
def test_before_anything_is_committed_the_run_begins_again_with_half_the_batch(error, tmp_path, weights, caplog):
    place = tmp_path / "run"
    with caplog.at_level("INFO", logger="laplace_dist"):
        fit(config(place, weights, error=error))
    plan = plan_of(place)
    assert (plan.settings["batch_size"], plan.halved_from) == (8, 16)
    assert "no worker has the memory for a batch of 16, and nothing is committed yet" in caplog.text
    assert "begins again with --batch-size 8, which its plan records" in caplog.text
    fit(config(tmp_path / "eight", weights, batch_size=8, error=error))
    assert sums_of(place) == sums_of(tmp_path / "eight")
    assert plan.content == plan_of(tmp_path / "eight").content, "it is the run that batches of 8 would have been"
    assert laplace_dist.verify(str(place), data=dist_cases.blobs("train")).problems == []
    assert not [path for path in place.rglob("*") if "jobs" in path.parts and path.is_file()]


def test_the_same_command_goes_on_with_the_halved_batch_and_another_size_is_refused(tmp_path, weights):
    place = tmp_path / "run"
    wanted = fit(config(place, weights)).version
    (place / "partials" / "000001.json").unlink()
    (place / "CURRENT.json").unlink()
    for size in (16, 8):
        assert fit(config(place, weights, batch_size=size)).version == wanted
    for size in (4, 32):
        with pytest.raises(SettingsError, match=f"--batch-size: stored 8, now {size}"):
            fit(config(place, weights, batch_size=size))
    assert json.loads((place / "plan.json").read_text())["halved_from"] == 16


def test_it_is_halved_until_it_fits_and_no_further_than_one_example(tmp_path, weights):
    fit(config(tmp_path / "run", weights, most=4))
    assert (plan_of(tmp_path / "run").settings["batch_size"], plan_of(tmp_path / "run").halved_from) == (4, 16)
    starving = config(tmp_path / "no", weights, most=16)
    with dist_cases.inline_job(starving) as job:
        job.open()
        job.session.run = _out_of_memory
        with pytest.raises(OutOfMemory):
            job.map()
    assert plan_of(tmp_path / "no").settings["batch_size"] == 1


def _out_of_memory(*args, **kwargs):
    raise OutOfMemory("nothing fits", of_sums=False)


def test_once_something_is_committed_the_batch_is_not_changed(tmp_path, weights):
    """Halves of a batch add up to other bits, so the run ends, names what to change, and keeps what it has."""
    x, _ = dist_cases.tensors("train")
    marker = float(x[32:].max()) - 1e-6
    assert float(x[:32].max()) < marker, "it is met in the last segment alone"
    with pytest.raises(
        RunFailed, match="segment 000002 .*failed 3 times.*ran out of memory.*smaller --batch-size"
    ) as caught:
        fit(config(tmp_path / "run", weights, most=99, marker=marker))
    assert not isinstance(caught.value, OutOfMemory)
    assert plan_of(tmp_path / "run").halved_from is None
    assert sorted(path.name for path in (tmp_path / "run" / "partials").glob("*.json")) == [
        "000000.json",
        "000001.json",
    ]
    with pytest.raises(RunFailed):  # nor by the same command again, in which nothing finishes
        fit(config(tmp_path / "run", weights, most=99, marker=marker))
    assert len([*(tmp_path / "run" / "partials").glob("*.json")]) == 2


def test_a_posterior_that_is_there_is_never_begun_again(tmp_path, weights):
    chosen = config(tmp_path / "run", weights, most=99)
    version = fit(chosen).version
    for manifest in (tmp_path / "run" / "partials").glob("*.json"):
        manifest.unlink()
    with dist_cases.inline_job(chosen) as job:
        job.open()
        job.session.run = _out_of_memory
        with pytest.raises(OutOfMemory):
            job.map()
    assert (tmp_path / "run" / "posteriors" / f"{version}.json").exists()
    assert plan_of(tmp_path / "run").settings["batch_size"] == 16


def test_a_worker_lets_go_of_what_it_can_and_does_the_same_task_again(tmp_path, weights, caplog):
    with caplog.at_level("INFO", logger="laplace_dist"):
        fit(config(tmp_path / "run", weights, once=str(tmp_path / "starved")))
    assert (tmp_path / "starved").exists()
    assert "again" not in caplog.text and plan_of(tmp_path / "run").halved_from is None
    fit(config(tmp_path / "other", weights, most=99))
    assert sums_of(tmp_path / "run") == sums_of(tmp_path / "other")


class Unknown(Inline):
    """Whose memory nobody knows, as a GPU's is not before a worker is there."""

    def memory(self, device):
        return None


def test_sums_that_do_not_fit_where_that_was_not_known_are_divided_into_more_groups(
    tmp_path, weights, monkeypatch, caplog
):
    whole = fit(config(tmp_path / "whole", weights, most=99))
    largest = 8 * 36**2  # of the first layer's inputs
    monkeypatch.setattr("laplace.linalg.memory.free_bytes", lambda device: largest + 100)
    with caplog.at_level("INFO", logger="laplace_dist"):
        found = fit(config(tmp_path / "run", weights, most=99), Unknown)
    plan = plan_of(tmp_path / "run")
    assert len(plan.groups) == 2 and plan.halved_from is None and plan.settings["batch_size"] == 16
    assert "no worker has the memory for the sums, and nothing is committed yet" in caplog.text
    assert found.version == whole.version and sums_of(tmp_path / "run") == sums_of(tmp_path / "whole")
    with pytest.raises(OutOfMemory, match="The sums of a 'kron' posterior"):
        fit(config(tmp_path / "asked", weights, most=99, module_groups=1), Unknown)
    monkeypatch.setattr("laplace.linalg.memory.free_bytes", lambda device: 100)
    with pytest.raises(OutOfMemory, match="The sums of a 'kron' posterior"):
        fit(config(tmp_path / "no", weights, most=99), Unknown)


def test_follow_on_jobs_and_windows_of_a_halved_run_take_the_command_of_the_fit(tmp_path, weights):
    chosen = config(tmp_path / "run", weights, window="first", skip_evaluate=False, most=8)
    fit(chosen.model_copy(update={"skip_evaluate": True}))
    metrics = evaluate_posterior(chosen.model_copy(update={"window": None}), executor=laplace_dist.Inline).metrics
    assert 0 < metrics["laplace"]["nll"] < 10
    more = {"window": "second", "data": "dist_cases:second_window", "margin_nll": 10.0, "margin_ece": 1.0}
    assert laplace_dist.recalibrate(chosen.model_copy(update=more), laplace_dist.Inline) is not None
    own = json.loads((tmp_path / "run" / "windows" / "second" / "plan.json").read_text())
    assert (own["settings"]["batch_size"], own["halved_from"]) == (8, 16)


def test_what_ran_out_of_memory_is_told_from_what_else_failed():
    class Task:
        what = "task"

    def end(error, finished=False):
        budget = Budget()
        if finished:
            budget.success(event_of(Task, Raised.of(ValueError())))
        for _ in range(3):
            again = budget.failure(event_of(Task, Raised.of(error)), 1)
        return again

    with pytest.raises(OutOfMemory):
        end(torch.OutOfMemoryError("CUDA out of memory"))
    assert end(torch.OutOfMemoryError("CUDA out of memory"), finished=True) is False
    assert end(OSError("gone")) is False


class Monitored(Inline):
    """Whose workers Ray's monitor ends at segments in batches of more than `most`, as the pool of actors tells of it."""

    def pool(self, device, expected=None):
        return MonitoredPool(self._config, device)


class MonitoredPool(InlinePool):
    most = 8

    def _outcome(self, task):
        if task.what.startswith("segment") and self._context.plan.settings["batch_size"] > self.most:
            why = f"Ray ended the worker because its node ran low on memory. {LESS_MEMORY}"
            return Event(task, failure=why, memory=True)
        return super()._outcome(task)


def test_workers_that_ray_ends_for_their_memory_begin_the_run_again_with_half_the_batch(tmp_path, weights, caplog):
    with caplog.at_level("INFO", logger="laplace_dist"):
        fit(config(tmp_path / "run", weights, most=99), Monitored)
    plan = plan_of(tmp_path / "run")
    assert (plan.settings["batch_size"], plan.halved_from) == (8, 16)
    assert caplog.text.count("its node ran low on memory") >= 3
    assert "no worker has the memory for a batch of 16, and nothing is committed yet" in caplog.text
    fit(config(tmp_path / "eight", weights, batch_size=8, most=99))
    assert sums_of(tmp_path / "run") == sums_of(tmp_path / "eight")


def test_once_something_is_committed_a_worker_that_is_ended_changes_no_batch(tmp_path, weights):
    chosen = config(tmp_path / "run", weights, most=99)
    fit(chosen)
    (tmp_path / "run" / "partials" / "000001.json").unlink()
    for name in ("window.json", "CURRENT.json"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(RunFailed, match="segment 000001 .*failed 3 times.*ran low on memory.*smaller --batch-size"):
        fit(chosen, Monitored)
    assert plan_of(tmp_path / "run").halved_from is None and len([*(tmp_path / "run" / "partials").glob("*.json")]) == 2


def test_a_worker_that_died_of_no_known_cause_is_no_sign_of_too_large_batches():
    class Task:
        what = "task"

    budget = Budget()
    for _ in range(3):
        again = budget.failure(Event(Task, failure="the worker's process died, and its node lives on"), 1)
    assert again is False


@pytest.fixture
def rising(monkeypatch):
    """Have nodes answer that their kernel has ended one more process for memory whenever they are asked."""
    monkeypatch.setattr(liveness, "ask_node", lambda node: lambda: (True, (kernel_kills() or 0) + 1))


def test_workers_that_the_kernel_kills_begin_the_run_again_with_half_the_batch(
    tmp_path, weights, cluster, rising, capsys
):
    """Real processes are killed; what their kernel counts is another's, since here it has no reason to."""
    chosen = config(tmp_path / "run", weights, error="kernel", ray_address=cluster, num_workers=1)
    found = laplace_dist.fit(chosen)
    plan = plan_of(tmp_path / "run")
    assert (plan.settings["batch_size"], plan.halved_from) == (8, 16)
    said = capsys.readouterr().out
    assert said.count("the kernel of its node ended a process for want of memory. Run fewer workers at once") >= 3
    assert said.count("no worker has the memory for a batch of 16, and nothing is committed yet") == 1
    assert found.version == fit(config(tmp_path / "other", weights, batch_size=8, error="kernel")).version


def test_batches_of_one_example_that_do_not_fit_say_what_was_expected_and_what_to_change(
    tmp_path, weights, monkeypatch
):
    monkeypatch.setattr(MonitoredPool, "most", 0)
    why = (
        r"(?s)low on memory.*Batches are of one example already.*expected to take at least \d.*can have \d.*last_layer"
    )
    with pytest.raises(OutOfMemory, match=why):
        fit(config(tmp_path / "run", weights, batch_size=2, most=99), Monitored)
    assert plan_of(tmp_path / "run").settings["batch_size"] == 1


def test_a_node_is_asked_for_its_own_kernels_count(cluster, monkeypatch):
    import ray

    def answer_of(poll):
        while not (found := poll())[0]:
            ray.wait([ray.remote(num_cpus=0)(lambda: None).remote()])
        return found[1]

    [node] = [node["NodeID"] for node in ray.nodes()]
    assert answer_of(ask_node(node)) == kernel_kills()
    assert answer_of(ask_node("0" * len(node))) is None, "a node that is gone"
    monkeypatch.setattr("laplace_dist.execution.kernel_kills.VMSTAT", "/proc/no such file")
    assert answer_of(ask_node(node)) is None and kernel_kills() is None


def test_on_a_pool_of_workers_too(tmp_path, weights, cluster):
    """Other workers are started for the new plan, and its segments are theirs."""
    chosen = config(tmp_path / "run", weights, ray_address=cluster, num_workers=1)
    found = laplace_dist.fit(chosen)
    assert plan_of(tmp_path / "run").settings["batch_size"] == 8
    assert found.version == fit(config(tmp_path / "other", weights, batch_size=8)).version
