"""Low-rank posteriors from jobs: two passes, whose sums are those of one process, and what dies between them."""

from __future__ import annotations

import shutil

import dist_cases
import pytest
import torch
import window_cases

import laplace_dist
from laplace import Laplace, LowRankLaplace, SketchedLowRankLaplace
from laplace_dist import cli
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.execution.inline import Inline, InlinePool
from laplace_dist.job import tune_posterior
from laplace_dist.run import bases, layout
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages.basis import FindBasis, tasks
from laplace_dist.stages.map import MapSegment
from laplace_dist.storage.sealed_json import seal_json

SECOND = "passes/core"


def config(url, rank=12, **changes):
    double = {"model_args": {"dtype": "float64"}, "data_args": {"dtype": "float64"}}
    given = {"hessian_structure": "lowrank", "rank": rank, "oversampling": 4, **double}
    return dist_cases.config(url, **{**given, **changes})


def one_process(rank=12):
    la = SketchedLowRankLaplace(dist_cases.convnet("float64"), "classification", rank=rank, oversampling=4)
    la.fit(torch.utils.data.DataLoader(dist_cases.blobs("train", "float64"), batch_size=4))
    return la


def matrix(la):
    return (la.H[0] * la.H[1]) @ la.H[0].T


def load(url):
    return laplace_dist.load_posterior(str(url), dist_cases.convnet("float64"))


