"""The record of a job, and what is seen of it from anywhere; counters of the cluster; records that are lost or damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import dist_cases
import pytest
import ray

import laplace_dist
from laplace_dist import cli_readers
from laplace_dist.errors import RunFailed, StorageError
from laplace_dist.execution.session import Session
from laplace_dist.job import fit
from laplace_dist.plan.segments import Segment
from laplace_dist.report.progress import Progress
from laplace_dist.report.status import lines, observed
from laplace_dist.run import journal, layout
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.journal import Journal, records
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages.map import MapSegment
from laplace_dist.testing.simulated_pool import SimulatedPool

ROOT = dist_cases.Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    """Return the checkpoint of a run that was begun."""
    with dist_cases.inline_job(dist_cases.config(tmp_path / "run")) as job:
        job.open()
    return Checkpoint(str(tmp_path / "run"))


def begun(store, clock, **changes):
    record = Journal(store, "fit", clock=lambda: clock[0], **changes)
    return record, record.stage(read_plan(store).digest, "map", "segments", 6, 1)


def test_a_record_says_what_was_done_by_whom_and_how_far_it_is(store):
    clock = [0.0]
    record, stage = begun(store, clock)
    for second in range(1, 31):
        clock[0] = float(second)
        stage.tick(busy=2, oldest="", alive=1 + second // 20)
        if second % 10 == 0:
            stage.done(8, stored=100)
    stage.failed(lost=True)
    stage.failed(lost=False)
    clock[0] = 40.0
    stage.tick(busy=2, oldest="", alive=2)
    (found,) = records(store, read_plan(store))
    assert (found["job"], found["state"], found["seconds"]) == ("fit", "at work", 40.0)
    expected = {
        "stage": "map",
        "total": 6,
        "before": 1,
        "done": 4,
        "examples": 24,
        "bytes": 300,
        "retries": 1,
        "lost": 1,
    }
    assert expected.items() <= found["stages"][0].items()
    assert [1.0, 1] in found["workers"] and [20.0, 2] in found["workers"]
    record.end(None)
    assert records(store, read_plan(store))[0]["state"] == "done"


def test_it_is_written_now_and_then_only(store, monkeypatch):
    clock, writes = [0.0], []
    monkeypatch.setattr(Checkpoint, "replace", lambda self, key, data: writes.append(clock[0]))
    _, stage = begun(store, clock)
    for second in range(60):
        clock[0] = float(second)
        stage.tick(1, "", 1)
    assert writes == [0, 10, 20, 30, 40, 50]


def test_the_number_of_samples_is_bounded_and_spread_over_the_whole_time(store):
    clock = [0.0]
    record, stage = begun(store, clock)
    for second in range(5000):
        clock[0] = float(second)
        stage.tick(1, "", 1)
    record.end(None)
    samples = [seconds for seconds, _ in records(store, read_plan(store))[0]["workers"]]
    assert journal.SAMPLES / 2 <= len(samples) <= journal.SAMPLES + 1 and samples[0] == 0 and samples[-1] > 4900
    assert max(b - a for a, b in zip(samples, samples[1:], strict=False)) <= 64


@pytest.mark.parametrize("error", [StorageError("gone"), RunFailed("no space is left")])
def test_a_storage_that_does_not_take_it_harms_nothing(store, monkeypatch, error):
    def refuse(self, key, data):
        raise error

    monkeypatch.setattr(Checkpoint, "replace", refuse)
    record, stage = begun(store, [0.0])
    stage.done(1)
    record.end(None)
    assert records(store, read_plan(store)) == []


def test_only_the_newest_records_are_kept(store, monkeypatch):
    monkeypatch.setattr(journal, "KEPT", 3)
    names = [layout.status_key(f"2026010{day}T000000-0000000{day}") for day in range(1, 6)]
    for name in names:
        store.replace(name, b"{}")
    record, _ = begun(store, [0.0])
    record.end(None)
    kept = store.list("status")
    assert len(kept) == 3 and kept[:2] == names[-2:]


def test_what_is_damaged_or_of_another_run_is_left_out_and_verify_names_what_is_damaged(store):
    record, _ = begun(store, [0.0])
    record.end(None)
    (key,) = store.list("status")
    store.replace(layout.status_key("20200101T000000-00000000"), store.read(key)[:-20])
    assert len(records(store, read_plan(store))) == 1
    other, stage = Journal(store, "fit"), None
    stage = other.stage("another plan", "map", "segments", 1, 0)
    other.end(None)
    assert stage and len(records(store, read_plan(store))) == 1
    ((bad, why),) = laplace_dist.verify(store.url).problems
    assert bad == "status/20200101T000000-00000000.json" and "Delete it: nothing depends on it" in why


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [(ValueError("two\nlines"), "failed", "two"), (KeyboardInterrupt(), "interrupted", None), (None, "done", None)],
)
def test_the_end_says_how_it_ended(store, error, state, why):
    record, _ = begun(store, [0.0])
    record.end(error)
    (found,) = records(store, read_plan(store))
    assert (found["state"], found["why"]) == (state, why)


def test_a_job_leaves_its_record_and_fresh_takes_it_away(tmp_path):
    chosen = dist_cases.config(tmp_path / "run", skip_tune=False, skip_evaluate=False)
    fit(chosen, executor=laplace_dist.Inline)
    store = Checkpoint(chosen.checkpoint)
    (found,) = records(store, read_plan(store))
    stages = {(own["stage"], own["unit"]): own for own in found["stages"]}
    assert found["state"] == "done" and stages["map", "segments"]["examples"] == dist_cases.N
    assert stages["map", "segments"]["done"] == stages["map", "segments"]["total"] == 6
    manifests = [json.loads(path.read_bytes()) for path in (tmp_path / "run" / "partials").glob("*.json")]
    stored = sum(entry["stored_bytes"] for manifest in manifests for entry in manifest["arrays"].values())
    assert stages["map", "segments"]["bytes"] == stored
    fit(chosen.model_copy(update={"fresh": True}), executor=laplace_dist.Inline)
    assert len(records(store, read_plan(store))) == 1 == len(store.list("status"))


def test_a_failed_job_says_why_in_its_record(tmp_path):
    chosen = dist_cases.config(tmp_path / "run", data="dist_cases:with_nan", data_args={"at": 20})
    with pytest.raises(RunFailed):
        fit(chosen, executor=laplace_dist.Inline)
    (record,) = observed(chosen.checkpoint)["jobs"]
    assert record["state"] == "failed" and "20" in record["why"]


def test_what_was_lost_and_retried_is_counted_as_it_happens(store):
    """On a pool that loses a worker in five, and one task of which fails once."""
    plan = read_plan(store)
    tasks = [MapSegment(plan.digest, Segment(f"{i:06d}", i, i + 1)) for i in range(40)]
    pool = SimulatedPool(4, preempted=0.2, seed=1)
    executor = SimpleNamespace(pool=lambda *_: pool, close=lambda: None)
    record = Journal(store, "fit")
    session = Session(dist_cases.config(store.url), store, lambda *_: executor, lambda text: None, journal=record)
    session.run(tasks, "cpu", Progress("map", "segments", len(tasks)))
    record.end(None)
    (stage,) = records(store, plan)[0]["stages"]
    assert stage["done"] == 40 and stage["lost"] == sum(pool.attempts.values()) - 40 > 0 and stage["retries"] == 0


# ------------------------------------------------------------------ from anywhere


def test_the_lines_say_how_far_it_is_and_when_nothing_was_heard_for_long(store):
    clock = [0.0]
    _, stage = begun(store, clock)
    stage.failed(lost=True)
    clock[0] = 20.0
    stage.done(100)
    stage.tick(2, "", 4)
    found = observed(store.url)
    start = datetime.fromisoformat(found["jobs"][0]["begun"])
    text = "\n".join(lines(found, lambda: start + timedelta(seconds=30)))
    assert f"run        {store.url}\n" in text and "0 of 6 segments, 0 of 44 examples: not complete" in text
    assert "posterior  none yet" in text
    assert text.endswith(
        "at work for 20 s, map 2/6 segments, 5 examples/s, 00:01:20 left, 4 worker(s), 1 lost with their nodes"
    )
    late = "\n".join(lines(found, lambda: start + timedelta(seconds=320)))
    assert late.endswith(", nothing heard for 00:05:00, it may be dead")
    assert datetime.now(UTC) - start < timedelta(minutes=5)


def test_the_job_prints_status_and_refuses_a_mistyped_checkpoint(store, capsys):
    assert cli_readers.status_main([store.url]) == 0
    assert "posterior  none yet\njob        no record of any" in capsys.readouterr().out
    assert cli_readers.status_main(["--checkpoint", store.url + "x"]) == 2
    assert "where there is no run; expected one that a fit job has started" in capsys.readouterr().err
    assert cli_readers.report_main([store.url + "x"]) == 2
    assert "where there is no run" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "nan", "plan.json", "../x", "evaluation/x.json", "evaluation/metrics.json"])
def test_a_report_of_an_evaluation_that_is_not_there_is_refused(store, capsys, key):
    store.replace("evaluation/metrics.json", b"{}")
    before = store.list()
    assert cli_readers.report_main([store.url, "--evaluation", key]) == 2
    said = capsys.readouterr().err
    assert f"--evaluation: got {key!r}" in said and "it has nothing" in said and "leave it out" in said
    assert store.list() == before


def test_watching_ends_when_the_newest_job_does(store, capsys, monkeypatch):
    clock = [0.0]
    record, stage = begun(store, clock)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        stage.done(10)
        clock[0] += 20
        stage.tick(1, "", 1)
        if len(looks) == 3:
            record.end(None)

    monkeypatch.setattr(cli_readers.time, "sleep", sleep)
    assert cli_readers.status_main([store.url, "--watch"]) == 0
    out = capsys.readouterr().out
    assert looks == [2.0] * 3 and "map 2/6 segments" in out and out.rstrip().endswith("done after 00:01:00")


def test_report_is_made_again_from_the_checkpoint_without_ray_and_without_the_model(tmp_path):
    chosen = dist_cases.config(tmp_path / "run", skip_tune=False, skip_evaluate=False)
    fit(chosen, executor=laplace_dist.Inline)
    assert not (tmp_path / "run" / "report.html").exists(), "skip_report"
    program = (
        "import sys; sys.modules['ray'] = sys.modules['dist_cases'] = None\n"
        f"sys.argv = ['report.py', {chosen.checkpoint!r}]\n"
        f"import runpy; runpy.run_path({str(ROOT / 'jobs' / 'report.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"report: {chosen.checkpoint}/report.html\n"), done.stderr
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")


# ------------------------------------------------------------------ counters


def exported() -> str:
    """Return what the nodes of the cluster export to Prometheus."""
    found = []
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            found.append(answer.read().decode())
    return "\n".join(found)


def value_of(name: str, kind: str, text: str) -> float:
    own = [line for line in text.splitlines() if f"{name}" in line and f'task="{kind}"' in line and line[0] != "#"]
    return sum(float(line.rpartition(" ")[2]) for line in own)


def test_a_cluster_exports_what_was_done(cluster, tmp_path):
    before = value_of("laplace_dist_examples", "MapSegment", exported())
    result = fit(dist_cases.config(tmp_path / "run", ray_address=cluster, num_workers=2, skip_report=False))
    assert result.report == f"{tmp_path / 'run'}/report.html" and (tmp_path / "run" / "report.html").is_file()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        text = exported()
        if value_of("laplace_dist_examples", "MapSegment", text) == before + dist_cases.N:
            break
        time.sleep(0.5)
    assert value_of("laplace_dist_examples", "MapSegment", text) == before + dist_cases.N
    assert (
        value_of("laplace_dist_tasks", "MapSegment", text) >= 6
        and value_of("laplace_dist_stored_bytes", "MapSegment", text) > 0
    )
