"""Models of many outputs: which estimator a run uses, said with its cost, kept by whoever goes on, equal to the core's."""

from __future__ import annotations

import json

import dist_cases
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from window_cases import add

import laplace_dist
from laplace import Laplace
from laplace.likelihoods import BaseLikelihood
from laplace_dist import cli
from laplace_dist.errors import SettingsError
from laplace_dist.report.html.fitted import fitted
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan

OUTPUTS, N = 70, 22


class Positions(nn.Module):
    """Eight positions with ten classes each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 10)

    def forward(self, x):
        return self.layer(x.flatten(1)[:, :8, None])


def model(kind="wide"):
    torch.manual_seed(0)
    if kind == "positions":
        return Positions().eval()
    width = {"wide": OUTPUTS, "just": 64, "day": 3}[kind]
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, width)).eval()


def data(split, positions=False):
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    x = torch.randn(N, 1, 6, 6, generator=generator)
    shape = (N, 8) if positions else (N,)
    return TensorDataset(x, torch.randint(10 if positions else 64, shape, generator=generator))


class NoDraws(BaseLikelihood):
    """A classification that cannot be sampled."""

    def check_shapes(self, f, y, offset=0):
        pass

    def nll(self, f, y):
        return nn.functional.cross_entropy(f, y, reduction="none")


def config(folder, **changes):
    return dist_cases.config(folder, model="test_many_outputs:model", data="test_many_outputs:data", **changes)


def opened(chosen):
    """Begin or continue a run; returns its plan's settings and the line about the estimator."""
    said = []
    with dist_cases.inline_job(chosen) as job:
        job.say = said.append
        job.open()
        return job.plan.settings, next(text for text in said if text.startswith("estimator")).removeprefix(
            "estimator: "
        )


