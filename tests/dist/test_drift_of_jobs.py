"""Sums of a job do not drift: a confident classifier in float32, many segments, against the exact sum."""

from __future__ import annotations

import dist_cases
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from laplace_dist import load_posterior

N, KINDS = 20_000, 40  # examples, and how many different ones: their sum is known exactly


def head() -> nn.Module:
    """Return a linear classifier that is sure of most of its inputs, p (1 - p) from 1e-8 to 1/4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(6)
    return model.eval()


class Repeated(Dataset):
    """A few inputs over and over, the unsure ones first."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(KINDS, 8, generator=generator) * torch.linspace(0.1, 6, KINDS)[:, None]

    def __len__(self) -> int:
        return N

    def __getitems__(self, indices):
        return [(self.x[min(i * KINDS // N, KINDS - 1)], 0) for i in indices]

    def __getitem__(self, index: int):
        if not 0 <= index < N:
            raise IndexError(index)
        return self.__getitems__([index])[0]


def repeated(split: str) -> Dataset:
    return Repeated()


def exact(structure: str) -> dict[str, torch.Tensor]:
    """Return the sums in float64 from the definition: of the same float32 inputs and logits, each counted as it occurs."""
    x = Repeated().x
    p = head()(x).detach().double().softmax(1)
    x = x.double()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    count = N // KINDS
    if structure == "kron":
        return {"0.weight/A": count * x.T @ x, "0.weight/B": count * hessian.sum(0)}
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    return {"0.weight": count * diagonal.T @ x.square(), "0.bias": count * diagonal.sum(0)}


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_sums_of_a_job_do_not_drift(tmp_path, structure):
    config = dist_cases.config(
        tmp_path,
        model="test_drift_of_jobs:head",
        data="test_drift_of_jobs:repeated",
        hessian_structure=structure,
        batch_size=200,
        segment_size=2000,
    )
    dist_cases.run_inline(config)
    sums = load_posterior(str(tmp_path), head()).sums.to_tensors()
    for name, truth in exact(structure).items():
        value = next(found for key, found in sums.items() if key == name or key.startswith(f"{name}/"))
        assert float((value - truth).norm() / truth.norm()) <= 2e-6, name
