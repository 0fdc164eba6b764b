"""Trainings by empirical Bayes as jobs: the numbers of one process, the same bits whatever dies, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from crash_store import Crash, CrashingStore
from safetensors.torch import load_file
from training_cases import config, digits, drawn, farthest, in_one_process, settings, sine, small

import laplace_dist
from laplace_dist import cli_training, load_trained
from laplace_dist.config.training import Training
from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError
from laplace_dist.execution.inline import Inline, InlinePool
from laplace_dist.execution.session import Stage
from laplace_dist.marglik import MarglikJob, marglik_train
from laplace_dist.run import training
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages.train import InOrder


def epochs_of(url):
    """Every committed epoch, whose digests are those of all bits that it takes to go on."""
    store = Checkpoint(str(url))
    return training.epochs(store, read_plan(store))


def job(chosen, own):
    return MarglikJob(chosen, Inline, "marglik_train", say=lambda text: None, settings=own)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished training; tests read or copy it."""
    place = tmp_path_factory.mktemp("training") / "run"
    return marglik_train(small(place), settings(), Inline)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole.checkpoint, tmp_path / "run")


@pytest.mark.parametrize(
    "case, changes, own",
    [
        ("sine", {}, {"n_epochs": 20, "n_hypersteps": 10}),
        ("sine", {"hessian_structure": "kron", "prior_structure": "layerwise"}, {"n_epochs": 6, "parts": 3}),
        (
            "sine",
            {"hessian_structure": "diag", "prior_structure": "diag"},
            {"n_epochs": 5, "n_epochs_burnin": 2, "marglik_frequency": 2, "temperature": 2.0, "fix_sigma_noise": True,
             "sigma_noise_init": 0.4, "prior_prec_init": 0.5, "optimizer": "sgd",
             "optimizer_args": {"lr": 1e-2, "momentum": 0.9}},
        ),
        ("digits", {"hessian_structure": "kron"}, {"n_epochs": 3, "n_hypersteps": 5, "parts": 4}),
        ("sine", {"hessian_structure": "diag"}, {"n_epochs": 4, "scheduler": "CosineAnnealingLR", "scheduler_args": {"T_max": 12}}),
    ],
)  # fmt: skip
def test_evidences_and_losses_are_those_of_one_process(tmp_path, case, changes, own):
    chosen, own = config(tmp_path / "run", case, **changes), settings(**own)
    found = marglik_train(chosen, own, Inline)
    la, model, margliks, losses = in_one_process(chosen, own, case)
    assert farthest(found.margliks, margliks) < 1e-4 and farthest(found.losses, losses) < 1e-4
    loaded = load_trained(str(tmp_path / "run"), {"sine": sine, "digits": digits}[case]())
    evidence = float(la.log_marginal_likelihood())
    assert float(loaded.log_marginal_likelihood()) == pytest.approx(evidence, rel=1e-4) and loaded.n_data == la.n_data
    assert torch.allclose(loaded.prior_precision, la.prior_precision, rtol=1e-3)
    stored = load_file(found.weights)
    ours = {name: value.detach() for name, value in loaded.model.named_parameters()}
    assert all(torch.equal(stored[name], value) for name, value in ours.items())
    assert all(torch.allclose(ours[name], p, rtol=1e-3, atol=1e-5) for name, p in model.named_parameters())
    assert laplace_dist.verify(str(tmp_path / "run")).ok


