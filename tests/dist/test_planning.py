"""What a fit is said to take, against what it takes."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import dist_cases
import group_cases
import pytest
import torch

import laplace_dist
from laplace_dist import cli
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution.inline import Inline
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.job import fit
from laplace_dist.plan.estimate import GET_PRICE, PUT_PRICE, Trial, estimate, loaded_bytes
from laplace_dist.plan.worker_memory import RAY_BYTES
from laplace_dist.report.planned import lines, size
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages import trial

TRIAL = Trial(2.0, 0.02, 0.05, 1000, 10, 12, 10**9, 2 * 10**9)


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The plan of 22 examples in batches of 4 and segments of 8."""
    with dist_cases.inline_job(dist_cases.config(tmp_path_factory.mktemp("plan") / "run")) as job:
        job.open()
        return job.plan


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_bytes_and_requests_are_those_of_the_fit(tmp_path, structure):
    chosen = dist_cases.config(tmp_path / "run", hessian_structure=structure)
    found = laplace_dist.estimate(chosen)
    assert not (tmp_path / "run").exists(), "nothing is written there"
    dist_cases.run_inline(chosen.model_copy(update={"keep_partials": True}))
    partials = tmp_path / "run" / "partials"
    manifests = sorted(partials.glob("*.json"))
    assert found.segments == len(manifests) and found.batches == math.ceil(dist_cases.N / 4)
    folders = stored(partials) - sum(path.stat().st_size for path in manifests)
    assert found.partial_bytes * found.segments == pytest.approx(folders, rel=0.25)  # values compress differently
    assert found.writes == sum(path.is_file() for path in partials.rglob("*"))
    la = laplace_dist.load_posterior(str(tmp_path / "run"), dist_cases.convnet())
    assert found.sums_bytes == sum(t.nbytes for name, t in la.sums.to_tensors().items() if name != "loss")
    assert found.parameters == la.n_params and found.coverage == {structure: (4, 1.0)}


def reached(found, seen, places):
    """Bytes of every tensor that an object reaches, but for those of modules, by where they lie."""
    if id(found) in seen or isinstance(found, torch.nn.Module):
        return places
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        places[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        return places
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    for part in [*parts, *getattr(found, "__dict__", {}).values()]:
        reached(part, seen, places)
    return places


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "blockdiag", "lowrank"])
def test_a_loaded_posterior_takes_what_was_said(tmp_path, structure):
    chosen = dist_cases.config(tmp_path / "run", model="group_cases:wide", hessian_structure=structure)
    fit(chosen, executor=Inline)
    la = laplace_dist.load_posterior(str(tmp_path / "run"), group_cases.wide())
    la(torch.randn(2, 1, 6, 6))
    held = sum(reached(la, set(), {}).values())
    assert loaded_bytes(read_plan(Checkpoint(str(tmp_path / "run")))) == pytest.approx(held, rel=0.05)


def test_time_requests_and_storage_follow_from_the_trial(plan):
    coverage = [("0.weight", "kron", ""), ("0.bias", "kron", ""), ("4.weight", "kron", ""), ("4.bias", "diag", "")]
    found = estimate(plan, TRIAL, coverage, workers=2)
    segments, batches = len(plan.segments), math.ceil(dist_cases.N / 4)
    assert found.map_seconds == pytest.approx(math.ceil(segments / 2) * (batches / segments * 2.0 + 0.02))
    assert found.commit_share == pytest.approx(0.02 / (batches / segments * 2.0 + 0.02))
    assert found.reduce_seconds == pytest.approx(segments * 0.05)
    assert (found.writes, found.reads) == (10 * segments, 12 * segments)
    assert found.dollars == pytest.approx((found.writes * PUT_PRICE + found.reads * GET_PRICE) / 1000)
    assert found.peak_bytes == 10**9 + RAY_BYTES
    assert estimate(plan, replace(TRIAL, kept_bytes=7), coverage, 2).peak_bytes == 10**9 + 7 + RAY_BYTES
    assert found.stored_bytes == segments * 1000 + 2 * 8 * plan.places[-1].stop
    sizes = {"0.weight": 27, "0.bias": 3, "4.weight": 81, "4.bias": 3}
    assert found.coverage == {
        "kron": (3, pytest.approx(111 / sum(sizes.values()))),
        "diag": (1, pytest.approx(3 / 114)),
    }
    assert found.largest == ("4.weight/A", 27)


@pytest.mark.parametrize(
    ("tried", "workers", "says"),
    [
        (replace(TRIAL, node_bytes=10**9), 1, "more memory than this machine has; the largest of its sums is 4.weight/A of width 27"),
        (replace(TRIAL, peak_bytes=0, node_bytes=4 * 10**8), 1, "A worker that tunes or evaluates needs more memory than"),
        (replace(TRIAL, commit_seconds=9.0), 2, None),
        (TRIAL, 50, "50 workers share"),
    ],
)  # fmt: skip
def test_what_limits_is_said_with_what_to_change(plan, tried, workers, says):
    found = estimate(plan, tried, [], workers).advice
    assert (says is None and not found) or (len(found) == 1 and says in found[0])


def test_commits_that_take_long_are_said(plan):
    many = replace(plan, segments=tuple(replace(plan.segments[0], id=f"{i:06d}") for i in range(5)))
    (advice,) = estimate(many, replace(TRIAL, commit_seconds=1.0), [], 1).advice
    assert advice == "Commits take 20% of a segment's time: a larger --segment-size than 8 makes that less."


