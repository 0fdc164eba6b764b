"""Every object of a finished run, altered, truncated, deleted or exchanged: found by `verify`, never a wrong result."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import dist_cases
import pytest
from storage_cases import SMALL, recorded_run, repeated
from test_s3_runs import factor_digests

import laplace_dist
from laplace_dist import load_posterior
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.run import layout
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.stages.map import MapSegment
from laplace_dist.storage.sealed_json import seal_json

OWN = (CheckpointError, SettingsError, RunFailed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the directory of a finished run with everything that a run can have, and what it gives; not to be changed."""
    url = tmp_path_factory.mktemp("finished") / "run"
    recorded_run(dist_cases.config(url, **SMALL))
    return url, facts(url)


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def facts(url):
    """Return all that a run gives: version, digests of the factors, prior precision, metrics."""
    store = Checkpoint(str(url))
    prior = load_posterior(str(url), dist_cases.convnet()).prior_precision
    return factor_digests(store), prior.tolist(), store.read("evaluation/metrics.json")


def again(url):
    """Run the same command again; returns the segments that were computed, or the error."""
    try:
        _, pool = recorded_run(dist_cases.config(url, **SMALL))
    except OWN as error:
        return error
    return [task.segment.id for task in pool.done(MapSegment)]


def harm(path, kind):
    """Alter one byte, at a place that depends on the name; or truncate there; or delete."""
    data = path.read_bytes()
    at = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "big") % len(data)
    while kind == "flip" and data[at : at + 1].isspace():  # white space between JSON's words means nothing
        at = (at + 1) % len(data)
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(data[:at] + (bytes([data[at] ^ 1]) + data[at + 1 :] if kind == "flip" else b""))


def named(key, url):
    """Say whether a verification names the object."""
    try:
        report = laplace_dist.verify(str(url))
    except OWN as error:
        return key in str(error)
    return any(key in f"{name} {text}" for name, text in report.problems + report.notes)


HARMS = ["flip", "truncate", "delete"]


@pytest.mark.parametrize("kind", HARMS)
def test_no_harm_to_any_object_goes_unnoticed_or_changes_a_result(finished, tmp_path, kind):
    """`verify` names it; the same command and `load_posterior` name it too, or it makes no difference to them.

    All three harms to every object, but to those that are like their neighbours one after the other.
    """
    whole, expected = finished
    keys = Checkpoint(str(whole)).list()
    kinds = {key.split("/")[0] for key in keys}
    assert kinds >= {
        "plan.json",
        "partials",
        "posteriors",
        "tuning",
        "evaluation",
        "CURRENT.json",
        "weights.safetensors",
    }
    unnoticed, wrong, refused = [], [], 0
    middle = repeated([re.sub("/c(/[0-9]+)*$", "/chunk", key) for key in keys])
    for number, key in enumerate(keys):
        if number in middle and HARMS[number % 3] != kind:
            continue
        url = Path(shutil.copytree(whole, tmp_path / str(number)))
        harm(url / key, kind)
        for_people = key == layout.COVERAGE or key.startswith("status/")  # nothing depends on these being there
        if not named(key, url) and not (kind == "delete" and for_people):
            unnoticed.append(key)
        try:
            if isinstance(found := again(url), Exception):
                raise found
            if facts(url) != expected:
                wrong.append((key, "another result"))
        except OWN as error:
            refused += 1
            if key not in str(error):
                wrong.append((key, str(error)))
        shutil.rmtree(url)
    assert (unnoticed, wrong) == ([], [])
    assert refused > 5


def test_a_harmed_partial_is_recomputed_alone_once_its_manifest_is_deleted(finished, tmp_path):
    """Where there is no posterior yet: the error names object and manifest; what is left is that segment."""
    whole, expected = finished
    objects = [key for key in Checkpoint(str(whole)).list("partials/000001") if re.search("/(c|c/.*|zarr.json)$", key)]
    chunk = re.compile("/c(/|$)")  # and no attempt whose id begins with a c
    leaves = [
        key for key in objects if chunk.search(key) or Checkpoint(str(whole)).exists(key.replace("zarr.json", "c/0"))
    ]
    assert len(leaves) > 1
    for number, key in enumerate(leaves):
        url = Path(shutil.copytree(whole, tmp_path / str(number)))
        reopen(url, "posteriors", "tuning", "evaluation", "parts", "window.json", "CURRENT.json")
        harm(url / key, HARMS[number % 3])
        error = again(url)
        assert isinstance(error, CheckpointError)
        assert key in str(error)
        assert "delete partials/000001.json and run the same command again" in str(error)
        (url / "partials" / "000001.json").unlink()
        assert again(url) == ["000001"]
        assert facts(url) == expected


def exchange(one, two):
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])


def reopen(run, *names):
    for name in names:
        (run / name).unlink() if (run / name).is_file() else shutil.rmtree(run / name)


