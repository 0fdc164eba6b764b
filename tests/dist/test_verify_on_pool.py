"""A verification whose checks are spread over workers says what the one in a single process says, in the same order."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import dist_cases
import pytest

import laplace_dist
from laplace_dist.cli import verify_main
from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.execution.inline import InlinePool
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.stages.verify import CarryOutCheck
from laplace_dist.storage.sealed_json import seal_json

SETTINGS = {"skip_tune": False, "skip_evaluate": False, "ood": ["other"], "batch_size": 8}
NOTHING = {"model": "-", "data": "-"}  # neither is looked at


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the directory of a finished run of several parts with all that a run can have; not to be changed."""
    url = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laplace_dist.plan.plan.PART_ENTRIES", 60)
        dist_cases.run_inline(dist_cases.config(url, **SETTINGS))
    assert len(Checkpoint(str(url)).list("parts", recursive=False)) > 3
    return url


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def one(run, pattern):
    """Return the first object whose key matches, under the run's directory."""
    return run / next(key for key in Checkpoint(str(run)).list() if re.fullmatch(pattern, key))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def forge_a_factor(run):
    """Put other numbers under a version's manifest that is sealed anew: each object is whole, the sum is wrong."""
    store = Checkpoint(str(run))
    (key,) = [key for key in store.list("posteriors", recursive=False) if key.endswith(".json")]
    manifest = open_json(store.read(key), key)
    name, place = next(iter(sorted(manifest["factors"].items())))
    value = 2 * store.read_array(place["prefix"], name, place["entry"])
    forged = f"{key.removesuffix('.json')}/forged"
    symmetric = {name} if place["entry"]["packed"] else set()
    place.update(prefix=forged, entry=store.write_arrays(forged, {name: value}, symmetric)[name])
    store.replace(key, seal_json(manifest))


DAMAGE = {
    "a chunk of two partials": lambda run: [
        truncate(one(run, rf"partials/{segment}/[^/]+/00002/c/0")) for segment in ("000004", "000001")
    ],
    "a missing chunk": lambda run: one(run, r"partials/000002/[^/]+/00000/c/0").unlink(),
    "a group of a partial": lambda run: truncate(one(run, r"partials/000003/[^/]+/zarr\.json")),
    "a manifest of a partial": lambda run: truncate(run / "partials" / "000001.json"),
    "no manifest of a partial": lambda run: (run / "partials" / "000001.json").unlink(),
    "a part's numbers": lambda run: truncate(one(run, r"parts/00001/[^/]+/sum/c/0")),
    "a part's manifest": lambda run: truncate(run / "parts" / "00002.json"),
    "no manifest of a part": lambda run: (run / "parts" / "00000.json").unlink(),
    "a factor": lambda run: truncate(one(run, r"posteriors/[^/]+/[^/]+/.*/c/0")),
    "a factor of other numbers": forge_a_factor,
    "a tuning's array": lambda run: one(run, r"tuning/[^/]+/[^/]+/prior_precision/(c|c/0)").unlink(),
    "a shard of an evaluation": lambda run: one(run, r"evaluation/[^/]+/.+\.json").unlink(),
    "the pointer": lambda run: (run / "CURRENT.json").unlink(),
    "an orphan": lambda run: shutil.copytree(run / "parts" / "00000", run / "partials" / "000001" / "crashed"),
    "the plan": lambda run: truncate(run / "plan.json"),
}


def facts(report):
    """Return all that a report says but for the time that has passed."""
    return {**vars(report), "orphans": list(report.orphans)}


def test_a_whole_run_gives_the_same_report_and_nothing_is_written(run, monkeypatch):
    alone, before = laplace_dist.verify(str(run)), Checkpoint(str(run)).list()
    monkeypatch.setattr("laplace_dist.stages.context.Context.model", None)  # asking for it would be an error
    written = []
    monkeypatch.setattr(Checkpoint, "replace", lambda self, key, data: written.append(key))
    pooled = laplace_dist.verify(str(run), executor=laplace_dist.Inline)
    assert facts(pooled) == facts(alone) and alone.ok and sum(alone.environments.values()) > 10
    assert (Checkpoint(str(run)).list(), written) == (before, [])


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_same_problems_and_notes_are_reported_in_the_same_order(run, damage):
    DAMAGE[damage](run)
    alone, pooled = (laplace_dist.verify(str(run), executor=executor) for executor in (None, laplace_dist.Inline))
    assert facts(pooled) == facts(alone)
    assert alone.problems or alone.notes or alone.orphans
    assert len(set(alone.problems)) == len(alone.problems), "each is said once"


