"""An S3 server that is killed and comes back, and one that fails every fifth request: the bits of an undisturbed run."""

from __future__ import annotations

import errno
import json
import logging

import dist_cases
import fault_cases
import pytest
import tenacity
from botocore import exceptions as boto
from fault_proxy import KINDS, FaultProxy
from s3server import S3Server
from storage_cases import SMALL, Outages, recorded_run
from test_s3_runs import assert_no_secret, factor_digests

import laplace_dist
from laplace_dist.errors import RunFailed
from laplace_dist.job import fit
from laplace_dist.report.progress import Progress
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.map import MapSegment
from laplace_dist.storage import retry

SEGMENTS = 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return version, digests and metrics of the small run on a directory."""
    url = tmp_path_factory.mktemp("undisturbed") / "run"
    recorded_run(dist_cases.config(url, **SMALL))
    return facts(Checkpoint(str(url)))


@pytest.fixture
def server(tmp_path_factory):
    """Start a server that this test may kill."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        yield server.start()
    finally:
        server.stop()


def facts(store):
    """Return all that a run gives: version, digests of the factors, metrics."""
    return factor_digests(store), json.loads(store.read("evaluation/metrics.json"))["laplace"]


def assert_exactly_once(store):
    """Assert that the run is whole and that there is one attempt for every manifest, the one that it names."""
    report = laplace_dist.verify(store.url, store._options)
    assert (report.problems, report.orphans) == ([], {})
    attempts = {tuple(key.split("/")[1:3]) for key in store.list("partials") if key.count("/") > 2}
    named = {
        (manifest["segment"], manifest["attempt"])
        for manifest in (json.loads(store.read(key)) for key in store.list("partials", recursive=False))
    }
    assert attempts == named
    assert len(named) == report.segments


# ------------------------------------------------------------------ the server is gone for a while

POINTS = [
    ("_put", "partials/000000/.*/c/.*", 12.0),
    ("create", r"partials/000001\.json", 0.5),
    ("_put", "posteriors/.*/c/.*", 0.5),
    ("create", r"tuning/[^/]+\.json", 0.5),
    ("create", r"evaluation/[^/]+/test-.*\.json", 0.5),
]


def test_a_run_survives_outages_at_every_stage(server, undisturbed, monkeypatch, caplog):
    """The server is killed in the middle of an array, before a manifest, and in each later stage; first for 12 s: tries lie 5 s apart."""
    url = server.url()
    outages = Outages(monkeypatch, server, POINTS)
    _, pool = recorded_run(dist_cases.config(url, storage_options=server.options, **SMALL))
    server.wait_for_restart()
    assert len(outages.fired) == len(POINTS)
    assert [receipt["won"] for receipt in pool.of(MapSegment)] == [True] * SEGMENTS
    store = Checkpoint(url, server.options)
    assert facts(store) == undisturbed
    assert_exactly_once(store)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("the storage has been failing for" in text and "trying again" in text for text in warnings)
    assert_no_secret(server, {"log": caplog.text})


def test_ray_workers_survive_an_outage_of_ten_seconds(server, cluster, monkeypatch, tmp_path):
    """It begins after the second of eleven segments, while the workers are busy with the next ones."""
    url, done = server.url(), Progress.done

    def then_kill(progress, examples, *stored):
        done(progress, examples, *stored)
        if progress.stage == "map" and progress.count == 2:
            before.update({key: Checkpoint(url, server.options).read(key) for key in committed()})
            server.outage(10.0)

    def committed():
        return Checkpoint(url, server.options).list("partials", recursive=False)

    before = {}
    monkeypatch.setattr(Progress, "done", then_kill)
    changes = {"segment_size": 4, "subset_of_weights": "last_layer"}
    fit(fault_cases.config(url, tmp_path, storage_options=server.options, num_workers=2, **changes))
    server.wait_for_restart()
    assert 2 <= len(before) < 11
    store = Checkpoint(url, server.options)
    assert {key: store.read(key) for key in before} == before
    assert fault_cases.reads(tmp_path) == {index: 1 for index in range(1, 44)}, "no segment was done again"
    assert_exactly_once(store)
    local = str(server.folder / "local")
    dist_cases.run_inline(dist_cases.config(local, **changes))
    assert factor_digests(store) == factor_digests(Checkpoint(local))


