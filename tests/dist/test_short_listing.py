"""A listing that leaves objects out, as an object store's client may give, costs work and nothing else."""

from __future__ import annotations

import dist_cases
import pytest
from storage_cases import Recording

import laplace_dist
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.map import MapSegment
from laplace_dist.stages.reduce import SumPart


@pytest.fixture
def whole(tmp_path):
    """Return a finished run in memory-sized parts, and every object of it."""
    url = tmp_path / "run"
    dist_cases.run_inline(dist_cases.config(url))
    return url, contents(url)


def contents(url):
    store = Checkpoint(str(url))
    return {key: store.read(key) for key in store.list() if key.endswith(".json")}


def leave_out(monkeypatch, missing):
    """Let every listing leave out the keys for which `missing` is true."""
    whole_list, whole_modified = Checkpoint.list, Checkpoint.modified

    def short(self, prefix="", *, recursive=True):
        return [key for key in whole_list(self, prefix, recursive=recursive) if not missing(key)]

    monkeypatch.setattr(Checkpoint, "list", short)
    monkeypatch.setattr(
        Checkpoint, "modified", lambda self: {k: t for k, t in whole_modified(self).items() if not missing(k)}
    )


def test_what_a_listing_leaves_out_is_done_again_and_loses_to_what_is_there(whole, monkeypatch):
    """Segments and parts whose manifests are not listed: the same bytes afterwards, and no array too many."""
    url, before = whole
    for name in ("CURRENT.json", "window.json", "posteriors"):
        Checkpoint(str(url)).delete_tree(name)
    with monkeypatch.context() as patch, dist_cases.inline_job(dist_cases.config(url)) as job:
        leave_out(patch, lambda key: key in ("partials/000001.json", "partials/000004.json", "parts/00000.json"))
        job.session.pool = pool = Recording(job.config)
        job.open()
        job.map()
        job.reduce()
    assert [task.segment.id for task in pool.done(MapSegment)] == ["000001", "000004"]
    assert [task.part.id for task in pool.done(SumPart)] == ["00000"]
    after = contents(url)
    kept = [key for key in before if key.startswith(("partials/", "parts/", "plan", "window"))]
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    report = laplace_dist.verify(str(url))
    assert (report.problems, report.orphans) == ([], {})


@pytest.mark.parametrize("suffix", ["0.json", "1.json", ".json"])
def test_what_a_manifest_names_that_is_not_listed_is_no_orphan(whole, monkeypatch, suffix):
    """Collecting orphans asks for the manifest that would name an attempt before it deletes it."""
    url, before = whole
    every = Checkpoint(str(url)).list()
    with monkeypatch.context() as patch:
        leave_out(patch, lambda key: key.count("/") <= 1 and key.endswith(suffix))
        assert laplace_dist.verify(str(url), collect_orphans_older_than=0).collected == []
    assert Checkpoint(str(url)).list() == every
    assert laplace_dist.verify(str(url)).ok
