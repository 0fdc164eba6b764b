"""A run of small windows with fresh examples of every day, for the tests of recalibrations."""

from __future__ import annotations

import dist_cases
import torch
from torch.utils.data import TensorDataset
from window_cases import config, fit_inline

import laplace_dist
from laplace.likelihoods.categorical import Categorical
from laplace_dist.recalibration import recalibrate
from laplace_dist.run import recalibrations
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan

N = 200  # fresh examples of a day
SIZES = {"batch_size": 24, "segment_size": 24, "skip_tune": True}  # tunings are the concern of two tests alone


def fresh(split: str, day: int, shift: float = 0.0, share: float = 1 / 3, change: bool = False) -> TensorDataset:
    """Return a day's training data, and fresh examples of its own: shifted, with other shares of labels, or with other labels."""
    generator = torch.Generator().manual_seed(1000 * day + ["train", "val", "test", "recent"].index(split))
    n = 24 if split == "train" else N
    x = torch.randn(n, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2)
    if change:
        with torch.no_grad():  # what the model thinks least likely
            y = dist_cases.convnet()(x).argmin(1)
    if share != 1 / 3:
        kept = torch.multinomial(torch.where(y == 0, share, (1 - share) / 2), n, replacement=True, generator=generator)
        x, y = x[kept], y[kept]
    return TensorDataset(x + shift, y)


def old_examples(split: str, day: int) -> TensorDataset:
    """Return fresh training data, and the test examples of the day before."""
    return fresh(split, day - 1 if split == "test" else day)


def without_labels(split: str, day: int) -> TensorDataset:
    """Return recent examples that are shifted, with labels that are none, beside test examples that are not."""
    x, y = fresh(split, day, 1.0 if split == "recent" else 0.0).tensors
    return TensorDataset(x, y if split != "recent" else torch.full_like(y, -1, dtype=torch.float32))


def inputs_alone(split: str, day: int) -> TensorDataset | list[torch.Tensor]:
    """Return recent examples that are no pairs."""
    whole = fresh(split, day)
    return whole if split != "recent" else list(whole.tensors[0])


class TwoScores(Categorical):
    """A classification with a figure of its own."""

    def summarize(self, scores, ood_confidence=None):
        return {**super().summarize(scores, ood_confidence), "surprise": scores["nll"].max().item()}


def few(split: str, day: int, n: int) -> TensorDataset:
    """Return fresh data with so many test examples."""
    whole = fresh(split, day)
    return TensorDataset(*whole[:n]) if split == "test" else whole


def numbers(split: str, day: int, shift: float = 0.0) -> TensorDataset:
    """Return a regression's data."""
    x, _ = fresh(split, day).tensors
    return TensorDataset(x + shift, torch.stack([x.sum((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 0, 0]], 1))


def begin(place):
    """Fit a run and recalibrate it once."""
    fit_inline(config(place, data="recalibration_cases:fresh", data_args={"day": 0}, window="day-0", **SIZES))
    day(place, 1)
    return place


def day(place, number, **changes):
    data = {name: changes.pop(name) for name in ("shift", "share", "change", "n") if name in changes}
    extra = {name: changes.pop(name) for name in ("dry_run", "drop_window") if name in changes}
    given = {"data": "recalibration_cases:fresh", "data_args": {"day": number, **data}, "window": f"day-{number}"}
    return recalibrate(config(place, **{**SIZES, **given, **changes}), laplace_dist.Inline, **extra)


def decision(place, name):
    store = Checkpoint(str(place))
    return recalibrations.read_decision(store, read_plan(store), name)
