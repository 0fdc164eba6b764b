"""Reading ahead by processes: the same batches, processes that stay and end, errors that name examples, chunks read once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import dist_cases
import numpy as np
import psutil
import pytest
import torch
import zarr
from loading_cases import State, Traced, Unsendable, reads
from torch.utils.data import TensorDataset

from laplace_dist.data.collate import Collate
from laplace_dist.data.device import to_device
from laplace_dist.data.loader import batches
from laplace_dist.data.processes import check_sendable
from laplace_dist.data.read_ahead import ReadAhead, _Ranges
from laplace_dist.data.sources import load_split
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan.identity import fingerprint
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.context import Context


def children() -> list[psutil.Process]:
    """Return the processes below this one that read ahead: those of the fork server."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and "forkserver" in " ".join(p.parent().cmdline())]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def reading(config, device="cpu"):
    """What a task reads with, in a run whose batches are as they were asked for."""
    context = Context(config, device)
    context.__dict__["plan"] = SimpleNamespace(halved_from=None)
    return context


def test_a_gpu_gets_its_batches_from_pinned_memory_without_waiting(tmp_path, monkeypatch):
    asked, x = [], torch.zeros(1)
    contexts = {device: reading(dist_cases.config(tmp_path), device) for device in ("cuda", "cpu")}
    for device, context in contexts.items():
        assert context._reader("train", fingerprint(dist_cases.blobs("train")))._options["pin_memory"] == (
            device == "cuda"
        )
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, **options: asked.append((str(device), options)) or self
    )
    for context in contexts.values():
        to_device({"x": [x]}, context.device)
    assert asked == [(device, {"non_blocking": True}) for device in ("cuda", "cpu")]


def test_only_the_processes_of_the_split_in_use_are_kept(tmp_path):
    before = {p.pid for p in children()}
    context = reading(dist_cases.config(tmp_path, loader_workers=1, data="loading_cases:split"))
    for name in ("val", "test", "val"):
        data = fingerprint(load_split(context.config, name))
        assert len(list(context.batches(name, data, 0, 8))) == 2
        wait_until(lambda: len({p.pid for p in children()} - before) == 1)


@pytest.fixture
def reader():
    """Make readers that are closed at the end."""
    made = []

    def make(dataset, batch_size=4, workers=2, **options):
        made.append(ReadAhead(dataset, batch_size, workers=workers, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def same(one, other):
    one, other = list(one), list(other)
    assert [offset for offset, _, _ in one] == [offset for offset, _, _ in other]
    assert all(torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True))
    assert one


def tensors(n=24):
    return TensorDataset(torch.arange(n * 2.0).reshape(n, 2), torch.arange(n))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_those_without_processes_range_after_range(reader, workers):
    for dataset in (Traced(), tensors()):
        ahead = reader(dataset, workers=workers)
        for start, stop in ((0, 10), (10, 24), (3, 4), (0, 24)):
            same(ahead.batches(start, stop), batches(dataset, start, stop, 4))


def test_the_processes_stay_from_range_to_range_and_read_ahead(reader, tmp_path):
    ahead = reader(Traced(48, str(tmp_path)))
    for start in (0, 24):
        found = ahead.batches(start, start + 24)
        next(found)
        wait_until(lambda start=start: sum(map(len, reads(tmp_path).values())) >= start + 16)
        assert len(list(found)) == 5
    read = reads(tmp_path)
    assert len(read) == 2 and os.getpid() not in read
    assert sorted(index for own in read.values() for index in own) == list(range(48))


def test_a_range_that_is_given_up_does_not_leak_into_the_next(reader):
    ahead = reader(Traced())
    for start, stop in ((0, 24), (8, 24), (0, 3)):
        next(ahead.batches(start, stop))
    same(ahead.batches(12, 24), batches(Traced(), 12, 24, 4))


def test_two_ranges_at_once_are_a_mistake_of_the_caller(reader):
    ahead = reader(Traced(), workers=0)
    first = ahead.batches(0, 24)
    next(first)
    next(ahead.batches(0, 24))
    with pytest.raises(AssertionError, match="another range was begun"):
        list(first)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("what", "text"), [("raises", "KeyError: 'no file 13.png'"), ("odd", "Odd: 1 and 2")])
