"""Runs that reports are made of: a classifier, a regression with groups, a month of recalibrations; names with HTML in them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import laplace_dist
from laplace_dist import demo
from laplace_dist.config.settings import Config
from laplace_dist.job import Job, fit
from laplace_dist.recalibration import recalibrate

HTML = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>&amp;$x$'


class Grouped(TensorDataset):
    """Examples with a group each."""

    def __init__(self, *tensors: torch.Tensor, group: list[str]) -> None:
        super().__init__(*tensors)
        self.group = group


def sinusoid(split: str, hostile: bool = False) -> TensorDataset:
    """Return two waves under noise; training data lie in the middle, test data reach further, with a group for each side."""
    generator = torch.Generator().manual_seed({"train": 0, "test": 1}.get(split, 2))
    n = 256 if split == "train" else 150
    x = (torch.rand(n, 1, generator=generator) * 2 - 1) * (2.5 if split == "train" else 4)
    y = torch.cat([x.sin(), 0.5 * x.cos()], 1) + 0.2 * torch.randn(n, 2, generator=generator)
    side = f"outside {HTML}" if hostile else "outside"
    return Grouped(x, y, group=[side if abs(value) > 2.5 else "inside" for value in x[:, 0].tolist()])


def waves(note: str = "") -> nn.Module:
    """Return a small network that has been trained on them; the note changes nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 2))
    x, y = sinusoid("train").tensors
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


def config(checkpoint, **changes) -> Config:
    given = {"checkpoint": str(checkpoint), "batch_size": 32, "gpus_per_worker": 0.0, "window": "first"}
    return Config(**{**given, **changes})


def regression(checkpoint, **changes) -> Config:
    given = {"model": "report_cases:waves", "data": "report_cases:sinusoid", "likelihood": "regression"}
    return config(checkpoint, **{**given, **changes})


def digits(checkpoint, week: int = 1, **changes) -> Config:
    given = {"model": "laplace_dist.demo:network", "data": "laplace_dist.demo:digits", "window": f"week-{week}"}
    more = {"ood": ["inverted", "shuffled"], "data_args": {"week": week}, "margin_ece": 0.05, "grid_size": 11}
    return config(checkpoint, **{**given, **more, **changes})


def inline(chosen: Config):
    return fit(chosen, executor=laplace_dist.Inline)


@cache
def trained() -> str:
    """Return the path of weights of the demo's network, which a page needs no better than after an eighth of its training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "EPOCHS", demo.EPOCHS // 8)
        return demo.train()


def month(checkpoint) -> None:
    """Fit a week of digits, and add two more."""
    weights = trained()
    inline(digits(checkpoint, weights=weights))
    for week in (2, 3):
        recalibrate(digits(checkpoint, week, weights=weights), executor=laplace_dist.Inline)


def job(chosen: Config) -> Job:
    """Return a job whose tasks are carried out in this process."""
    return Job(chosen, laplace_dist.Inline)
