"""Module groups: the factors are added up in several passes over the data, whatever there is of memory, in the same bits."""

from __future__ import annotations

import json

import dist_cases
import group_cases
import pytest
import torch
import window_cases

import laplace_dist
from laplace.structures.sums import CurvatureSums
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.execution.inline import Inline
from laplace_dist.report.status import lines
from laplace_dist.run import lifecycle, partial_manifests, partials, versions, windows
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.sealed_json import seal_json

WIDE = {"model": "group_cases:wide", "segment_size": 12}


def config(place, structure="full", **changes):
    return dist_cases.config(place, **{**WIDE, "hessian_structure": structure, **changes})


def fit(chosen, executor=laplace_dist.Inline):
    return laplace_dist.fit(chosen, executor=executor)


def sums_of(place, model=None):
    la = laplace_dist.load_posterior(str(place), model or group_cases.wide())
    return {name: value.numpy().tobytes() for name, value in la.sums.to_tensors().items()}, la


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Cut these small sums into several parts, so that groups begin and end within them."""
    monkeypatch.setattr("laplace_dist.plan.plan.PART_ENTRIES", 20_000)


# ------------------------------------------------------------------ the same bits


CASES = {
    "full": ({}, (2, 3)),
    "kron": ({"model_args": {"hidden": 200}}, (2, 5)),
    "diag": ({}, (2, 4)),
    "blockdiag": ({}, (2,)),
    "ekfac": ({}, (3,)),
}


@pytest.mark.parametrize("structure", CASES)
def test_a_run_of_several_groups_is_that_of_one_bit_for_bit(structure, tmp_path):
    changes, counts = CASES[structure]
    model = group_cases.wide(**changes.get("model_args", {}))
    whole = fit(config(tmp_path / "whole", structure, **changes))
    wanted, one = sums_of(tmp_path / "whole", model)
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    for count in counts:
        place = tmp_path / str(count)
        found = fit(config(place, structure, module_groups=count, **changes))
        assert found.version == whole.version, "a version is told by the bits of its sums"
        loaded, several = sums_of(place, model)
        assert loaded == wanted
        assert torch.equal(one(x), several(x))
        store = Checkpoint(str(place))
        plan = read_plan(store)
        assert (plan.module_groups, len(plan.groups)) == (count, count)
        assert plan.content == read_plan(Checkpoint(str(tmp_path / "whole"))).content
        assert len([*partial_manifests.manifests(store, plan)]) == count * len(plan.segments)
        assert windows.read_window(store, plan)["n_data"] == dist_cases.N
        report = laplace_dist.verify(str(place), data=dist_cases.blobs("train"))
        assert report.problems == [] and report.committed == report.segments == len(plan.segments)
        status = laplace_dist.status(str(place))
        assert status["complete"] and status["module_groups"] == count


def test_a_worker_holds_one_group_at_a_time(tmp_path, monkeypatch):
    """Neither the sums nor a partial are of more than a group, and dense curvature is nowhere a matrix of all weights."""
    held, sizes = [], []
    before = CurvatureSums.zero.__func__

    def watched(cls, spec, device="cpu", rows=None):
        made = before(cls, spec, device, rows)
        held.append(sum(value.nbytes for value in made.tensors.values()))
        return made

    monkeypatch.setattr(CurvatureSums, "zero", classmethod(watched))
    empty = torch.empty

    monkeypatch.setattr(torch, "zeros", _noting(torch.zeros, sizes))
    monkeypatch.setattr(torch, "empty", _noting(empty, sizes))
    with dist_cases.inline_job(config(tmp_path, module_groups=3)) as job:
        job.open()
        job.map()
    plan = read_plan(Checkpoint(str(tmp_path)))
    assert set(held) == {group.nbytes for group in plan.groups}
    assert max(sizes) * 8 < 8 * 483**2, "no tensor of weights by weights was asked for"
    assert 1.9 * max(held) < 8 * 483**2


def _noting(make, sizes):
    def made(*args, **kwargs):
        found = make(*args, **kwargs)
        sizes.append(found.numel())
        return found

    return made


# ------------------------------------------------------------------ resume, loss, damage


class Killed(RuntimeError):
    """Stands for the end of a process."""


def killed_after(monkeypatch, count):
    """Let so many partials be committed, and then the process end."""
    done = []
    before = partials.commit_partial

    def commit(*args, **kwargs):
        if len(done) >= count:
            raise KeyboardInterrupt
        done.append(1)
        return before(*args, **kwargs)

    monkeypatch.setattr(partials, "commit_partial", commit)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "blockdiag"])
def test_killed_between_groups_the_same_command_goes_on_to_the_same_bits(structure, tmp_path, monkeypatch):
    fit(config(tmp_path / "whole", structure))
    wanted, _ = sums_of(tmp_path / "whole")
    place = tmp_path / "run"
    segments = len(read_plan(Checkpoint(str(tmp_path / "whole"))).segments)
    for count in (1, segments, 1):  # within the first pass, in the second, and again
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed_after(patch, count)
            fit(config(place, structure, module_groups=2))
    status = laplace_dist.status(str(place))
    assert not status["complete"] and 0 < status["segments_committed"] < segments
    assert status["partials_committed"] == segments + 2
    [line] = [line for line in lines({**status, "current": None, "jobs": []}) if line.startswith("first fit")]
    assert f"2 of {segments} segments in 2 module groups ({segments + 2} of {2 * segments} partials)" in line
    kept = {path.name: path.read_bytes() for path in (place / "partials").glob("*.json")}
    assert len(kept) == segments + 2
    fit(config(place, structure))  # the number is the run's, whoever says nothing
    assert {path.name: path.read_bytes() for path in (place / "partials").glob("*.json") if path.name in kept} == kept
    assert sums_of(place)[0] == wanted
    assert laplace_dist.verify(str(place)).problems == []


def test_another_number_of_groups_is_refused_for_a_run_that_is_there_and_none_goes_on(tmp_path):
    fit(config(tmp_path, module_groups=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json") if path.name != "config.yaml"}
    with pytest.raises(
        SettingsError, match="--module-groups: got 3, but the run at .* is divided into 2.*leave it out"
    ):
        fit(config(tmp_path, module_groups=3))
    with pytest.raises(SettingsError, match="--module-groups: got 1, but"):
        fit(config(tmp_path, module_groups=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json") if path in before} == before
    tight = type("Tight", (Inline,), {"memory": lambda self, device: 1})
    assert fit(config(tmp_path, module_groups=2), tight).version == fit(config(tmp_path)).version


def test_more_groups_than_there_are_pieces_are_as_many_as_there_are(tmp_path):
    fit(config(tmp_path, "diag", module_groups=99))
    assert read_plan(Checkpoint(str(tmp_path))).module_groups == 4
    fit(config(tmp_path, "diag", module_groups=99))


def test_a_plan_of_one_group_is_what_it_was_before_there_were_groups(tmp_path):
    fit(config(tmp_path))
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert "module_groups" not in stored
    assert [path.name for path in sorted((tmp_path / "partials").glob("*.json"))][:2] == ["000000.json", "000001.json"]


def changed(place, key, **values):
    store = Checkpoint(str(place))
    manifest = open_json(store.read(key), key)
    manifest.pop("sha256", None)
    store.replace(key, seal_json({**manifest, **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"data_sha256": "1" * 64}, "computed from other data"), ({"loss": 1e6}, "their losses are .* and 1000000.0")],
)
def test_groups_of_other_data_do_not_make_one_sum(values, said, tmp_path):
    chosen = config(tmp_path, module_groups=2)
    with dist_cases.inline_job(chosen) as job:
        job.open()
        job.map()
    changed(tmp_path, "partials/000001-g1.json", **values)
    with pytest.raises(
        RunFailed, match=f"segment 000001-g0 .*examples 12 to 23.*do not agree: .*{said}.*delete the other"
    ):
        fit(chosen)
    assert any("do not agree" in text for _, text in laplace_dist.verify(str(tmp_path)).problems)
    (tmp_path / "partials" / "000001-g1.json").unlink()
    fit(chosen)
    whole = tmp_path / "whole"
    fit(config(whole))
    assert sums_of(tmp_path)[0] == sums_of(whole)[0]


def test_the_groups_of_a_segment_may_differ_by_what_unlike_hardware_does_to_a_loss(tmp_path):
    chosen = config(tmp_path, module_groups=2)
    with dist_cases.inline_job(chosen) as job:
        job.open()
        job.map()
    store = Checkpoint(str(tmp_path))
    loss = open_json(store.read("partials/000001-g1.json"), "partials/000001-g1.json")["loss"]
    changed(tmp_path, "partials/000001-g1.json", loss=loss * (1 + 1e-6))
    fit(chosen)
    plan = read_plan(store)
    first = [open_json(store.read(f"partials/{s.id}-g0.json"), f"partials/{s.id}-g0.json") for s in plan.segments]
    assert windows.read_window(store, plan)["loss"] == sum(manifest["loss"] for manifest in first)


@pytest.mark.parametrize("how", ["missing", "truncated", "of another group"])
def test_damage_to_one_group_is_named_and_mended_by_deleting_it(how, tmp_path):
    chosen = config(tmp_path, module_groups=3)
    fit(chosen)
    wanted, _ = sums_of(tmp_path)
    key = tmp_path / "partials" / "000002-g1.json"
    if how == "missing":
        key.unlink()
    elif how == "truncated":
        key.write_bytes(key.read_bytes()[:-9])
    else:
        key.write_bytes((tmp_path / "partials" / "000002-g2.json").read_bytes())
    report = laplace_dist.verify(str(tmp_path))
    assert any("partials/000002-g1.json" in text for _, text in report.problems) and not report.ok
    assert report.committed == report.segments - 1
    if how != "missing":
        with pytest.raises(CheckpointError, match=r"partials/000002-g1\.json"):
            lifecycle.committed(Checkpoint(str(tmp_path)), read_plan(Checkpoint(str(tmp_path))))
        key.unlink()
    fit(chosen)
    assert sums_of(tmp_path)[0] == wanted and laplace_dist.verify(str(tmp_path)).problems == []


def test_what_an_attempt_at_a_group_left_is_an_orphan(tmp_path):
    fit(config(tmp_path, module_groups=2))
    left = tmp_path / "partials" / "000000-g1" / "dead" / "00000"
    left.mkdir(parents=True)
    (left / "zarr.json").write_text("{}")
    report = laplace_dist.verify(str(tmp_path))
    assert list(report.orphans) == ["partials/000000-g1/dead"] and report.ok
    fit(config(tmp_path, fresh=True))
    assert not left.exists(), "what --fresh deletes has the groups' partials in it"


# ------------------------------------------------------------------ windows


def test_a_window_follows_the_runs_groups_and_its_partials_are_dropped(tmp_path):
    runs = {}
    for count in (1, 3):
        place = tmp_path / str(count)
        laplace_dist.fit(window_cases.config(place, window="monday", module_groups=count), executor=laplace_dist.Inline)
        runs[count] = window_cases.add(place, "tuesday").version
        window = place / "windows" / "tuesday"
        assert json.loads((window / "plan.json").read_text()).get("module_groups", 1) == count
        assert not (window / "partials").exists() or not [*(window / "partials").rglob("*.json")]
        assert laplace_dist.verify(str(place)).problems == []
    assert runs[1] == runs[3]
    one, other = (
        versions.read_version(Checkpoint(str(tmp_path / n)), read_plan(Checkpoint(str(tmp_path / n))), runs[1])
        for n in "13"
    )
    assert {name: place["entry"]["sha256"] for name, place in one["factors"].items()} == {
        name: place["entry"]["sha256"] for name, place in other["factors"].items()
    }


def test_a_group_of_a_second_pass_reads_its_own_part_of_the_basis(tmp_path, monkeypatch):
    read = []
    before = Checkpoint.read_array
    monkeypatch.setattr(
        Checkpoint,
        "read_array",
        lambda self, prefix, name, entry: read.append((prefix, name)) or before(self, prefix, name, entry),
    )
    fit(config(tmp_path, "ekfac", module_groups=3))
    names = [name for prefix, name in read if prefix.startswith("basis/")]
    first, second = {"1.weight/A", "1.weight/B"}, {"3.weight/A", "3.weight/B"}
    # The groups are the first weight's moments, those of its bias, and the second layer's.
    assert set(names[:2]) == first and names[2] == "1.weight/B" and set(names[3:]) == second and len(names) == 5


def test_workers_of_a_pool_share_the_groups_and_one_that_dies_costs_its_own(cluster, tmp_path):
    """The process that reads example 14 first is killed: of the units that read it, the second group's is not affected."""
    data = {"data": "dist_cases:DeadlyOnce", "data_args": {"folder": str(tmp_path), "trap": 14}}
    chosen = config(tmp_path / "run", module_groups=2, ray_address=cluster, num_workers=2, **data)
    found = laplace_dist.fit(chosen)
    assert (tmp_path / "killed").exists()
    assert found.version == fit(config(tmp_path / "whole", data=data["data"], data_args=data["data_args"])).version
    assert sums_of(tmp_path / "run")[0] == sums_of(tmp_path / "whole")[0]
    assert laplace_dist.verify(str(tmp_path / "run")).problems == []
