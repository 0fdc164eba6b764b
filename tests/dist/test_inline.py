"""The executor without Ray: the same bits as any other run, and this process as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dist_cases
import pytest
import torch

import laplace_dist
from laplace_dist import cli
from laplace_dist.errors import SettingsError
from laplace_dist.execution.inline import InlinePool
from laplace_dist.job import evaluate_posterior, tune_posterior
from laplace_dist.plan.segments import Segment
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.map import MapSegment


def test_a_whole_job_runs_in_this_process_by_flag_and_by_argument(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("laplace_dist.execution.ray_cluster.Cluster.connect", None)  # calling it would be an error
    whole = {"skip_tune": False, "skip_evaluate": False}
    result = laplace_dist.fit(dist_cases.config(tmp_path / "argument", **whole), executor=laplace_dist.Inline)
    flags = ["--model=dist_cases:convnet", "--data=dist_cases:blobs", f"--checkpoint={tmp_path / 'flag'}"]
    flags += ["--batch-size=4", "--segment-size=8", "--gpus-per-worker=0", "--ray-address=inline"]
    assert cli.main("fit", flags) == 0
    assert "inline: every task is carried out in this process" in capsys.readouterr().out
    assert laplace_dist.load_posterior(str(tmp_path / "flag"), dist_cases.convnet()).n_data == dist_cases.N
    current = [Checkpoint(str(tmp_path / name)).read("CURRENT.json") for name in ("argument", "flag")]
    assert current[0] == current[1] and result.version in current[0].decode()


def test_a_loaded_posterior_refuses_what_one_fitted_here_would(tmp_path):
    dist_cases.run_inline(dist_cases.config(tmp_path, model="dist_cases:Coupled", hessian_structure="diag"))
    la, (x, _) = laplace_dist.load_posterior(str(tmp_path), dist_cases.Coupled().eval()), dist_cases.tensors("test")
    assert la(x).shape == (20, 3)
    with pytest.raises(ValueError, match="the output of an example depends on the others of its batch"):
        la(1000 * x)
    with pytest.raises(ValueError, match="the batch dimension is missing"):
        la(x[0])


ENTRIES = {
    "fit": laplace_dist.fit,
    "tune": tune_posterior,
    "evaluate": evaluate_posterior,
    "recalibrate": laplace_dist.recalibrate,
    "train": lambda config, executor=None: laplace_dist.marglik_train(config, None, executor),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_argument_of_another_kind_is_refused_by_name(tmp_path, entry):
    config = dist_cases.config(tmp_path / "run")
    with pytest.raises(
        SettingsError, match=r"executor: got 'inline'; give the class itself, executor=laplace_dist.Inline"
    ):
        entry(config, executor="inline")
    with pytest.raises(SettingsError, match=r"executor: got a Inline; give the class itself"):
        entry(config, executor=laplace_dist.Inline(config))
    with pytest.raises(SettingsError, match=r"config: got a dict; give a laplace_dist.Config"):
        entry({"model": "m:f", "data": "d:f"})
    assert not (tmp_path / "run").exists()


NO_GPU = [
    ({"device": "cuda", "gpus_per_worker": None}, "--device: got 'cuda'"),
    ({"gpus_per_worker": 1.0}, "--gpus-per-worker: got 1"),
]


@pytest.mark.parametrize(("changes", "words"), NO_GPU)
@pytest.mark.parametrize("entry", [ENTRIES["fit"], ENTRIES["train"]])
def test_a_gpu_that_is_not_here_is_refused_before_a_run_on_it_is_begun(tmp_path, monkeypatch, entry, changes, words):
    """Else the run could be gone on with nowhere: what it computes on is in its plan."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=words):
        entry(dist_cases.config(tmp_path / "run", **changes), executor=laplace_dist.Inline)
    assert Checkpoint(str(tmp_path / "run")).list() == []


def test_settings_of_a_training_and_of_an_estimate_are_of_their_kinds(tmp_path):
    with pytest.raises(SettingsError, match=r"settings: got a dict; give a laplace_dist.Training"):
        laplace_dist.marglik_train(dist_cases.config(tmp_path), {"n_epochs": 3})
    with pytest.raises(SettingsError, match=r"config: got 'run.yaml'; give a laplace_dist.Config"):
        laplace_dist.estimate("run.yaml")


def test_threads_are_those_of_a_worker_while_a_task_runs_and_the_users_own_afterwards(tmp_path):
    seen = []

    class Look(MapSegment):
        def run(self, context):
            seen.append(torch.get_num_threads())
            return {}

    config = dist_cases.config(tmp_path, cpus_per_worker=2)
    with dist_cases.inline_job(config) as job:
        job.open()
        pool = InlinePool(config)
        pool.submit(Look(job.plan.digest, Segment("0", 0, 1)))
        assert pool.wait(1, None)[0].failure is None
    assert seen == [2] and torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("error", "again"), [(OSError("the disk is gone"), True), (ValueError("no such class"), False)]
)
def test_an_error_is_sorted_as_it_is_for_a_worker_of_rays(tmp_path, error, again):
    class Broken(MapSegment):
        def run(self, context):
            raise error

    config = dist_cases.config(tmp_path)
    with dist_cases.inline_job(config) as job:
        job.open()
        pool = InlinePool(config)
        pool.submit(Broken(job.plan.digest, Segment("0", 0, 1)))
        (event,) = pool.wait(1, None)
    assert event.failure.startswith("OSError: the disk is gone (") if again else repr(event.refusal) == repr(error)


WITH_TF32 = """
import sys, torch
sys.path.insert(0, sys.argv[2])
torch.backends.fp32_precision = "tf32"
import dist_cases, laplace_dist
laplace_dist.fit(dist_cases.config(sys.argv[1]), executor=laplace_dist.Inline)
assert torch.backends.cudnn.conv.fp32_precision == "tf32", "the process is left as it was"
"""


def test_a_process_that_has_set_tf32_by_torchs_newer_switches_gives_the_bits_of_any_other(tmp_path):
    """In a process of its own, in which the older switches then cannot be read."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", WITH_TF32, str(tmp_path / "tf32"), here], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1500:]
    laplace_dist.fit(dist_cases.config(tmp_path / "plain"), executor=laplace_dist.Inline)
    one, two = dist_cases.load_sums(tmp_path / "tf32"), dist_cases.load_sums(tmp_path / "plain")
    assert all(torch.equal(value, two[name]) for name, value in one.items())
