"""Whole runs on a real S3 server: the bits of a local run, resumed, loaded, verified, and no secret left anywhere."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import dist_cases
import pytest
from forked import Forked
from storage_cases import recorded_run

import laplace_dist
from laplace_dist import load_posterior
from laplace_dist.errors import SettingsError
from laplace_dist.job import evaluate_posterior, fit
from laplace_dist.report.loading import loading_lines
from laplace_dist.run import lifecycle, versions
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.context import Context
from laplace_dist.stages.map import MapSegment

ROOT = Path(__file__).resolve().parents[2]


def factor_digests(store):
    """Return the name of the current version and the sha256 of every factor."""
    plan = lifecycle.read_plan(store)
    version = json.loads(store.read("CURRENT.json"))["version"]
    factors = versions.read_version(store, plan, version)["factors"]
    return version, {name: place["entry"]["sha256"] for name, place in factors.items()}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Return the version and the digests of the same run on a local directory."""
    url = tmp_path_factory.mktemp("local") / "run"
    dist_cases.run_inline(dist_cases.config(url))
    return factor_digests(Checkpoint(str(url)))


def assert_no_secret(s3, texts):
    """Assert that neither the key nor the secret is in any of the texts, by name."""
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        for planted in (s3.key, s3.secret):
            assert planted.encode() not in content, name


def everything(store):
    return {key: store.read(key) for key in store.list()}


def test_a_run_on_s3_is_the_run_on_a_directory(s3, local, caplog, capsys):
    """Interrupted after two segments and continued, then tuned, evaluated, loaded and verified."""
    caplog.set_level(logging.INFO)  # botocore logs the name of the key, never the secret, at DEBUG
    url = s3.url()
    changes = {"storage_options": s3.options, "skip_tune": False, "skip_evaluate": False, "ood": ["other"]}
    config = dist_cases.config(url, **changes)
    store = Checkpoint(url, s3.options)
    with dist_cases.inline_job(config) as job:
        job.open()
        for segment in job.plan.segments[:2]:
            Context(job.config).carry_out(MapSegment(job.plan.digest, segment))
    before = everything(store)
    assert {key for key in before if key.startswith("partials/") and key.count("/") == 1} == {
        "partials/000000.json",
        "partials/000001.json",
    }
    version, pool = recorded_run(config)
    assert sorted(task.segment.id for task in pool.done(MapSegment)) == [f"{i:06d}" for i in range(2, 6)]
    after = everything(store)
    assert {key: after[key] for key in before} == before
    assert factor_digests(store) == local
    assert json.loads(after["evaluation/metrics.json"])["laplace"]["accuracy"] > 0

    la = load_posterior(url, dist_cases.convnet(), storage_options=s3.options)
    assert la.prior_precision.item() != 1.0
    assert la(dist_cases.tensors("test")[0]).shape == (20, 3)
    assert laplace_dist.status(url, s3.options)["complete"]
    report = laplace_dist.verify(url, s3.options)
    assert (report.problems, report.orphans, report.versions) == ([], {}, [version])

    printed = capsys.readouterr()
    assert b"storage" in after["config.yaml"], "the snapshot says that the options are left out"
    assert_no_secret(s3, {**after, "log": caplog.text, "stdout": printed.out, "stderr": printed.err})
    assert_no_secret(s3, {"config": repr(config) + str(config) + config.to_yaml(), "job": repr(job)})


def test_a_run_in_a_place_that_looks_like_a_pattern_is_the_run_on_a_directory(s3, local):
    """It is read back, resumed, verified and loaded; the run beside it, which the pattern would match, stays."""
    url = s3.url()
    near, odd = Checkpoint(f"{url}1", s3.options), f"{url}[1]"
    near.create("plan.json", b"not a plan")
    config = dist_cases.config(odd, storage_options=s3.options)
    for _ in range(2):
        dist_cases.run_inline(config)
        assert factor_digests(Checkpoint(odd, s3.options)) == local
    assert laplace_dist.status(odd, s3.options)["complete"]
    assert laplace_dist.verify(odd, s3.options).ok
    assert load_posterior(odd, dist_cases.convnet(), storage_options=s3.options).n_data > 0
    dist_cases.run_inline(dist_cases.config(odd, storage_options=s3.options, seed=1, fresh=True))
    assert near.list() == ["plan.json"]


