"""Models and data for the tests of tuning whose best prior, noise or temperature is known; workers import this module."""

from __future__ import annotations

import dist_cases
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from laplace.likelihoods import GaussianPerOutput
from laplace_dist import load_posterior
from laplace_dist.config.settings import Config
from laplace_dist.run import tunings
from laplace_dist.run.checkpoint import Checkpoint

FEATURES, SIZES = 5, {"train": 40, "val": 300, "test": 100}


def config(checkpoint, kind: str, **changes) -> Config:
    """Return settings of a job on one of the cases below; `kind` names them."""
    model, data, likelihood = {
        "line": ("line", "points", "regression"),
        "classes": ("classifier", "classes", "classification"),
        "calibrated": ("classifier", "calibrated", "classification"),
        "outliers": ("slope", "outliers", "classification"),
    }[kind]
    values = {
        "model": f"tuning_cases:{model}",
        "data": f"tuning_cases:{data}",
        "likelihood": likelihood,
        "hessian_structure": "full",
        "batch_size": 16,
        "gpus_per_worker": 0.0,
        "checkpoint": str(checkpoint),
        "tune_method": "gridsearch",
        "skip_evaluate": True,
    }
    return Config(**{**values, **changes})


def points(split: str) -> TensorDataset:
    """Return inputs and two outputs that are linear in them, with noise of standard deviation 0.3."""
    generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
    truth = torch.randn(FEATURES, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    n = 8 if split == "train" else SIZES[split]
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x @ truth + 0.3 * noise)


def line() -> nn.Module:
    """Return weights near those of the points: nearer than the few training points make a flat prior believe."""
    truth = torch.randn(FEATURES, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    model = nn.Linear(FEATURES, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(truth.T + 0.1 * torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(8)))
    return model.eval()


def two_noises() -> GaussianPerOutput:
    """Return a likelihood that takes the second output for four times as noisy."""
    return GaussianPerOutput([0.3, 1.2])


def _logits(x: Tensor) -> Tensor:
    weight = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return 1.5 * x @ weight.T


def classifier(size: float = 1.0, times: float = 1.0) -> nn.Module:
    """Return the network whose logits are `times` those that the labels are drawn from, for inputs that are `size` times larger."""
    model = nn.Linear(FEATURES, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(times / size * _logits(torch.eye(FEATURES, dtype=torch.float64)).T)
    return model.eval()


def inputs(split: str, window: int = 0) -> Tensor:
    """Return inputs of a split; of the training split, those of a window."""
    generator = torch.Generator().manual_seed({"train": 10 * window, "val": 1, "test": 2}[split])
    return torch.randn(SIZES[split], FEATURES, generator=generator, dtype=torch.float64)


def classes(split: str, size: float = 1.0, window: int = 0) -> TensorDataset:
    """Return inputs, and labels drawn from a softmax."""
    x, generator = inputs(split, window), torch.Generator().manual_seed({"train": 3, "val": 4, "test": 5}[split])
    y = torch.multinomial(_logits(x).softmax(-1), 1, generator=generator)[:, 0]
    return TensorDataset(size * x, y)


def calibrated(split: str) -> TensorDataset:
    """Return the same, but for labels that are as likely as the model says to four digits: any uncertainty makes it worse."""
    x, _ = classes(split).tensors
    if split == "train":
        return TensorDataset(x, _logits(x).argmax(-1))
    x = x[:40].repeat_interleave(50, 0)
    shares = _logits(x[::50]).softmax(-1).cumsum(-1)
    places = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    y = (places[None, :, None] >= shares[:, None]).sum(-1).clamp(max=2)
    return TensorDataset(x, y.flatten())


class Constant(nn.Module):
    """Outputs that weights and inputs do not reach."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, outputs).double()

    def forward(self, x: Tensor) -> Tensor:
        """Return 0, 1, …, whatever x is."""
        y = self.linear(x)
        return 0 * y + torch.arange(y.shape[1], dtype=y.dtype)


def constant(outputs: int = 3) -> nn.Module:
    """Return a network of constant outputs."""
    torch.manual_seed(0)
    return Constant(outputs).eval()


def slope() -> nn.Module:
    """Return a classifier of one input that is sure of itself by 0.9 at 1."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0986], [-1.0986]]))
    return model.eval()


def outliers(split: str) -> TensorDataset:
    """Return inputs of 1 and -1 of which nine in ten are as the model says, and a few far ones that are all wrong.

    Uncertainty helps the loss, which the far ones make large, and harms the calibration of all others.
    """
    if split == "train":
        return TensorDataset(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([0, 1]))
    n = 2000
    x = torch.ones(n, 1, dtype=torch.float64)
    x[::2] = -1
    label = (x[:, 0] < 0).long()
    wrong = torch.arange(n) // 2 % 10 == 0
    x[::50] *= 4.0
    wrong[::50] = True
    return TensorDataset(x, torch.where(wrong, 1 - label, label))


def tuned(chosen, **job):
    """Carry out fit and tuning; returns the key, the manifest, and what was said."""
    said = []
    with dist_cases.inline_job(chosen) as work:
        work.say = said.append
        work.open()
        work.map()
        key = work.tune(work.reduce())
    return key, tunings.read_tuning(Checkpoint(chosen.checkpoint), key)[0], "\n".join(said)


def posterior(chosen, model):
    return load_posterior(chosen.checkpoint, model)


def log_losses(la, x, y):
    return -la(x, log_probs=True).gather(1, y[:, None])[:, 0]