def test_the_job_says_it_in_a_table_and_refuses_as_the_fit_does(tmp_path, capsys):
    flags = [
        "--model=dist_cases:convnet",
        "--data=dist_cases:blobs",
        f"--checkpoint={tmp_path / 'run'}",
        "--batch-size=4",
    ]
    assert cli.plan_main(flags) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:8]] == [
        "model",
        "estimator",
        "factors",
        "segments",
        "storage",
        "requests",
        "memory",
        "time",
    ]
    assert "114 weights: 4 tensors kron (100.0% of the weights)" in said[0]
    assert cli.plan_main([*flags, "--precision=bf16", "--backend=curvlinops"]) == 2
    assert "got 'bf16' with --backend curvlinops" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="'dist_cases' has no 'nothing'"):
        laplace_dist.estimate(dist_cases.config(tmp_path / "run", data="dist_cases:nothing"))
    assert not (tmp_path / "run").exists()


def test_sums_that_do_not_fit_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("laplace.linalg.memory.free_bytes", lambda device: 100)
    with pytest.raises(RunFailed, match="The sums of a 'kron' posterior over 114 parameters.*hessian_structure='diag'"):
        laplace_dist.estimate(dist_cases.config(tmp_path / "run"))


class Small(Inline):
    """A machine with little memory."""

    bytes = 5_000

    def memory(self, device):
        return self.bytes


def test_a_fit_that_cannot_fit_is_refused_before_anything_is_begun(tmp_path):
    for n_bytes in (1, 5_000):
        executor = type("Tight", (Small,), {"bytes": n_bytes})
        with pytest.raises(SettingsError) as caught:
            laplace_dist.fit(dist_cases.config(tmp_path / "run"), executor=executor)
        said = str(caught.value)
        # Factors of 9, 3 and 27, 3 entries a side in float64, and the model of 114 weights in float32.
        sums = 8 * (9**2 + 3**2 + 27**2 + 3**2)
        assert said.startswith(
            f"--hessian-structure: got 'kron', but a worker needs at least {8 * 27**2 + 456:,} bytes, {8 * 27**2:,} of them "
            "for the largest of 4 module groups of the sums"
        )
        assert (
            f"but can have {n_bytes:,} at most. The largest sum is 4.weight/A, 27 × 27. Use --hessian-structure diag"
            in said
        )
        assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    executor = type("Just", (Small,), {"bytes": sums + 456})
    assert laplace_dist.fit(dist_cases.config(tmp_path / "run"), executor=executor).version
    executor = type("Diagonal", (Small,), {"bytes": 8 * 114 + 456})
    assert laplace_dist.fit(dist_cases.config(tmp_path / "diag", hessian_structure="diag"), executor=executor).version


def test_memory_that_is_not_known_refuses_nothing_and_what_is_committed_needs_none(tmp_path):
    unknown = type("Unknown", (Small,), {"bytes": None})
    assert laplace_dist.fit(dist_cases.config(tmp_path), executor=unknown).version
    assert laplace_dist.fit(dist_cases.config(tmp_path), executor=type("Tight", (Small,), {"bytes": 1})).version


def test_workers_of_a_private_cluster_share_what_is_free_here(tmp_path, monkeypatch):
    monkeypatch.setattr("laplace_dist.execution.ray_cluster.free_bytes", lambda device: 900)
    monkeypatch.setattr(
        "laplace_dist.execution.ray_cluster.is_connected", lambda: False
    )  # as other tests leave this process
    for workers, share in ((None, 900), (3, 300)):
        chosen = dist_cases.config(tmp_path, ray_address="local", num_workers=workers)
        assert Cluster(chosen).memory("cpu") == share
    with pytest.raises(SettingsError, match="can have 300 at most.*lower --num-workers where they share a machine"):
        laplace_dist.fit(chosen)


def test_the_peak_counts_a_commit_beside_the_next_segment(tmp_path, monkeypatch):
    """Where a worker would hold two tasks' sums at once, so does the trial; of large sums it commits alone."""
    most = []
    before = trial.partials.commit_partial

    def watched(*args, **kwargs):
        most.append(threading.current_thread() is not threading.main_thread())
        return before(*args, **kwargs)

    monkeypatch.setattr(trial.partials, "commit_partial", watched)
    laplace_dist.estimate(dist_cases.config(tmp_path / "run"))
    monkeypatch.setattr(trial, "BESIDE", 0)
    laplace_dist.estimate(dist_cases.config(tmp_path / "run"))
    assert most == [True, False]


def test_a_trials_clock_leaves_out_what_others_had_of_the_cpu(monkeypatch):
    monkeypatch.setattr(trial.time, "perf_counter", lambda: 10.0)
    monkeypatch.setattr(trial.Path, "read_text", lambda self: "5000 2500000000 7")
    assert trial._clock() == 7.5


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (999.9, "1 kB"), (1234, "1.23 kB"), (78_200_000, "78.2 MB"), (5e18, "5e+03 PB")],
)
def test_sizes_have_three_digits(n_bytes, text):
    assert size(n_bytes) == text


def test_lines_are_as_wide_as_a_terminal(plan):
    assert all(len(line) < 140 for line in lines(estimate(plan, TRIAL, [], 1)))


def test_of_a_cluster_it_is_the_memory_of_the_largest_node_that_holds_a_worker(cluster, tmp_path):
    """A head without room for one, as beside an autoscaler, says nothing of the nodes that will join."""
    chosen = dist_cases.config(tmp_path, ray_address=cluster)
    with Cluster(chosen, say=lambda text: None) as joined:
        import ray

        assert joined.memory("cpu") == int(ray.nodes()[0]["Resources"]["memory"])
        assert joined.memory("cuda") is None, "no node has a GPU"
    wide = chosen.model_copy(update={"cpus_per_worker": 99, "num_workers": 1})
    with Cluster(wide, say=lambda text: None) as joined:
        assert joined.memory("cpu") is None