EXACT = "exact GGN of 70 outputs; about 70 backward passes a batch (--estimator mc takes one)"
CASES = {
    "many": ({}, "mc", "Monte-Carlo Fisher, 1 sample per example; 1 backward pass a batch (of 70 outputs; --estimator ggn is exact, in about 70)"),
    "not so many": ({"model_args": {"kind": "just"}}, "ggn", "exact GGN of 64 outputs; about 64 backward passes a batch"),
    "positions count": ({"model_args": {"kind": "positions"}, "data_args": {"positions": True}}, "mc", "Monte-Carlo Fisher, 1 sample per example; 1 backward pass a batch (of 80 outputs; --estimator ggn is exact, in about 80)"),
    "exact by choice": ({"estimator": "ggn"}, "ggn", EXACT),
    "samples by choice": ({"mc_samples": 3}, "mc", "Monte-Carlo Fisher, 3 samples per example; 3 backward passes a batch"),
    "sampled by choice": ({"estimator": "mc", "model_args": {"kind": "just"}}, "mc", "Monte-Carlo Fisher, 1 sample per example; 1 backward pass a batch"),
    "empirical": ({"estimator": "ef"}, "ef", "empirical Fisher; 1 backward pass a batch"),
    "last layer": ({"subset_of_weights": "last_layer"}, "ggn", "exact GGN of 70 outputs, in closed form"),
    "last layer of positions": ({"model_args": {"kind": "positions"}, "data_args": {"positions": True}, "subset_of_weights": "last_layer"}, "mc", "Monte-Carlo Fisher, 1 sample per example; 1 backward pass a batch (of 80 outputs; --estimator ggn is exact, in about 80)"),
    "some outputs": ({"outputs": [69, 3]}, "ggn", "exact GGN of 2 of 70 outputs (3, 69), the others held constant; 2 backward passes a batch"),
    "no draws": ({"likelihood": "test_many_outputs:NoDraws"}, "ggn", "exact GGN of 70 outputs; about 70 backward passes a batch (this likelihood has no draw(f, u), with which --estimator mc takes one)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_estimator_is_chosen_by_the_outputs_said_with_its_cost_and_recorded(tmp_path, case):
    changes, estimator, line = CASES[case]
    settings, said = opened(config(tmp_path, **changes))
    assert said == line
    stored = json.loads((tmp_path / "plan.json").read_text())["settings"]
    assert stored == settings and stored["estimator"] == estimator
    assert stored.get("mc_samples") == (changes.get("mc_samples", 1) if estimator == "mc" else None)
    assert stored.get("outputs") == ([3, 69] if "outputs" in changes else None)
    assert f"estimator: {estimator}" in (tmp_path / "config.yaml").read_text().splitlines()


@pytest.mark.parametrize("changes", [{}, {"mc_samples": 2}, {"outputs": [5, 0]}, {"estimator": "ggn"}])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_posterior_is_that_of_a_fit_in_one_process(tmp_path, changes, subset):
    chosen = config(tmp_path, subset_of_weights=subset, seed=4, **changes)
    dist_cases.run_inline(chosen)
    ours = laplace_dist.load_posterior(str(tmp_path), model())
    samples = changes.get("mc_samples", None if changes or subset == "last_layer" else 1)
    kwargs = {"outputs": [0, 5]} if "outputs" in changes else {}
    kwargs = {"stochastic": True, "num_samples": samples, "seed": 4} if samples else kwargs
    alone = Laplace(model(), "classification", subset, "kron", backend_kwargs=kwargs)
    alone.fit(DataLoader(data("train"), batch_size=4))
    for name, value in alone.sums.to_tensors().items():
        assert torch.allclose(ours.sums.to_tensors()[name], value, rtol=1e-6, atol=1e-9), name
    assert torch.allclose(ours.backend.kron(*data("train")[:4], N=N)[0], alone.backend.kron(*data("train")[:4], N=N)[0])
    assert ours.backend.estimator == alone.backend.estimator


@pytest.mark.parametrize("first", [{}, {"estimator": "ggn"}, {"mc_samples": 3}, {"outputs": [2]}])
def test_a_run_goes_on_with_the_estimator_that_it_began_with(tmp_path, first):
    settings, said = opened(config(tmp_path, **first))
    again, _ = opened(config(tmp_path))
    assert again == settings
    manifest = Checkpoint(str(tmp_path))
    dist_cases.run_inline(config(tmp_path))
    assert read_plan(manifest).settings == settings


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ({}, {"estimator": "ggn"}, "--estimator: stored 'mc', now 'ggn'"),
        ({}, {"mc_samples": 2}, "--mc-samples: stored 1, now 2"),
        ({"estimator": "ggn"}, {"mc_samples": 2}, "--estimator: stored 'ggn', now 'mc'"),
        ({"estimator": "ggn"}, {"outputs": [1]}, r"--outputs: stored None, now \[1\]"),
        ({"outputs": [1]}, {"estimator": "ggn"}, r"--outputs: stored \[1\], now None"),
    ],
)
def test_another_estimator_than_the_runs_is_refused_by_name(tmp_path, first, then, says):
    opened(config(tmp_path, **first))
    with pytest.raises(SettingsError, match=says):
        opened(config(tmp_path, **then))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"estimator": "ggn", "mc_samples": 2}, "--mc-samples: got 2 with --estimator ggn"),
        ({"estimator": "mc", "outputs": [1]}, r"--outputs: got \[1\] with --estimator mc"),
        ({"outputs": [1], "mc_samples": 2}, "--mc-samples: got 2 with --estimator ggn"),
        ({"outputs": [1], "backend": "curvlinops"}, "expected --backend native"),
        ({"outputs": [3, 70]}, "the model has 70 outputs, the last one being 69"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_and_nothing_is_begun(tmp_path, changes, says):
    with pytest.raises(SettingsError, match=says):
        opened(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [([], "at least 1 item"), ([1, 1], "distinct indices"), ([-1], "at least 0"), (["a"], "whole number")],
)
def test_outputs_that_are_none_are_refused(tmp_path, value, says):
    with pytest.raises(SettingsError, match=f"--outputs: got .*{says}"):
        config(tmp_path, outputs=value)


def test_the_flag_takes_several_indices(tmp_path):
    flags = ["--model=m:f", "--data=m:g", f"--checkpoint={tmp_path}", "--outputs", "7", "2"]
    assert cli.load_config(flags).outputs == [2, 7]


def test_the_report_and_the_plan_say_the_samples(tmp_path, capsys):
    opened(config(tmp_path / "run"))
    store = Checkpoint(str(tmp_path / "run"))
    found = fitted(store, read_plan(store), None)
    assert found["estimator"] == "Monte-Carlo Fisher with 1 sample per example"
    assert "--estimator mc --mc-samples 1" in found["command"]
    flags = ["--model=test_many_outputs:model", "--data=test_many_outputs:data", f"--checkpoint={tmp_path / 'other'}"]
    assert cli.plan_main([*flags, "--batch-size=8"]) == 0
    assert f"estimator  {CASES['many'][2]}" in capsys.readouterr().out
    opened(config(tmp_path / "few", outputs=[1, 2]))
    store = Checkpoint(str(tmp_path / "few"))
    assert fitted(store, read_plan(store), None)["estimator"] == "exact GGN of the outputs 1, 2"


@pytest.mark.parametrize("first", [{"mc_samples": 2}, {"outputs": [0, 2]}, {"estimator": "ef"}])
def test_a_new_window_is_of_the_runs_estimator(tmp_path, first):
    from window_cases import config as of_days
    from window_cases import fit_inline

    fit_inline(of_days(tmp_path, window="monday", **first))
    assert add(tmp_path, "tuesday").promoted
    plans = [read_plan(Checkpoint(f"{tmp_path}{place}")).settings for place in ("", "/windows/tuesday")]
    assert [{name: plan.get(name) for name in ("estimator", "mc_samples", "outputs")} for plan in plans] == [
        {"estimator": "ggn" if "outputs" in first else first.get("estimator", "mc"), "mc_samples": None, "outputs": None, **first}
    ] * 2  # fmt: skip