def test_an_error_names_the_example_and_the_next_range_is_read(reader, what, text, workers):
    ahead = reader(Traced(trap=13, what=what), workers=workers)
    found = ahead.batches(4, 24)
    assert [next(found)[0], next(found)[0]] == [4, 8]
    with pytest.raises(ExampleError) as caught:
        next(found)
    assert f"--data: example 13 cannot be read ({text})" in str(caught.value)
    assert caught.value.examples == [13]
    assert workers or type(caught.value.__cause__).__name__ in text
    same(ahead.batches(16, 24), batches(Traced(), 16, 24, 4))


def test_a_refusal_stays_one_on_its_way_from_a_process(reader):
    ahead = reader(Traced(), collate=Collate(path="loading_cases:nothing"))
    with pytest.raises(SettingsError, match="--collate: got 'loading_cases:nothing'"):
        list(ahead.batches(0, 4))


def test_a_batch_that_cannot_be_sent_is_refused_and_not_waited_for(reader):
    ahead = reader(Traced(), collate=Collate(path="loading_cases:join_to_lock"))
    with pytest.raises(
        SettingsError, match=r"batch of examples 0 to 3 cannot be sent .*_thread.lock.*--loader-workers 0"
    ):
        list(ahead.batches(0, 4))


def test_a_process_that_dies_is_said_and_replaced(reader):
    ahead = reader(Traced(trap=9, what="dies"))
    with pytest.raises(
        ExampleError, match=r"--loader-workers: a process that read ahead died .*examples from [048].*0 reads"
    ):
        list(ahead.batches(0, 24))
    same(ahead.batches(12, 24), batches(Traced(), 12, 24, 4))


def test_a_data_set_that_cannot_be_sent_is_refused(reader):
    for dataset in (Unsendable(), [lambda: 1]):
        with pytest.raises(SettingsError, match="--loader-workers: the data set cannot be sent .*--loader-workers 0"):
            list(reader(dataset).batches(0, 1))


def test_what_the_main_module_defines_is_noticed(monkeypatch):
    """Such a data set needs the main module in the processes; others must not run it."""
    kind = type("OfMain", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "OfMain", kind, raising=False)
    assert check_sendable([kind()]) and not check_sendable(Traced()) and not check_sendable(tensors())