def contents(url):
    """Every number of a run: bytes of its arrays in the manifests, but for where attempts lie."""
    store, found = Checkpoint(str(url)), {}
    for key in store.list():
        if layout.MANIFEST.fullmatch(key.removeprefix(f"{SECOND}/")) and key != layout.METRICS:
            values = open_json(store.read(key), key.removeprefix(f"{SECOND}/"))
            places = {**values.get("arrays", {}), **values.get("factors", {}), **values.get("parts", {})}
            found[key] = {name: place.get("entry", place)["sha256"] for name, place in places.items()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run; tests copy it or read it."""
    place = tmp_path_factory.mktemp("lowrank") / "run"
    dist_cases.run_inline(config(place))
    return place


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_a_job_gives_the_posterior_of_one_process(whole):
    la, alone = load(whole), one_process()
    assert isinstance(la, LowRankLaplace) and la.n_data == dist_cases.N and la.H[0].shape[1] == 12
    assert float((matrix(la) - matrix(alone)).norm() / matrix(alone).norm()) < 1e-10
    assert float(la.loss) == pytest.approx(float(alone.loss), rel=1e-12)
    x, _ = dist_cases.tensors("test", "float64")
    assert torch.allclose(la(x), alone(x), rtol=1e-10)
    report = laplace_dist.verify(str(whole))
    assert report.ok and not report.notes and not report.orphans and len(report.versions) == 1
    status = laplace_dist.status(str(whole))
    assert status["complete"] and status["second_pass"] == status["segments"] == 6


def test_a_rank_that_suffices_gives_the_dense_curvature(tmp_path):
    dist_cases.run_inline(config(tmp_path / "run", rank=100))
    la = load(tmp_path / "run")
    full = Laplace(dist_cases.convnet("float64"), "classification", "all", "full")
    full.fit(torch.utils.data.DataLoader(dist_cases.blobs("train", "float64"), batch_size=4))
    assert float((matrix(la) - full.H).norm() / full.H.norm()) < 1e-10


def test_tuning_and_evaluation_follow(tmp_path):
    chosen = config(tmp_path / "run", skip_tune=False, skip_evaluate=False, skip_report=False, grid_size=5)
    result = laplace_dist.fit(chosen, executor=laplace_dist.Inline)
    la = load(tmp_path / "run")
    assert la.prior_precision.numel() == 1 and float(la.prior_precision) != 1
    assert 0 < result.metrics["laplace"]["nll"] < 10 and result.report is not None
    tuned = tune_posterior(chosen.model_copy(update={"tune_method": "marglik"}), laplace_dist.Inline)
    assert tuned.version == result.version and tuned.tuning != result.tuning
    assert laplace_dist.verify(str(tmp_path / "run")).ok


def test_killed_after_any_task_the_same_command_ends_in_the_same_bits(whole, tmp_path, monkeypatch):
    submitted, real = [], InlinePool.submit
    monkeypatch.setattr(InlinePool, "submit", lambda self, task: submitted.append(task) or real(self, task))
    dist_cases.run_inline(config(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(whole)
    kinds = [type(task).__name__ for task in submitted]
    assert kinds.count("MapSegment") == 12 and kinds.count("FindBasis") == 1 and kinds.count("SumPart") == 2
    for death in range(1, len(submitted)):
        url, left = tmp_path / str(death), [death]

        def deadly(self, task, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            real(self, task)

        monkeypatch.setattr(InlinePool, "submit", deadly)
        with pytest.raises(KeyboardInterrupt):
            dist_cases.run_inline(config(url))
        assert laplace_dist.verify(str(url)).problems == []
        again = []
        monkeypatch.setattr(InlinePool, "submit", lambda self, task, to=again: to.append(task) or real(self, task))
        dist_cases.run_inline(config(url))
        maps = [task for task in again if isinstance(task, MapSegment)]
        done = sum(isinstance(task, MapSegment) for task in submitted[:death])
        assert len(maps) == 12 - done, "no segment of either pass is done twice"
        assert contents(url) == contents(whole)


def test_a_changed_basis_is_refused_by_name(run):
    """Partials of the second pass are sums in one basis; another one, however good, is refused."""
    store = Checkpoint(str(run))
    plan, key = read_plan(store), layout.basis_key("core")
    with dist_cases.inline_job(config(run)) as job:
        job.open()
        receipts = [task.run(job_context(job)) for task in tasks(plan)]
    values = open_json(store.read(key), key)
    place = receipts[0]["factors"]["range"]
    changed = store.read_array(place["prefix"], "range", place["entry"])[:, ::-1].copy()
    entries = store.write_arrays("basis/core/other", {"range": changed})
    other = {**values, "factors": {"range": {"prefix": "basis/core/other", "entry": entries["range"]}}}
    store.replace(key, seal_json(other))
    with pytest.raises(
        SettingsError, match=r"passes/core/plan.json: the second pass was begun in another basis.*\n  basis: "
    ):
        dist_cases.run_inline(config(run))
    with pytest.raises(CheckpointError, match=r"basis/core.json is another basis"):
        load(run)
    problems = dict(laplace_dist.verify(str(run)).problems)
    assert "passes/core/plan.json is in another basis than basis/core.json" in problems["passes/core/plan.json"]


def job_context(job):
    return InlinePool(job.config)._context


@pytest.mark.parametrize("victim", ["basis/core", "passes/core/partials/000002", "passes/core/parts/00000"])
def test_damage_in_basis_or_second_pass_is_named(run, victim):
    chunk = max((p for p in (run / victim).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    report = laplace_dist.verify(str(run))
    assert not report.ok and all(victim in key for key, _ in report.problems[:1])
    if victim == "basis/core":
        with pytest.raises(CheckpointError, match="basis/core"):
            load(run)


@pytest.mark.parametrize("victim", ["basis/core.json", "passes/core/plan.json", "passes/core/partials/000001.json"])
def test_a_missing_object_of_basis_or_second_pass_is_named(run, victim):
    (run / victim).unlink()
    report = laplace_dist.verify(str(run))
    assert victim in dict(report.problems) or victim in str(report.problems)
    if victim == "basis/core.json":
        with pytest.raises(MissingObjectError, match="basis/core.json"):
            load(run)


def test_orphans_of_the_second_pass_are_found_and_collected(run):
    (run / "passes/core/partials/000001/lost").mkdir(parents=True)
    (run / "passes/core/partials/000001/lost/x").write_bytes(b"x")
    (run / "basis/core/lost").mkdir(parents=True)
    (run / "basis/core/lost/x").write_bytes(b"x")
    report = laplace_dist.verify(str(run), collect_orphans_older_than=0)
    assert set(report.collected) == {"passes/core/partials/000001/lost", "basis/core/lost"} and report.ok
    assert laplace_dist.verify(str(run)).ok and load(run).n_data == dist_cases.N


def test_fresh_deletes_both_passes_and_what_another_run_left_does_not_count(run):
    place = run / SECOND
    kept = {path.name: path.read_bytes() for path in (place / "partials").glob("*.json")}
    plan = (place / "plan.json").read_bytes()
    dist_cases.run_inline(config(run, fresh=True, seed=1))
    assert not [p for p in (place / "partials").glob("*.json") if p.read_bytes() in kept.values()]
    (place / "plan.json").write_bytes(plan)  # a worker of the deleted run, late
    report = laplace_dist.verify(str(run))
    assert any("another run" in text for _, text in report.notes)


def test_other_settings_of_the_sketch_are_refused_by_name(run):
    with pytest.raises(SettingsError, match=r"--rank: stored 12, now 13"):
        dist_cases.run_inline(config(run, rank=13))
    with pytest.raises(SettingsError, match=r"--oversampling: stored 4, now 5"):
        dist_cases.run_inline(config(run, oversampling=5))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"subset_of_weights": "last_layer"}, "--subset-of-weights: got 'last_layer' with --hessian-structure lowrank"),
        ({"backend": "curvlinops"}, "--backend: got 'curvlinops' with --hessian-structure lowrank"),
    ],
)
def test_what_a_sketch_cannot_be_of_is_refused_by_name(tmp_path, changes, words):
    with pytest.raises(SettingsError, match=words):
        dist_cases.run_inline(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_flags_of_the_sketch_are_checked(tmp_path, capsys):
    given = ["--model", "a:b", "--data", "a:b", "--checkpoint", str(tmp_path / "run")]
    assert cli.main("fit", [*given, "--rank", "0", "--oversampling", "1"], hessian_structure="lowrank") == 2
    said = capsys.readouterr().err
    assert "--rank: got 0" in said and "--oversampling: got 1" in said


def test_a_later_window_adds_in_the_same_basis_and_takes_one_pass(tmp_path):
    """With a rank that suffices for the first window's basis, both windows' curvature in it adds exactly."""
    lowrank = {"hessian_structure": "lowrank", "rank": 200, "oversampling": 4, "model_args": {"dtype": "float64"}}
    double = {"kind": "float64"}
    run = tmp_path / "run"

    def chosen(day, **changes):
        given = {**lowrank, "data_args": {"day": day, **double}, "data": "test_lowrank_runs:days"}
        few = {"level": 0.6}  # there are few fresh examples here
        return window_cases.config(run, day, **{**given, **(few if day == "tuesday" else {}), **changes})

    laplace_dist.fit(chosen("monday", window="monday"), executor=laplace_dist.Inline)
    found = laplace_dist.recalibrate(chosen("tuesday", window="tuesday"), executor=laplace_dist.Inline)
    assert found.promoted
    assert (
        not (run / "windows/tuesday/partials").exists() and (run / "windows/tuesday/passes/core/window.json").exists()
    )
    assert not list((run / "windows/tuesday/passes/core").glob("partials/*.json")), "dropped once the sum is there"
    la = load(run)
    both = Laplace(dist_cases.convnet("float64"), "classification", "all", "full")
    both.fit(torch.utils.data.DataLoader(days("train", "monday+tuesday", "float64"), batch_size=4))
    store = Checkpoint(str(run))
    basis = bases.read_basis(
        store, read_plan(store), bases.digest_of(bases.read_manifest(store, read_plan(store))), "cpu"
    )
    q = basis["range"]
    wanted = q @ (q.T @ both.H @ q) @ q.T
    assert float((matrix(la) - wanted).norm() / wanted.norm()) < 1e-10 and la.n_data == 64
    assert laplace_dist.verify(str(run)).problems == []


def days(split, day, kind):
    if split == "train":
        return window_cases.days(split, day, kind)
    return dist_cases.blobs(split, kind)


def test_tasks_of_the_basis_say_what_they_are():
    assert FindBasis("p", ("range",)).what == "basis range" and FindBasis("p", ("a", "b")).what == "basis a, …"


class Little(Inline):
    """A machine with room for sixteen columns and no more: sketch, random matrix and basis."""

    memory_of = 3 * 8 * 114 * 16 + 8 * 114

    def memory(self, device):
        return self.memory_of


def test_a_sketch_that_no_worker_has_the_memory_for_is_refused_with_what_fits(tmp_path):
    weights = sum(p.numel() for p in dist_cases.convnet().parameters())
    assert weights == 114
    laplace_dist.fit(config(tmp_path / "run", rank=12, oversampling=4), Little)
    why = r"got 'lowrank', but a worker needs at least [\d,]+ bytes, 46,512 of them for a sketch of 114 weights × 17 columns"
    with pytest.raises(SettingsError, match=why + r".*Lower --rank or --oversampling to 16 columns together"):
        laplace_dist.fit(config(tmp_path / "no", rank=13, oversampling=4), Little)
    assert not (tmp_path / "no" / "plan.json").exists()