def test_orphans_on_s3_are_found_and_collected(s3):
    url = s3.url()
    dist_cases.run_inline(dist_cases.config(url, storage_options=s3.options, segment_size=44))
    store = Checkpoint(url, s3.options)
    before = store.list()
    store.replace("partials/000000/crashed/zarr.json", b"half")
    report = laplace_dist.verify(url, s3.options)
    assert list(report.orphans) == ["partials/000000/crashed"]
    assert 0 <= report.orphans["partials/000000/crashed"] < 0.1, "the age is in hours, whatever the time zone"
    assert laplace_dist.verify(url, s3.options, collect_orphans_older_than=1).collected == []
    assert laplace_dist.verify(url, s3.options, collect_orphans_older_than=0).collected == list(report.orphans)
    assert store.list() == before


def test_wrong_options_are_refused_before_anything_is_done(s3):
    bad = {**s3.options, "secret": "not-the-secret"}
    url = s3.url()
    for call in (
        lambda: dist_cases.run_inline(dist_cases.config(url, storage_options=bad)),
        lambda: laplace_dist.verify(url, bad),
        lambda: laplace_dist.status(url, bad),
        lambda: load_posterior(url, dist_cases.convnet(), storage_options=bad),
    ):
        with pytest.raises(SettingsError, match="--checkpoint 's3://") as caught:
            call()
        assert_no_secret(s3, {"message": str(caught.value)})
    assert Checkpoint(url, s3.options).list() == []


def test_the_lines_that_load_a_run_on_s3_work_and_hold_no_secret(s3):
    url = s3.url()
    config = dist_cases.config(url, storage_options=s3.options, segment_size=44)
    version, _ = dist_cases.run_inline(config)
    code = loading_lines(config, url)
    assert_no_secret(s3, {"code": code})
    names = {"storage_options": s3.options}
    exec(code, names)  # noqa: S102 - what the job tells its user to type
    assert type(names["la"]).__name__ == "KronLaplace"


# ------------------------------------------------------------------ with Ray workers


def test_ray_workers_and_follow_on_jobs_get_the_options_and_keep_none(s3, cluster, local, capfd):
    """Options travel to the workers as arguments of their actors; the follow-on job is given them again."""
    import ray

    url = s3.url()
    config = dist_cases.config(url, storage_options=s3.options, num_workers=2)
    fit(config)
    store = Checkpoint(url, s3.options)
    assert factor_digests(store) == local
    result = evaluate_posterior(config)
    assert result.metrics["map"]["accuracy"] > 0
    assert laplace_dist.verify(url, s3.options).ok
    printed = capfd.readouterr()
    assert_no_secret(s3, {**everything(store), "stdout": printed.out, "stderr": printed.err})
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = {str(path): path.read_bytes() for path in (session / "logs").rglob("*") if path.is_file()}
    assert logs
    assert_no_secret(s3, logs)


def test_a_job_as_a_process_reads_its_options_from_a_file(s3, cluster, local, environment, tmp_path):
    """A follow-on job without the options is refused; its command line shows no secret."""
    url = s3.url()
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps({"checkpoint": url, "storage_options": s3.options}))
    os.chmod(settings, 0o600)
    bare = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
    bare |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    dist_cases.run_inline(dist_cases.config(url, storage_options=s3.options))

    def job(*arguments):
        process = Forked(ROOT / "jobs" / "verify.py", list(arguments), bare)
        out, err = process.communicate()
        return process.returncode, out, err

    whole = job(f"--config={settings}")
    assert (whole[0], whole[2]) == (0, "")
    assert "6 of 6 segments committed" in whole[1]
    endpoint = json.dumps({"client_kwargs": s3.options["client_kwargs"]})
    refused = job(f"--checkpoint={url}", f"--storage-options={endpoint}")
    assert refused[0] == 2
    assert "Traceback" not in refused[2]
    assert_no_secret(
        s3, {f"{name} {i}": said[i] for name, said in (("whole", whole), ("refused", refused)) for i in (1, 2)}
    )