def test_the_processes_compute_as_this_one_does_and_its_draws_are_left_alone(reader):
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        ((_, threads, double),) = reader(State(), threads=3).batches(0, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert threads.unique().tolist() == [3] and bool(double.all())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_two_processes_decode_the_same_chunk(reader, tmp_path):
    """Batches of one chunk are read by one process, where they do not cross into the next."""
    group = zarr.create_group(tmp_path / "data")
    group.create_array("train/x", data=np.arange(64.0, dtype=np.float32).reshape(32, 2), chunks=(8, 2))
    group.create_array("train/y", data=np.arange(32), chunks=(8,))
    dataset = ZarrSplit(str(tmp_path / "data"), "train")
    ahead = reader(dataset, batch_size=2)
    ranges = _Ranges(2, dataset.chunk_of)
    ranges.start, ranges.stop = 0, 32
    assert [len(unit) for unit in ranges] == [4, 4, 4, 4]
    ranges.start, ranges.stop = 6, 11
    assert [len(unit) for unit in ranges] == [1, 2]
    same(ahead.batches(0, 32), batches(dataset, 0, 32, 2))


# ------------------------------------------------------------------ processes


def test_no_process_stays_behind_when_a_reader_is_closed_or_dropped():
    before = {p.pid for p in children()}
    for end in (lambda ahead: ahead.close(), lambda ahead: None):
        ahead = ReadAhead(Traced(), 4, workers=2)
        list(ahead.batches(0, 8))
        assert len({p.pid for p in children()} - before) == 2
        end(ahead)
        del ahead
        wait_until(lambda: {p.pid for p in children()} <= before)


SCRIPT = """
import sys, time
from loading_cases import Traced
from laplace_dist.data.read_ahead import ReadAhead, _Ranges
print("begun", flush=True)
ahead = ReadAhead(Traced(24, sys.argv[1]), 4, workers=2)
print(len(list(ahead.batches(0, 24))), flush=True)
time.sleep(60)
"""


def test_a_script_without_a_guard_is_not_run_again_and_its_death_ends_the_processes(tmp_path, environment):
    """Plain spawning would run the script once more in each process, until multiprocessing stops it with a traceback."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert [process.stdout.readline(), process.stdout.readline()] == ["begun\n", "6\n"]
        pids = list(reads(tmp_path))
        assert len(pids) == 2 and process.pid not in pids
    finally:
        process.kill()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30)
    assert "Traceback" not in process.communicate(timeout=10)[1]


# ------------------------------------------------------------------ whole runs


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of every factor of the current posterior."""
    from laplace_dist.run import lifecycle, pointer, versions

    store = Checkpoint(str(folder))
    plan = lifecycle.read_plan(store)
    found = versions.read_version(store, plan, pointer.read_current(store)["version"])["factors"]
    return {name: place["entry"]["sha256"] for name, place in found.items()}


def test_bits_do_not_depend_on_the_processes(tmp_path):
    found = {}
    for workers in (0, 2):
        config = dist_cases.config(tmp_path / str(workers), loader_workers=workers, skip_evaluate=False)
        found[workers] = dist_cases.run_inline(config), contents(tmp_path / str(workers))
    assert found[0] == found[2]
    dist_cases.run_inline(dist_cases.config(tmp_path / "0", loader_workers=1))  # which is no other run


def test_a_worker_of_ray_reads_ahead_from_s3_beside_its_own_connection(cluster, s3, tmp_path):
    """The data lie on S3, and s3fs, which cannot be forked, is in use in the worker when the processes start."""
    from laplace_dist import fit

    url = s3.url()
    x, y = dist_cases.tensors("train")
    group = zarr.create_group(f"{url}/data", storage_options=s3.options)
    group.create_array("train/x", data=x.numpy(), chunks=(8, 1, 6, 6))
    group.create_array("train/y", data=y.numpy(), chunks=(8,))
    options = {"storage_options": s3.options, "data_storage_options": s3.options}
    fit(dist_cases.config(f"{url}/run", data=f"{url}/data", loader_workers=2, num_workers=1, **options))
    dist_cases.run_inline(dist_cases.config(tmp_path))
    from laplace_dist.run import lifecycle, pointer, versions

    store = Checkpoint(f"{url}/run", s3.options)
    plan = lifecycle.read_plan(store)
    factors = versions.read_version(store, plan, pointer.read_current(store)["version"])["factors"]
    assert {name: place["entry"]["sha256"] for name, place in factors.items()} == contents(tmp_path)


def test_a_worker_of_ray_that_is_killed_takes_its_processes_along(cluster, tmp_path):
    import ray

    @ray.remote(max_restarts=0)
    class Actor:
        def read(self, folder):
            self.ahead = ReadAhead(Traced(24, folder), 4, workers=2)
            return os.getpid(), len(list(self.ahead.batches(0, 24)))

    actor = Actor.options(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}).remote()
    pid, count = ray.get(actor.read.remote(str(tmp_path)), timeout=120)
    pids = list(reads(tmp_path))
    assert count == 6 and len(pids) == 2 and pid not in pids
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(psutil.pid_exists(one) for one in pids), 30)
