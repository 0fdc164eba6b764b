"""Networks and data for trainings by empirical Bayes, and the same training in one process."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import marglik_training
from laplace_dist import demo
from laplace_dist.config.settings import Config
from laplace_dist.config.training import Training


def sine(dtype: str = "float64") -> nn.Module:
    torch.manual_seed(711)
    return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).to(getattr(torch, dtype))


def sine_data(split: str, dtype: str = "float64") -> TensorDataset:
    generator = torch.Generator().manual_seed(711)
    x = 8 * torch.rand(150, 1, generator=generator, dtype=torch.float64)
    y = x.sin() + 0.3 * torch.randn(150, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(getattr(torch, dtype)), y.to(getattr(torch, dtype)))


def digits(dtype: str = "float32") -> nn.Module:
    torch.manual_seed(1)
    return demo.network()


def digits_data(split: str, dtype: str = "float32") -> TensorDataset:
    return TensorDataset(*(tensor[:600] for tensor in demo.digits(split).tensors))


def drawn() -> nn.Module:
    """A network whose first weights are drawn anew at every call, with dropout."""
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1)).double()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()


def few(split: str, scale: float = 1.0) -> TensorDataset:
    x, y = sine_data(split).tensors
    return TensorDataset(x[:24], scale * y[:24])


def config(checkpoint, case: str = "sine", **changes) -> Config:
    values = {
        "model": f"training_cases:{case}",
        "data": f"training_cases:{case}_data",
        "likelihood": "classification" if case == "digits" else "regression",
        "hessian_structure": "full",
        "batch_size": 50,
        "gpus_per_worker": 0.0,
        "skip_report": True,
        "checkpoint": str(checkpoint),
    }
    return Config(**{**values, **changes})


def small(checkpoint, **changes) -> Config:
    """Settings of a training that takes a moment."""
    given = {"model": "training_cases:drawn", "data": "training_cases:few", "hessian_structure": "diag"}
    return config(checkpoint, **{**given, "batch_size": 12, "segment_size": 12, **changes})


def settings(**changes) -> Training:
    return Training(**{"n_epochs": 3, "n_hypersteps": 2, "optimizer_args": {"lr": 1e-2}, "parts": 2, **changes})


def in_one_process(chosen: Config, own: Training, case: str):
    """The core library's training with the same settings; returns what it returns."""
    model, data = globals()[case](), globals()[f"{case}_data"]("train")
    optimizers = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    same = ("n_epochs", "n_hypersteps", "lr_hyp", "n_epochs_burnin", "marglik_frequency", "temperature")
    same += ("prior_prec_init", "sigma_noise_init", "fix_sigma_noise")
    return marglik_training(
        model,
        DataLoader(data, batch_size=chosen.batch_size),
        chosen.likelihood,
        chosen.hessian_structure,
        optimizer_cls=optimizers[own.optimizer],
        optimizer_kwargs=own.optimizer_args,
        scheduler_cls=None if own.scheduler is None else getattr(torch.optim.lr_scheduler, own.scheduler),
        scheduler_kwargs=own.scheduler_args,
        prior_structure=chosen.prior_structure,
        **{name: getattr(own, name) for name in same},
    )


def farthest(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two sequences of one length."""
    return max(abs(a - b) / max(abs(b), 1e-300) for a, b in zip(ours, theirs, strict=True)) if theirs else math.nan