def test_killed_after_any_task_the_same_command_ends_in_the_same_bits(whole, tmp_path, monkeypatch):
    count, real = [0], InlinePool.submit

    def counted(self, task):
        count[0] += 1
        real(self, task)

    monkeypatch.setattr(InlinePool, "submit", counted)
    marglik_train(small(tmp_path / "again"), settings(), Inline)
    assert epochs_of(tmp_path / "again") == epochs_of(whole.checkpoint)
    assert count[0] == 3 * (2 * 2 + 2)  # epochs of two batches in two parts, and two segments
    for death in range(1, count[0], 2):
        url, left = tmp_path / str(death), [death]

        def deadly(self, task, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            real(self, task)

        monkeypatch.setattr(InlinePool, "submit", deadly)
        with pytest.raises(KeyboardInterrupt):
            marglik_train(small(url), settings(), Inline)
        assert laplace_dist.verify(str(url)).problems == []
        before, count[0] = len(epochs_of(url)), 0
        monkeypatch.setattr(InlinePool, "submit", counted)
        found = marglik_train(small(url), settings(), Inline)
        assert epochs_of(url) == epochs_of(whole.checkpoint) and count[0] == 6 * (3 - before)
        assert found.margliks == whole.margliks and found.losses == whole.losses


@pytest.mark.parametrize("when", ["before", "middle"])
def test_a_crash_at_any_operation_leaves_the_last_committed_epoch(whole, tmp_path, when):
    expected = epochs_of(whole.checkpoint)

    def go(url, at=0):
        with job(small(url), settings()) as one:
            one.store = CrashingStore(str(url), at, when)
            one.open()
            one.train()
        return one.store.operations

    operations = go(tmp_path / "probe")
    assert len(operations) > 40
    fatal = [
        at for at, what in enumerate(operations, 1) if "training/" in what and not what.startswith(("read", "list"))
    ]
    assert len(fatal) > 8
    for at in fatal:
        url = tmp_path / f"{at}"
        with pytest.raises(Crash):
            go(url, at)
        assert epochs_of(url) == expected[: len(epochs_of(url))], operations[at - 1]
        assert laplace_dist.verify(str(url)).problems == [], operations[at - 1]
        marglik_train(small(url), settings(), Inline)
        assert epochs_of(url) == expected, operations[at - 1]
        shutil.rmtree(url)


def test_more_epochs_go_on_from_those_that_are_there(run, whole, tmp_path):
    longer = marglik_train(small(run), settings(n_epochs=5), Inline)
    at_once = marglik_train(small(tmp_path / "other"), settings(n_epochs=5), Inline)
    assert longer.margliks == at_once.margliks and longer.margliks[:6] == whole.margliks
    assert epochs_of(run) == epochs_of(tmp_path / "other")


def test_a_finished_training_does_nothing_again(run, whole, monkeypatch):
    monkeypatch.setattr(InlinePool, "submit", lambda *_: pytest.fail("a task was submitted"))
    assert marglik_train(small(run), settings(), Inline).margliks == whole.margliks
    assert marglik_train(small(run), settings(n_epochs=1), Inline).losses == whole.losses


def test_files_of_old_epochs_go(run):
    marglik_train(small(run), settings(n_epochs=9), Inline)
    assert len(list((run / "training/epochs").iterdir())) == 9
    assert len(list((run / "training/files").iterdir())) <= 4


SCHEDULES = {
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 12},
    "MultiStepLR": {"milestones": [3, 7], "gamma": 0.5},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_step_sizes_is_the_same_when_it_goes_on(tmp_path, name):
    own = {
        "scheduler": name,
        "scheduler_args": SCHEDULES[name],
        "optimizer": "sgd",
        "optimizer_args": {"lr": 1e-2, "momentum": 0.9},
    }
    at_once = marglik_train(small(tmp_path / "at once"), settings(n_epochs=5, **own), Inline)
    for n_epochs in (1, 3, 5):
        found = marglik_train(small(tmp_path / "in parts"), settings(n_epochs=n_epochs, **own), Inline)
    assert found.losses == at_once.losses and epochs_of(tmp_path / "in parts") == epochs_of(tmp_path / "at once")
    constant = marglik_train(
        small(tmp_path / "constant"), settings(n_epochs=5, **{**own, "scheduler": None, "scheduler_args": {}}), Inline
    )
    assert constant.losses != at_once.losses


@pytest.mark.parametrize(
    "own, words",
    [
        ({"scheduler": "OneCycleLR", "scheduler_args": {"max_lr": 1.0, "total_steps": 5}}, "6 steps; .*total steps is 5"),
        ({"scheduler": "StepLR", "scheduler_args": {"gamma": 0.5}}, "StepLR .*step_size"),
        ({"scheduler": "StepLR", "scheduler_args": {"step_size": 1, "gamma": -2.0}}, "the step size is -.* after 1"),
        ({"scheduler": "CosineAnnealingLR", "scheduler_args": {"T_max": 0}}, "for CosineAnnealingLR .*zero"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_kept_is_refused_before_anything_begins(tmp_path, own, words):
    with pytest.raises(SettingsError, match=f"--scheduler-args: got .*(?:{words})"):
        marglik_train(small(tmp_path / "run"), settings(**own), Inline)
    assert not (tmp_path / "run").exists()


def test_batches_in_a_drawn_order_are_the_same_when_it_goes_on(tmp_path):
    chosen = small(tmp_path / "at once", batch_size=5)
    shuffled = marglik_train(chosen, settings(shuffle=True, optimizer="sgd"), Inline)
    two = small(tmp_path / "in two", batch_size=5)
    marglik_train(two, settings(shuffle=True, optimizer="sgd", n_epochs=1), Inline)
    assert marglik_train(two, settings(shuffle=True, optimizer="sgd"), Inline).losses == shuffled.losses
    plain = marglik_train(small(tmp_path / "plain", batch_size=5), settings(optimizer="sgd"), Inline)
    assert plain.losses != shuffled.losses


def test_ray_workers_find_the_same_bits(whole, tmp_path, cluster):
    chosen = small(tmp_path / "run", ray_address=cluster, num_workers=2, skip_report=False)
    found = marglik_train(chosen, settings())
    assert found.report == f"{tmp_path}/run/report.html" and (tmp_path / "run" / "report.html").is_file()
    assert found.margliks == whole.margliks and epochs_of(tmp_path / "run") == epochs_of(whole.checkpoint)


def test_the_order_in_which_receipts_arrive_changes_no_bit(tmp_path, monkeypatch):
    chosen, own = {"batch_size": 24, "segment_size": 12}, settings(parts=7)
    marglik_train(small(tmp_path / "in order", **chosen), own, Inline)
    real = Stage.carry_out

    def backwards(self, tasks, each=lambda receipt: None, keep=True):
        receipts = real(self, tasks)[::-1]
        for receipt in receipts:
            each(receipt)
        return receipts if keep else []

    monkeypatch.setattr(Stage, "carry_out", backwards)
    marglik_train(small(tmp_path / "reversed", **chosen), own, Inline)
    assert epochs_of(tmp_path / "reversed") == epochs_of(tmp_path / "in order")


def test_the_curvature_of_segments_is_added_up_as_it_comes():
    """What the driver holds of segments is one total, and those that came early."""
    held, seen = InOrder(lambda total, receipt: [*(total or []), receipt["number"]]), []
    for number in (2, 0, 1, 4, 3):
        held.take({"number": number})
        seen.append((held.value, len(held._early)))
    assert seen == [(None, 1), ([0], 1), ([0, 1, 2], 0), ([0, 1, 2], 1), ([0, 1, 2, 3, 4], 0)]


# ------------------------------------------------------------------ what is refused


class Little(Inline):
    def memory(self, device):
        return 900


def test_sums_that_do_not_fit_are_refused_before_anything_begins(tmp_path, monkeypatch):
    chosen = small(tmp_path / "run", hessian_structure="full")
    why = r"--hessian-structure: got 'full', but {}.* A training cannot divide its sums into module groups"
    with pytest.raises(SettingsError, match=why.format(r"a worker needs at least [\d,]+ bytes")):
        marglik_train(chosen, settings(), Little)
    weights = sum(p.numel() for p in drawn().parameters())
    needed = 8 * weights + 2 * 8 * weights**2
    monkeypatch.setattr("laplace_dist.marglik.free_bytes", lambda device: needed - 1)
    with pytest.raises(SettingsError, match=why.format(f"a training needs at least {needed:,} bytes in the driver")):
        marglik_train(chosen, settings(), Inline)
    assert not (tmp_path / "run" / "plan.json").exists()
    monkeypatch.setattr("laplace_dist.marglik.free_bytes", lambda device: needed)
    marglik_train(chosen, settings(n_epochs=1), Inline)


@pytest.mark.parametrize(
    "changes, own, words",
    [
        ({"model": "training_cases:normed"}, {}, r"changes its buffers while it trains \(1.running_mean"),
        ({"subset_of_weights": "last_layer"}, {}, "--subset-of-weights: got 'last_layer'"),
        (
            {"hessian_structure": "lowrank"},
            {},
            "--hessian-structure: got 'lowrank'; a training by empirical Bayes expects",
        ),
        ({"window": "monday"}, {}, "--window: got 'monday'"),
        ({"hessian_structure": "kron", "prior_structure": "diag"}, {}, "--prior-structure: got 'diag' for a kron"),
        ({}, {"optimizer_args": {"rate": 1.0}}, "--optimizer-args: got {'rate': 1.0} for adam; .*unexpected keyword"),
        ({}, {"optimizer_args": {"lr": -1.0}}, "--optimizer-args: got {'lr': -1.0} for adam; Invalid learning rate"),
        (
            {"model": "training_cases:digits", "data": "training_cases:digits_data", "likelihood": "classification"},
            {"sigma_noise_init": 2.0},
            "--sigma-noise-init: got 2; .*no meaning for classification",
        ),
        (
            {"model": "training_cases:digits", "data": "training_cases:digits_data", "likelihood": "classification"},
            {"prior_prec_init": 1e300},
            r"--prior-prec-init: got 1e\+300; prior_precision must be positive",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_begins(tmp_path, changes, own, words):
    with pytest.raises(SettingsError, match=words):
        marglik_train(small(tmp_path / "run", **changes), settings(**own), Inline)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, own, words",
    [
        ({}, {"lr_hyp": 0.2}, "--lr-hyp: stored 0.1, now 0.2"),
        ({}, {"parts": 3}, "--parts: stored 2, now 3"),
        ({"batch_size": 6}, {}, "--batch-size: stored 12, now 6"),
        ({"data_args": {"scale": 2.0}}, {}, r"--data \(contents, as sha256\)"),
        ({"seed": 1}, {}, "--seed: stored 0, now 1"),
        ({"prior_structure": "layerwise"}, {}, "--prior-structure: stored None, now 'layerwise'"),
    ],
)
def test_a_training_goes_on_with_its_own_settings_alone(run, whole, changes, own, words):
    with pytest.raises(SettingsError, match=words):
        marglik_train(small(run, **changes), settings(n_epochs=5, **own), Inline)
    assert epochs_of(run) == epochs_of(whole.checkpoint)


def test_settings_are_checked_by_name():
    with pytest.raises(
        SettingsError, match=r"--n-epochs: got 0; .* at least 1\n--optimizer: got 'lbfgs'; expected one of adam"
    ):
        Training(n_epochs=0, optimizer="lbfgs")
    with pytest.raises(
        SettingsError, match="--scheduler: got 'ReduceLROnPlateau'; expected one of ConstantLR, .*StepLR"
    ):
        Training(scheduler="ReduceLROnPlateau")
    with pytest.raises(SettingsError, match="--scheduler-args: .*; expected a --scheduler with them"):
        Training(scheduler_args={"T_max": 3})
    assert "scheduler" not in Training().bits(), "so that trainings of before go on"
    with pytest.raises(SettingsError, match="--optimizer-args: got {'lr': nan}; expected values that JSON can hold"):
        Training(optimizer_args={"lr": float("nan")})


def test_a_training_that_diverges_says_so_and_keeps_its_epochs(tmp_path):
    wild = {"optimizer": "sgd", "optimizer_args": {"lr": 1e200}}
    with pytest.raises(RunFailed, match="training loss is (nan|inf) at examples .* in epoch 1: it diverges"):
        marglik_train(small(tmp_path / "run"), settings(**wild), Inline)
    assert epochs_of(tmp_path / "run") == []


def test_a_damaged_state_is_named_and_nothing_goes_on_from_it(run):
    (path,) = [p for p in (run / "training/files").iterdir() if epochs_of(run)[-1].state in p.name]
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(CheckpointError, match="training/files/.*altered: it has not the sha256 in its name"):
        marglik_train(small(run), settings(n_epochs=4), Inline)
    assert any(path.name in key for key, _ in laplace_dist.verify(str(run)).problems)


def test_a_missing_epoch_is_named(run):
    (run / "training/epochs/000002.json").unlink()
    with pytest.raises(MissingObjectError, match="training/epochs/000002.json is missing, and later epochs are there"):
        marglik_train(small(run), settings(n_epochs=4), Inline)
    assert "000002" in str(laplace_dist.verify(str(run)).problems)


def test_loading_refuses_another_model_and_a_training_without_estimate(run, tmp_path):
    with pytest.raises(SettingsError, match="it is not the one of the training at .*: 0.weight"):
        load_trained(str(run), sine())
    marglik_train(small(tmp_path / "early"), settings(n_epochs=1, n_epochs_burnin=3), Inline)
    with pytest.raises(MissingObjectError, match="1 epochs are committed, and the evidence was not estimated"):
        load_trained(str(tmp_path / "early"), drawn())


def test_status_tells_the_epochs_and_fresh_deletes_them(run, whole):
    assert laplace_dist.status(str(run))["epochs"] == 3
    marglik_train(small(run, fresh=True), settings(n_epochs=1), Inline)
    assert epochs_of(run) == epochs_of(whole.checkpoint)[:1]


def test_from_the_command_line(tmp_path, capsys):
    flags = ["--model", "training_cases:drawn", "--data", "training_cases:few", "--likelihood", "regression",
             "--checkpoint", str(tmp_path / "run"), "--ray-address", "inline", "--batch-size", "12", "--gpus-per-worker", "0"]  # fmt: skip
    own = ["--n-epochs", "2", "--optimizer-args", "{lr: 0.01}", "--lr-hyp", "1", "--shuffle"]
    assert cli_training.marglik_main([*flags, *own], hessian_structure="diag") == 0
    said = capsys.readouterr().out
    assert "train: 2/2 epochs" in said and "load_trained(" in said and "evidence" in said
    assert cli_training.marglik_main([*flags, "--n-epochs", "some"], hessian_structure="diag") == 2
    assert "--n-epochs: got 'some'" in capsys.readouterr().err
    refused = {
        "--decay=0.5": (2, "--decay: does nothing in this job, but in jobs/recalibrate.py"),
        "--lr-hyp=1e9": (1, "leads to a prior precision or observation noise of 0 or Inf. Lower lr_hyp"),
    }
    for flag, (status, words) in refused.items():
        assert cli_training.marglik_main([*flags, *own, "--n-hypersteps", "1", "--fresh", flag]) == status
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli_training.marglik_main(["--help"], hessian_structure="diag", checkpoint="runs/x")
    assert "--n-hypersteps" in capsys.readouterr().out


def test_a_file_holds_the_settings_of_the_training_too(tmp_path, capsys):
    path = tmp_path / "train.yaml"
    path.write_text(
        "model: training_cases:drawn\ndata: training_cases:few\nlikelihood: regression\nhessian-structure: diag\n"
        f"checkpoint: {tmp_path / 'run'}\nray-address: inline\nbatch_size: 12\ngpus-per-worker: 0\n"
        "n-epochs: 2\noptimizer_args: {lr: 0.01}\nlr-hyp: 1\nscheduler: StepLR\nscheduler-args: {step_size: 1}\n"
    )
    assert cli_training.marglik_main(["--config", str(path), "--n-epochs", "1"]) == 0, "flags win"
    assert "train: 1/1 epochs" in capsys.readouterr().out
    stored = read_plan(Checkpoint(str(tmp_path / "run"))).settings
    assert (stored["lr_hyp"], stored["scheduler"], stored["scheduler_args"]) == (1.0, "StepLR", {"step_size": 1})
    path.write_text(path.read_text().replace("n-epochs: 2", "n-epochs: none\nn_epochs: 2"))
    assert cli_training.marglik_main(["--config", str(path)]) == 2
    assert "n_epochs in" in (said := capsys.readouterr().err) and "given twice" in said
    path.write_text("model: m:f\nn-epoch: 2\n")
    assert cli_training.marglik_main(["--config", str(path)]) == 2
    assert "no such setting" in capsys.readouterr().err