def test_an_outage_longer_than_the_patience_names_the_object_and_the_same_command_continues(
    server, undisturbed, monkeypatch
):
    url = server.url()
    config = dist_cases.config(url, storage_options=server.options, **SMALL)
    monkeypatch.setattr(retry, "PATIENCE", 0.5)
    create = Checkpoint.create

    def then_gone(store, key, data):
        if key == "partials/000001.json":
            server.stop()
        return create(store, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "create", then_gone)
        with pytest.raises(
            RunFailed, match=r"StorageError: .*run/partials/000001.* could not .*Run the same command"
        ) as e:
            recorded_run(config)
    assert_no_secret(server, {"message": str(e.value)})
    server.start()
    store = Checkpoint(url, server.options)
    first = store.read("partials/000000.json")
    _, pool = recorded_run(config)
    assert [task.segment.id for task in pool.done(MapSegment)] == ["000001"], "only that one was left"
    assert store.read("partials/000000.json") == first
    assert facts(store) == undisturbed
    assert laplace_dist.verify(url, server.options).ok


# ------------------------------------------------------------------ the server fails now and then


def test_a_run_survives_a_storage_that_fails_every_fifth_request(s3, undisturbed):
    """In every way: refused, broken, silent, and with the answer lost or cut off after the request took effect."""
    url = s3.url()
    with FaultProxy(s3.port, rate=0.2, seed=3) as proxy:
        _, pool = recorded_run(dist_cases.config(url, storage_options=proxy.options(s3.options), **SMALL))
        assert min(proxy.faults[kind] for kind in KINDS) > 0, proxy.faults
        assert proxy.faults.total() > 0.15 * proxy.requests
    assert [receipt["won"] for receipt in pool.of(MapSegment)] == [True] * SEGMENTS
    store = Checkpoint(url, s3.options)
    assert facts(store) == undisturbed
    assert_exactly_once(store)


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_every_creation_whose_answer_is_lost_counts_as_won(s3, undisturbed, kind):
    """Of plan, weights, manifests and results: the retry meets its own write, is refused, and finds its own bytes."""
    url, seen = s3.url(), set()

    def force(method, path, headers):
        if method == "PUT" and headers.get("If-None-Match") == "*" and path not in seen:
            seen.add(path)
            return kind
        return None

    with FaultProxy(s3.port, rate=0.0, force=force) as proxy:
        options = proxy.options(s3.options)
        _, pool = recorded_run(dist_cases.config(url, storage_options=options, **SMALL))
        assert proxy.faults == {kind: len(seen)}
        late = Checkpoint(url, options).create("partials/000000.json", b"another attempt")
    assert late is False, "what another attempt committed is not taken for one's own"
    names = {path.partition("/run/")[2] for path in seen}
    wanted = {"plan.json", "weights.safetensors", "partials/000000.json", "partials/000001.json"}
    assert wanted <= names
    assert {name.split("/")[0] for name in names} >= {"posteriors", "tuning", "evaluation"}
    assert [receipt["won"] for receipt in pool.of(MapSegment)] == [True] * SEGMENTS
    store = Checkpoint(url, s3.options)
    assert facts(store) == undisturbed
    assert_exactly_once(store)