def test_exchanged_manifests_of_partials_are_noticed(run):
    exchange(run / "partials/000000.json", run / "partials/000001.json")
    assert named("partials/000000.json", run) and named("partials/000001.json", run)
    assert "partials/000000.json does not belong to this run" in str(again(run))


def test_exchanged_arrays_of_partials_are_noticed(run):
    """Each is whole and of the right shape, and belongs to the other segment."""
    first, second = (next((run / "partials" / name).iterdir()) for name in ("000000", "000001"))
    changed = [path.relative_to(first) for path in first.rglob("*") if path.is_file() and "c" in path.parts[-2:]]
    assert len(changed) > 0
    for name in changed:
        exchange(first / name, second / name)
    problems = dict(laplace_dist.verify(str(run)).problems)
    assert sum("sha256 in the manifest" in text for text in problems.values()) == 2 * len(changed)
    reopen(run, "posteriors", "parts", "window.json", "CURRENT.json")
    assert "its numbers do not have the sha256 in the manifest" in str(again(run))


def test_an_older_manifest_of_a_partial_leads_to_an_error_and_then_to_the_same_bytes(finished, run):
    old = (run / "partials/000001.json").read_bytes()
    reopen(
        run, "partials/000001.json", "partials/000001", "posteriors", "parts", "window.json", "CURRENT.json", "tuning"
    )
    reopen(run, "evaluation")
    assert again(run) == ["000001"]
    (run / "partials/000001.json").write_bytes(old)
    assert named("partials/000001", run)
    assert facts(run) == finished[1], "what was reduced before does not change"
    reopen(run, "posteriors", "parts", "window.json", "CURRENT.json")
    assert re.search("partials/000001/.* is missing.*delete partials/000001.json", str(again(run)))
    reopen(run, "partials/000001.json")
    assert again(run) == ["000001"]
    assert facts(run) == finished[1]


@pytest.mark.parametrize("folder", ["tuning", "evaluation"])
def test_exchanged_shards_are_noticed(tmp_path, folder):
    """They carry their own keys, so that none is counted for another."""
    url = tmp_path / "run"
    recorded_run(dist_cases.config(url, **SMALL))
    shards = sorted(path for path in (url / folder).glob("*/*.json") if path.name != "zarr.json")
    assert len(shards) > 1
    exchange(*shards[:2])
    assert named(str(shards[0].relative_to(url)), url)
    for path in (url / folder).glob("*.json"):
        path.unlink()
    if folder == "tuning":
        reopen(url, "CURRENT.json")
    with pytest.raises(CheckpointError, match=f"{shards[0].relative_to(url)} is altered.*it was written as"):
        recorded_run(dist_cases.config(url, **SMALL))


def test_a_posterior_version_under_another_name_is_noticed(run):
    """As an older version put in the place of the current one would be."""
    store = Checkpoint(str(run))
    (key,) = [key for key in store.list("posteriors", recursive=False) if key.endswith(".json")]
    version = Path(key).stem
    shutil.copytree(run / "posteriors" / version, run / "posteriors" / "0123456789abcdef")
    manifest = open_json(store.read(key), key)
    for place in manifest["factors"].values():
        place["prefix"] = place["prefix"].replace(version, "0123456789abcdef")
    store.create("posteriors/0123456789abcdef.json", seal_json(manifest))
    with pytest.raises(CheckpointError, match="posteriors/0123456789abcdef.json does not belong to this run"):
        load_posterior(str(run), dist_cases.convnet(), version="0123456789abcdef")
    assert named("posteriors/0123456789abcdef.json", run)


def test_a_tuning_of_another_version_is_noticed(run):
    store = Checkpoint(str(run))
    current = open_json(store.read("CURRENT.json"), "CURRENT.json")
    other = current["tuning"].replace(current["version"], "0123456789abcdef")
    store.create(other, store.read(current["tuning"]))
    store.replace("CURRENT.json", seal_json({**current, "tuning": other}))
    with pytest.raises(CheckpointError, match="CURRENT.json is altered"):
        load_posterior(str(run), dist_cases.convnet())
    assert named("CURRENT.json", run) and named(other, run)


def test_what_a_crash_leaves_between_two_steps_is_a_note_and_no_problem(run, capsys):
    """The posterior is committed and not yet current; the evaluation is committed and not yet shown."""
    from laplace_dist.cli import verify_main

    reopen(run, "evaluation/metrics.json")
    assert [key for key, _ in laplace_dist.verify(str(run)).notes] == ["evaluation/metrics.json"]
    reopen(run, "evaluation", "tuning", "CURRENT.json")
    report = laplace_dist.verify(str(run))
    assert ([key for key, _ in report.notes], report.ok) == (["CURRENT.json"], True)
    assert verify_main([f"--checkpoint={run}"]) == 0
    assert "note    CURRENT.json: CURRENT.json is missing" in capsys.readouterr().out
