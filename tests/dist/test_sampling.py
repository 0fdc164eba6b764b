"""Draws of a sampled Fisher at positions: padding anywhere moves none, and a run goes on with the draws that it began with."""

from __future__ import annotations

import json

import dist_cases
import pytest
import torch
from torch import nn

import laplace_dist
from laplace.likelihoods import BaseLikelihood, WeightedCategorical
from laplace_dist.config.settings import Config

WORDS, LEFT_OUT = 7, -100


class Tagger(nn.Module):
    """A word is tagged by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer = nn.Embedding(WORDS, 4), nn.Linear(4, 5)
        self.double()

    def forward(self, data):
        return self.layer(self.words(data["input_ids"]).tanh())


def model():
    return Tagger().eval()


def likelihood():
    return WeightedCategorical(ignore_index=LEFT_OUT)


class Sentences:
    """Of two to five words, of which the first is not to be tagged."""

    def __init__(self, split: str):
        self.first = {"train": 0, "val": 100, "test": 200, "second": 300}.get(split, 400)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.first + index)
        ids = torch.randint(1, WORDS, (2 + index % 4,), generator=generator)
        labels = torch.randint(5, ids.shape, generator=generator)
        labels[0] = LEFT_OUT
        return ids, labels


def data(split):
    return Sentences(split)


def second(split):
    return Sentences("second" if split == "train" else split)


def padded(examples, before=0, behind=0):
    length = max(len(ids) for ids, _ in examples)
    rows = [(before + length - len(ids), behind) for ids, _ in examples]
    pad = nn.functional.pad
    return {
        "input_ids": torch.stack([pad(ids, around, value=0) for (ids, _), around in zip(examples, rows, strict=True)]),
        "labels": torch.stack([pad(y, around, value=LEFT_OUT) for (_, y), around in zip(examples, rows, strict=True)]),
    }


def padded_more(examples):
    return padded(examples, 3, 2)


def config(folder, **changes):
    where = {name: f"test_sampling:{name}" for name in ("model", "data", "likelihood")}
    how = {
        "hessian_structure": "diag",
        "mc_samples": 2,
        "batch_size": 4,
        "segment_size": 8,
        "collate": "test_sampling:padded",
    }
    return dist_cases.config(folder, **{**where, **how, **changes})


def sums_of(folder):
    return laplace_dist.load_posterior(str(folder), model()).sums.to_tensors()


@pytest.mark.parametrize("samples", [1, 3])
def test_how_far_a_batch_is_padded_in_front_and_behind_changes_no_number(tmp_path, samples):
    for collate in ("padded", "padded_more"):
        dist_cases.run_inline(config(tmp_path / collate, mc_samples=samples, collate=f"test_sampling:{collate}"))
    one, other = (sums_of(tmp_path / collate) for collate in ("padded", "padded_more"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-14)


@pytest.fixture
def earlier(monkeypatch):
    """Begin a run as 0.1 does: with its draws, and no word of them in the plan."""

    def begin(chosen):
        bits = Config.bits
        with monkeypatch.context() as patch:
            patch.setattr(BaseLikelihood, "sampling", 1)
            patch.setattr(
                Config, "bits", lambda self, **how: {k: v for k, v in bits(self, **how).items() if k != "sampling"}
            )
            return dist_cases.run_inline(chosen)

    return begin


def unfinished(folder):
    (folder / "partials" / "000001.json").unlink()
    for name in ("window.json", "CURRENT.json"):
        (folder / name).unlink()


def settings_of(place):
    return json.loads((place / "plan.json").read_text())["settings"]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_run_goes_on_with_the_draws_that_it_began_with(tmp_path, earlier, samples):
    chosen = config(tmp_path / "run", mc_samples=samples)
    earlier(chosen)
    before = sums_of(tmp_path / "run")
    unfinished(tmp_path / "run")
    dist_cases.run_inline(chosen)
    after = sums_of(tmp_path / "run")
    assert "sampling" not in settings_of(tmp_path / "run")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    dist_cases.run_inline(config(tmp_path / "new", mc_samples=samples))
    assert settings_of(tmp_path / "new")["sampling"] == 2
    other = sums_of(tmp_path / "new")
    assert any(not torch.equal(other[name], value) for name, value in before.items())


def test_so_do_its_windows(tmp_path, earlier):
    gates = {"margin_nll": 10.0, "margin_ece": 1.0}
    earlier(config(tmp_path / "run", window="first"))
    more = config(tmp_path / "run", window="second", data="test_sampling:second", skip_tune=False, skip_evaluate=False)
    laplace_dist.recalibrate(more.model_copy(update=gates), laplace_dist.Inline)
    assert "sampling" not in settings_of(tmp_path / "run" / "windows" / "second")


def test_a_run_that_draws_nothing_does_not_say_how(tmp_path):
    dist_cases.run_inline(config(tmp_path / "run", mc_samples=None, estimator="ggn"))
    assert "sampling" not in settings_of(tmp_path / "run")