def test_an_upload_in_parts_whose_last_answer_is_lost_counts_as_won(s3):
    """Large weights go up in parts; the retry of the last step finds the upload over, and its own bytes stored."""
    lost = []

    def force(method, path, headers):
        if method == "POST" and "uploadId=" in path and not lost:
            lost.append(path)
            return "lost"
        return None

    data = bytes(range(256)) * (101 * 2**12)
    with FaultProxy(s3.port, rate=0.0, force=force) as proxy:
        store = Checkpoint(s3.url(), proxy.options(s3.options, read_timeout=30))
        assert store.create("weights.safetensors", data)
        assert not store.create("weights.safetensors", b"other")
    assert len(lost) == 1
    assert Checkpoint(store.url, s3.options).read("weights.safetensors") == data


def test_ray_workers_survive_a_storage_that_fails_now_and_then(s3, cluster, undisturbed):
    url = s3.url()
    with FaultProxy(s3.port, rate=0.1, seed=5) as proxy:
        fit(dist_cases.config(url, storage_options=proxy.options(s3.options), num_workers=2, **SMALL))
        assert proxy.faults.total() > 5
    store = Checkpoint(url, s3.options)
    assert facts(store) == undisturbed
    assert_exactly_once(store)


def test_deleting_that_only_seems_to_succeed_is_tried_again(s3, monkeypatch):
    """A bulk deletion reports objects that it could not delete as part of a success."""
    store = Checkpoint(s3.url(), s3.options)
    for number in range(3):
        store.create(f"p/{number}", b"x")
    rm, calls = store._fs.fs.rm, []

    def forgetful(paths):
        calls.append(paths)
        if len(calls) != 2:
            rm(paths if len(calls) > 2 else paths[:1])

    monkeypatch.setattr(store._fs.fs, "rm", forgetful)
    store.delete_tree("p")
    assert len(calls) == 3
    assert store.list() == []


# ------------------------------------------------------------------ the storage is gone for one worker


def test_a_task_that_lost_the_storage_is_given_to_another_worker(cluster, tmp_path, capfd):
    """A worker whose storage does not answer for longer than its patience is dropped and its segment done elsewhere."""
    config = dist_cases.config(
        tmp_path / "run",
        model="storage_cases:model_without_storage",
        model_args={"folder": str(tmp_path)},
        num_workers=1,
    )
    fit(config)
    assert (tmp_path / "refused").exists()
    dist_cases.run_inline(dist_cases.config(tmp_path / "alone"))
    theirs = factor_digests(Checkpoint(str(tmp_path / "alone")))[1]
    assert factor_digests(Checkpoint(str(tmp_path / "run")))[1] == theirs


# ------------------------------------------------------------------ which failures may pass


def answered(status, code):
    error = boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    outer = OSError(errno.EINVAL, code)
    outer.__cause__ = error
    return outer


PASSING = [
    *(answered(status, "X") for status in (500, 502, 503, 504, 408, 409, 425, 429)),
    boto.EndpointConnectionError(endpoint_url="http://x"),
    boto.ReadTimeoutError(endpoint_url="http://x"),
    TimeoutError(),
    ConnectionResetError(),
    OSError(errno.EBUSY, "busy"),
]
LASTING = [
    *(answered(status, code) for status, code in ((400, "InvalidArgument"), (403, "AccessDenied"), (404, "NoSuchKey"))),
    answered(404, "NoSuchBucket"),
    boto.NoCredentialsError(),
    FileNotFoundError("x"),
    FileExistsError("x"),
    PermissionError("x"),
    OSError(errno.ENOSPC, "full"),
    ValueError("x"),
]


@pytest.mark.parametrize(("errors", "passing"), [(PASSING, True), (LASTING, False)], ids=["passing", "lasting"])
def test_only_what_may_pass_is_tried_again(monkeypatch, errors, passing):
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    for error in errors:
        answers = [error, error, "done"]

        def call(answers=answers):
            if isinstance(answer := answers.pop(0), Exception):
                raise answer
            return answer

        if passing:
            assert retry.patiently(call) == "done", repr(error)
        else:
            with pytest.raises(type(error)):
                retry.patiently(call)
            assert len(answers) == 2, repr(error)
