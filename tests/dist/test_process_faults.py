"""Workers and drivers that die, hang, run out of memory or meet bad data at exact places; on a directory and on S3."""

from __future__ import annotations

import ast
import re
import signal

import dist_cases
import fault_cases
import pytest
import zarr
from fault_cases import fault

import laplace_dist
from laplace_dist import fit, status
from laplace_dist.errors import RunFailed
from laplace_dist.execution import timeouts
from laplace_dist.execution.failures import why_it_failed
from laplace_dist.execution.liveness import short_of_memory, why_it_died
from laplace_dist.execution.raised import Raised
from laplace_dist.plan.segments import default_segment_size, plan_segments
from laplace_dist.run.checkpoint import Checkpoint

FULL = {"skip_tune": False, "skip_evaluate": False, "ood": ["other"], "grid_size": 5, "prior_range": [1e-4, 1e4]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return all that comes out of a run to which nothing happens, with tuning and evaluation."""
    url = tmp_path_factory.mktemp("undisturbed")
    dist_cases.run_inline(dist_cases.config(url, **FULL))
    return fault_cases.outcome(Checkpoint(str(url)))


@pytest.fixture
def folder(tmp_path):
    """Return where processes leave notes."""
    place = tmp_path / "notes"
    place.mkdir()
    return place


@pytest.fixture(params=["directory", "s3"])
def place(request, tmp_path):
    """Return the settings that say where a run goes, and its store."""
    if request.param == "directory":
        return {"url": str(tmp_path / "run")}, Checkpoint(str(tmp_path / "run"))
    server = request.getfixturevalue("s3")
    url = server.url()
    return {"url": url, "storage_options": server.options}, Checkpoint(url, server.options)


# ------------------------------------------------------------------ a worker dies


WORKER_FAULTS = {
    "000001": fault("worker", "write_arrays", "partials/000001/.*", "before"),
    "000002": fault("worker", "_put", "partials/000002/.*/c/.*", "middle"),
    "000003": fault("worker", "create", "partials/000003.json", "before"),
    "000004": fault("worker", "create", "partials/000004.json", "after"),
}


def test_a_worker_killed_at_each_stage_of_a_segment_changes_no_byte(cluster, undisturbed, folder, place, capsys):
    """Before the write; with half a chunk written; before the manifest; and after it, before anybody heard of it."""
    where, store = place
    fit(fault_cases.config(where.pop("url"), folder, WORKER_FAULTS.values(), num_workers=2, **where))
    notes = {name: fault_cases.fired(folder, chosen) for name, chosen in WORKER_FAULTS.items()}
    assert len({note["pid"] for note in notes.values()}) == 4, "each of them killed another process"
    assert fault_cases.factors(store) == undisturbed["factors"]

    times = fault_cases.reads(folder)
    killed = range(8, 40)
    assert times == {index: 2 if index in killed else 1 for index in range(1, 44)}, "nothing else was done again"
    manifests = fault_cases.manifests(store)
    assert len(manifests) == 6
    assert manifests["partials/000004.json"].decode() == notes["000004"]["data"], "the dead worker's commit stands"
    assert fault_cases.orphans(store) == {"partials/000002", "partials/000003"}, "the second attempt of 4 was deleted"
    said = capsys.readouterr().out
    assert said.count("process died, and its node lives on") == 4 and said.count("it is done again") == 4

    laplace_dist.verify(store.url, store._options, collect_orphans_older_than=0)
    assert fault_cases.orphans(store) == set()
    assert fault_cases.factors(store) == undisturbed["factors"]


@pytest.mark.parametrize("number", [0, 5], ids=["the first segment", "the last one"])
def test_a_worker_killed_while_it_commits_beside_the_next_segment_loses_these_two(
    cluster, undisturbed, folder, tmp_path, number
):
    planted = fault("worker", "write_arrays", f"partials/{number:06}/.*")
    fit(fault_cases.config(tmp_path / "run", folder, [planted], beside=True, num_workers=1))
    assert fault_cases.factors(Checkpoint(str(tmp_path / "run"))) == undisturbed["factors"]
    times = fault_cases.reads(folder)
    own, beside = range(8 * number, 8 * number + 8), range(8 * number - 8, 8 * number + 16)
    assert all(times[index] == 2 for index in own if 0 < index < 44)
    assert all(times[index] in (1, 2) for index in beside if 0 < index < 44), (
        "one of them was under way, or had not been told of"
    )
    assert all(times[index] == 1 for index in range(1, 44) if index not in beside)


def test_a_worker_killed_in_reduction_tuning_or_evaluation_changes_nothing(cluster, undisturbed, folder, tmp_path):
    faults = [
        fault("worker", "_put", "posteriors/.*/c/.*", "middle"),
        fault("worker", "create", "tuning/.*/.*.json", "after"),
        fault("worker", "create", "evaluation/.*/test-.*.json", "before"),
    ]
    fit(fault_cases.config(tmp_path / "run", folder, faults, num_workers=2, **FULL))
    assert len({fault_cases.fired(folder, chosen)["pid"] for chosen in faults}) == 3
    store = Checkpoint(str(tmp_path / "run"))
    assert fault_cases.outcome(store) == undisturbed
    assert set(fault_cases.reads(folder).values()) == {1}
    assert set(fault_cases.reads(folder, "other").values()) == {1}
    shards = plan_segments(20, default_segment_size(20, 4), 4)
    for split, planted in (("val", faults[1]), ("test", faults[2])):
        key = fault_cases.fired(folder, planted)["key"]
        [again] = [range(s.start, s.stop) for s in shards if key.endswith(f"{s.id}.json")]
        times = {index: 2 if index in again else 1 for index in range(1, 20)}
        assert fault_cases.reads(folder, split) == times, f"of {split}, the shard of {key} alone is done again"


# ------------------------------------------------------------------ the driver dies


DRIVER_FAULTS = {
    "before the plan": fault("driver", "create", "plan.json", "before"),
    "planned": fault("driver", "create", "plan.json", "after"),
    "mapping": fault("driver", "done", "map/2", "before"),
    "between the last partial and the reduction": fault("driver", "done", "map/5", "after"),
    "reduced, not committed": fault("driver", "create", "posteriors/.*.json", "before"),
    "committed, not current": fault("driver", "create", "CURRENT.json", "before"),
    "tuning": fault("driver", "done", "tune/1", "before"),
    "evaluation": fault("driver", "done", "evaluate/1", "before"),
    "report": fault("driver", "replace", "evaluation/metrics.json", "before"),
}


def test_a_driver_killed_at_each_stage_is_continued_by_the_same_command(
    cluster, undisturbed, folder, tmp_path, environment
):
    """One command, submitted again after each of nine deaths: no example is read by two workers."""
    store, stages = Checkpoint(str(tmp_path / "run")), []
    chosen = fault_cases.config(
        tmp_path / "run", folder, DRIVER_FAULTS.values(), num_workers=1, ray_address=cluster, **FULL
    )
    before: dict[str, bytes] = {}
    for stage, planted in DRIVER_FAULTS.items():
        process = fault_cases.start_job(tmp_path / "job.json", environment, chosen=chosen)
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, (stage, out, err)
        assert fault_cases.fired(folder, planted)["pid"] == process.pid
        now = {key: store.read(key) for key in store.list() if key.endswith(".json")}
        assert before.items() <= {**now, "CURRENT.json": before.get("CURRENT.json", b"")}.items(), stage
        stages.append((stage, len(fault_cases.manifests(store)), store.exists("CURRENT.json")))
        before = now
    assert [count for _, count, _ in stages] == [0, 0, 3, 6, 6, 6, 6, 6, 6]
    assert [current for *_, current in stages] == [False] * 6 + [True] * 3

    process = fault_cases.start_job(tmp_path / "job.json", environment, chosen=chosen)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "map: 6 of 6 segments were committed before" in out
    assert "/s," not in out and "evaluate:" not in out, "all of it was done before"
    assert fault_cases.outcome(store) == undisturbed
    for split, examples in (("train", 44), ("val", 20), ("test", 20), ("other", 20)):
        assert fault_cases.reads(folder, split) == {index: 1 for index in range(1, examples)}, split


# ------------------------------------------------------------------ two at once


def test_two_drivers_on_one_checkpoint_at_once_both_finish(undisturbed, cluster, folder, place, tmp_path, environment):
    """They start together, and both have each segment ready before either commits it: one wins, one deletes its own."""
    where, store = place
    keys = ["plan.json", r"partials/\d+.json"]
    faults = [fault("driver", "create", keys[0], act="meet"), fault("worker", "create", keys[1], act="meet")]
    faults += [fault("driver", "create", key, act="meet") for key in ("posteriors/.*.json", "CURRENT.json")]
    chosen = fault_cases.config(where.pop("url"), folder, faults, num_workers=1, ray_address=cluster, **where, **FULL)
    jobs = [fault_cases.start_job(tmp_path / f"{i}.json", environment, chosen=chosen) for i in range(2)]
    ends = [(process.communicate(), process.returncode) for process in jobs]
    assert [code for _, code in ends] == [0, 0], ends
    assert len(list(folder.glob("fired-*"))) == 2 * 9, "at the plan, six segments, the posterior, CURRENT"
    assert set(fault_cases.reads(folder).values()) == {2}
    assert len(fault_cases.manifests(store)) == 6
    assert status(store.url, store._options)["examples_committed"] == 44
    assert fault_cases.outcome(store) == undisturbed
    assert fault_cases.orphans(store) == set(), "every loser has deleted its arrays"


# ------------------------------------------------------------------ a worker hangs


def test_a_worker_that_hangs_is_found_by_the_measured_time_out(
    cluster, undisturbed, folder, tmp_path, monkeypatch, capsys
):
    """It is stopped for good, holding the only free CPU; nobody gave a time-out."""
    import ray

    monkeypatch.setattr(timeouts, "FLOOR_SECONDS", 6.0)
    monkeypatch.setattr(timeouts, "TIMES", 1)
    others = ray.remote(num_cpus=3)(object).remote()
    planted = fault("worker", "write_arrays", "partials/000004/.*", act="stop")
    try:
        fit(fault_cases.config(tmp_path / "run", folder, [planted], num_workers=1))
    finally:
        ray.kill(others)
    pid = fault_cases.fired(folder, planted)["pid"]
    fault_cases.wait_until_gone(pid)  # it was ended, and its CPU was given to another worker
    assert fault_cases.factors(Checkpoint(str(tmp_path / "run"))) == undisturbed["factors"]
    assert fault_cases.reads(folder) == {index: 2 if 32 <= index < 40 else 1 for index in range(1, 44)}
    said = capsys.readouterr().out
    why = r"it took longer than \d+ s, 1 times the slowest so far and at least 6 s; --segment-timeout sets another"
    assert re.search(rf"segment 000004 \(examples 32 to 39\): its worker seems to hang: {why}", said)


# ------------------------------------------------------------------ memory


def test_a_worker_without_memory_says_what_to_lower(cluster, undisturbed, folder, tmp_path, capsys):
    """The allocator of torch refuses for real, twice in segment 1, and once in segment 3, which the worker does again by itself."""
    planted = [
        fault("worker", "write_arrays", f"partials/00000{which}", act="exhaust") for which in ("1/.*", "[1]/.*", "3/.*")
    ]
    fit(fault_cases.config(tmp_path / "run", folder, planted, num_workers=1))
    for one in planted:
        fault_cases.fired(folder, one)
    assert fault_cases.factors(Checkpoint(str(tmp_path / "run"))) == undisturbed["factors"]
    said = capsys.readouterr().out.splitlines()
    assert not [line for line in said if "segment 000003" in line]
    assert all(fault_cases.reads(folder)[index] == 2 for index in range(24, 32))
    [line] = [line for line in said if "segment 000001" in line]
    assert "allocate" in line and "The worker ran out of memory" in line
    assert all(f"--{name}" in line for name in ("num-workers", "batch-size", "hessian-structure", "fresh"))


def test_a_worker_that_ray_ends_for_its_memory_is_replaced_and_says_what_to_lower(
    undisturbed, folder, tmp_path, environment
):
    """Ray's own monitor ends it, since its limit lies 3 GB above what the machine uses now; the worker takes 6 GB."""
    from ray._private.utils import get_system_memory, get_used_memory

    planted = fault("worker", "write_arrays", "partials/000002/.*", act="eat")
    chosen = fault_cases.config(tmp_path / "run", folder, [planted], num_workers=1, ray_address="local")
    with fault_cases.alone("memory"):
        share = (get_used_memory() + 3 * 2**30) / get_system_memory()
        watched = {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
        process = fault_cases.start_job(tmp_path / "job.json", {**environment, **watched}, chosen=chosen)
        out, err = process.communicate()
        assert process.returncode == 0, err
        fault_cases.wait_until_gone(fault_cases.fired(folder, planted)["pid"])
    lines = [line for line in out.splitlines() if "segment 000002" in line and "its node ran low on memory" in line]
    assert lines and "it is done again" in lines[0]
    assert all(f"--{name}" in lines[0] for name in ("num-workers", "batch-size", "hessian-structure", "fresh"))
    assert fault_cases.factors(Checkpoint(str(tmp_path / "run"))) == undisturbed["factors"]
    times = fault_cases.reads(folder)  # others may be read twice, where something else takes memory meanwhile
    assert set(times) == set(range(1, 44)) and all(times[index] >= 2 for index in range(16, 24))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to"), OSError("std::bad_alloc")]
)
def test_errors_that_mean_too_little_memory_are_told_from_others(error):
    assert "--batch-size" in why_it_failed(Raised.of(error))
    assert why_it_failed(Raised.of(RuntimeError("the shapes differ"))) == "RuntimeError: the shapes differ"


MONITOR = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 15.2GB / 16.0GB"
HINTS = (
    "There are some potential root causes. (1) The process is killed by SIGKILL by OOM killer due to high memory usage.",
    "Worker exits with an exit code None. The worker may have exceeded K8s pod memory limits.",
)


def test_ray_has_ended_a_worker_for_its_memory_only_where_it_says_so():
    """What it says of any death is a list of what may have been, memory among it."""
    from ray import exceptions
    from ray.core.generated.common_pb2 import ActorDiedErrorContext

    def died(text):
        return exceptions.ActorDiedError(ActorDiedErrorContext(error_message=text, actor_id=bytes(16)))

    assert MONITOR in str(died(MONITOR))
    assert short_of_memory(exceptions.OutOfMemoryError("Task was killed")) and short_of_memory(died(MONITOR))
    assert not any(short_of_memory(error) for error in (exceptions.ActorDiedError(), *map(died, HINTS)))


def test_what_ray_says_of_a_dead_worker_is_told_with_what_to_do(cluster):
    from ray import exceptions

    assert "--num-workers" in why_it_died(exceptions.OutOfMemoryError("Task was killed due to the node running low"))
    assert "process died, and its node lives on" in why_it_died(exceptions.ActorDiedError())
    assert why_it_died(exceptions.ActorDiedError(), lost=True) == "its node was lost"
    assert why_it_died(exceptions.RayActorError(preempted=True), lost=True) == "its node was preempted"


# ------------------------------------------------------------------ bad data


def test_an_example_that_cannot_be_read_costs_only_its_segment(cluster, undisturbed, folder, tmp_path):
    """The others are finished first; once it is mended, the same command does that segment alone."""
    chosen = dist_cases.config(
        tmp_path / "run", num_workers=1, data="dist_cases:Failing", data_args={"folder": str(folder), "trap": 12}
    )
    store = Checkpoint(str(tmp_path / "run"))
    with pytest.raises(
        RunFailed, match=r"segment 000001 \(examples 8 to 15\) failed 3 times.*example 12 cannot be read"
    ):
        fit(chosen)
    before, first = fault_cases.manifests(store), fault_cases.reads(folder)
    assert sorted(before) == [f"partials/{i:06d}.json" for i in (0, 2, 3, 4, 5)]
    assert first[12] == 3 and first[13] == 0 and first[43] == 1

    (folder / "mended").touch()
    fit(chosen)
    after = fault_cases.manifests(store)
    assert {key: after[key] for key in before} == before
    assert set(fault_cases.reads(folder) - first) == set(range(8, 16)), "only this segment was read again"
    assert fault_cases.factors(store) == undisturbed["factors"]


def test_a_chunk_of_the_data_that_is_damaged_costs_only_its_segment(undisturbed, tmp_path):
    """Of a Zarr group, after the driver has read its sample; zarr's own checksum notices. In one process: Ray is met above."""
    group = zarr.create_group(tmp_path / "data")
    for name, values in zip("xy", dist_cases.tensors("train"), strict=True):
        chunks = (8, *values.shape[1:])
        arguments = {"shape": values.shape, "chunks": chunks, "compressors": zarr.codecs.Crc32cCodec()}
        group.create_array(f"train/{name}", dtype=values.numpy().dtype, **arguments)[:] = values.numpy()
    chunk = tmp_path / "data" / "train" / "x" / "c" / "1" / "0" / "0" / "0"
    good = chunk.read_bytes()
    chosen = dist_cases.config(tmp_path / "run", data=str(tmp_path / "data"))
    with dist_cases.inline_job(chosen) as job:
        job.open()
        chunk.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        message = r"segment 000001 .*failed 3 times.*ExampleError.*examples 8 to 11 cannot be read .*checksum"
        with pytest.raises(RunFailed, match=message):
            job.map()
    store = Checkpoint(str(tmp_path / "run"))
    before = fault_cases.manifests(store)
    assert sorted(before) == [f"partials/{i:06d}.json" for i in (0, 2, 3, 4, 5)]
    chunk.write_bytes(good)
    dist_cases.run_inline(chosen)
    assert before.items() <= fault_cases.manifests(store).items()
    assert fault_cases.factors(store) == undisturbed["factors"]


# ------------------------------------------------------------------ the clock


def test_a_clock_that_jumps_back_at_every_commit_changes_nothing(cluster, undisturbed, folder, tmp_path, environment):
    faults = [fault(where, "create", ".*", act="jump") for where in ("driver", "worker")]
    faults.append(fault("driver", "done", "map/.*", act="jump"))
    chosen = fault_cases.config(tmp_path / "run", folder, faults, num_workers=1, ray_address=cluster, **FULL)
    process = fault_cases.start_job(tmp_path / "job.json", environment, chosen=chosen)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.search(r"^map: 6/6 segments, \d+ examples/s, 00:\d\d:\d\d$", out, re.MULTILINE), "no time is negative"
    assert len(list(folder.glob("fired-worker*partials*"))) == 6
    assert list(folder.glob("fired-driver*posteriors*"))
    assert fault_cases.outcome(Checkpoint(str(tmp_path / "run"))) == undisturbed
    assert set(fault_cases.reads(folder).values()) == {1}


def test_nothing_but_the_age_of_orphans_names_and_records_is_told_by_the_clock_on_the_wall():
    found = set()
    for path in (fault_cases.ROOT / "laplace_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            imported = isinstance(node, ast.ImportFrom) and node.module == "time"
            if imported or re.fullmatch(r"time\.(time|time_ns|localtime|gmtime)|.*datetime\.(now|utcnow|today)", name):
                found.add(path.name)
    records = {
        "journal.py",
        "status.py",
        "facts.py",
    }  # when a job began, and when a page was made: nothing depends on it
    assert found == {"orphans.py", "opening.py", "recalibration.py", *records}


# ------------------------------------------------------------------ errors that come again


def test_an_error_that_does_not_unpickle_is_said_as_it_is_and_not_tried_ten_times(cluster, folder, tmp_path):
    """In no process but its own; the driver has no such class at hand either."""
    settings = {"model": "raising_cases:model", "model_args": {"folder": str(folder)}}
    why = r"segment \d{6} \(examples [^)]*\): StubbornError: a batch of \d does not please this model \(raising_cases.py:\d+"
    with pytest.raises(RunFailed, match=f"{why} in forward.*failed in the same way.*trying again is no use") as caught:
        fit(dist_cases.config(tmp_path / "run", num_workers=2, **settings))
    assert "\n" not in str(caught.value) and "memory" not in str(caught.value)
    assert 2 <= len(list(folder.glob("raised-*"))) <= 3