def harm_a_lot(run):
    for damage in ("a chunk of two partials", "a group of a partial", "a part's numbers", "a shard of an evaluation"):
        DAMAGE[damage](run)
    shutil.rmtree(one(run, r"partials/000000/[^/]+/00003/c/0").parent)


class Backwards(InlinePool):
    """Finishes the last of the tasks first."""

    size, done = 100, []

    def wait(self, seconds, limit):
        self._waiting.rotate(1)
        events = super().wait(seconds, limit)
        self.done += [event.receipt["number"] for event in events]
        return events


def test_the_order_in_which_checks_finish_does_not_show(run, monkeypatch):
    harm_a_lot(run)
    alone = laplace_dist.verify(str(run))
    assert len(alone.problems) > 4
    monkeypatch.setattr(laplace_dist.Inline, "pool", lambda self, *_: Backwards(self._config))
    assert facts(laplace_dist.verify(str(run), executor=laplace_dist.Inline)) == facts(alone)
    assert [3, 2, 1, 0] in [Backwards.done[i : i + 4] for i in range(len(Backwards.done))]


def test_a_cluster_gives_the_same_report_though_a_worker_dies(run, tmp_path, cluster, capsys):
    """Each check is done somewhere; the one of the worker that was killed is done again."""
    harm_a_lot(run)
    deadly = {"data": "dist_cases:DeadlyOnce", "data_args": {"folder": str(tmp_path), "trap": 13}}
    workers = dist_cases.config(run, ray_address=cluster, num_workers=2, **deadly)
    pooled = laplace_dist.verify(str(run), workers=workers, data=True)
    assert (tmp_path / "killed").exists()
    assert "segment 000001" in capsys.readouterr().out
    assert facts(pooled) == facts(laplace_dist.verify(str(run), data=dist_cases.blobs("train")))
    without = laplace_dist.verify(str(run), workers=Config(**NOTHING, checkpoint=str(run), ray_address=cluster))
    assert facts(without) == facts(laplace_dist.verify(str(run)))


def test_workers_read_each_array_and_this_process_none(run, monkeypatch):
    """Else the report would be the same, and nothing gained."""
    readers, run_, read = Counter(), CarryOutCheck.run, Checkpoint.read_pieces

    def within(self, context):
        readers[type(self.check).__name__] += 1
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "read_pieces", read)
            return run_(self, context)

    monkeypatch.setattr(Checkpoint, "read_pieces", None)  # calling it would be an error, but within a task
    monkeypatch.setattr(CarryOutCheck, "run", within)
    report = laplace_dist.verify(str(run), executor=laplace_dist.Inline)
    assert report.ok and readers["CheckPart"] > 3 and {"CheckPartials", "CheckArrays", "CheckFollowOns"} < set(readers)


def test_data_are_compared_by_whoever_opens_them(run, monkeypatch, capsys):
    flags = [f"--checkpoint={run}", "--data"]
    assert verify_main([*flags, "--ray-address=inline"]) == 0
    assert "segments compared with the data" in capsys.readouterr().out
    tensors = dist_cases.tensors

    def changed(split, dtype="float32"):
        x, y = tensors(split, dtype)
        x[30] += 1e-3
        return x, y

    monkeypatch.setattr(dist_cases, "tensors", changed)
    shown = []
    for more in ([], ["--ray-address=inline"]):
        assert verify_main([*flags, *more]) == 1
        shown.append(
            [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("verify:", "inline:"))]
        )
    assert shown[0] == shown[1] and "partials/000003.json" in shown[0][0]


def test_what_a_pool_cannot_do_is_refused_or_done_here(run, monkeypatch):
    with pytest.raises(SettingsError, match="data=True"):
        laplace_dist.verify(str(run), executor=laplace_dist.Inline, data=dist_cases.blobs("train"))
    with pytest.raises(SettingsError, match="workers="):
        laplace_dist.verify(str(run), executor=laplace_dist.Inline, data=True)
    with pytest.raises(SettingsError, match="give the training split"):
        laplace_dist.verify(str(run), data=True)
    monkeypatch.setattr(laplace_dist.Inline, "pool", None)  # calling it would be an error
    assert laplace_dist.verify(str(run), executor=laplace_dist.Inline, shallow=True).ok
    assert verify_main([f"--checkpoint={run}", "--ray-address=inline", "--shallow"]) == 0
