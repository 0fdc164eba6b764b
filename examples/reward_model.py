"""A Bradley-Terry reward model: fitted on comparisons as a classifier, used as a regression with uncertainty.

python examples/reward_model.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace


class RewardModel(nn.Module):
    """Rewards of pairs ``(batch, 2, dim)`` for training, of single items ``(batch, dim)`` for use."""

    def __init__(self, dim: int = 3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 100), nn.ReLU(), nn.Linear(100, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, 2)`` for pairs, rewards ``(batch, 1)`` for items."""
        if x.ndim == 3:
            return self.net(x.flatten(0, 1)).reshape(len(x), 2)
        return self.net(x)


def comparisons(n: int = 200, dim: int = 3) -> TensorDataset:
    """Random pairs; the label says which of the two has the larger sum, with Bradley-Terry noise."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(n, 2, dim, generator=generator)
    preference = torch.sigmoid(2 * (pairs[:, 1] - pairs[:, 0]).sum(-1))
    return TensorDataset(pairs, (torch.rand(n, generator=generator) < preference).long())


def main(epochs: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Train, fit, and print rewards with their standard deviations, near and far from the data."""
    torch.manual_seed(0)
    model, loader = RewardModel(), DataLoader(comparisons(), batch_size=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    la = Laplace(model.eval(), "reward_modeling", subset_of_weights="all", hessian_structure="kron")
    la.fit(loader)
    la.optimize_prior_precision(method="marglik")
    items = torch.tensor([[0.5], [1.0], [2.0], [8.0]]) * torch.ones(3)
    mean, variance = la(items)
    for item, m, v in zip(items, mean.squeeze(-1), variance.squeeze(), strict=True):
        print(f"item {item.tolist()}: reward {m:.2f} ± {v.sqrt():.2f}")
    return mean, variance


if __name__ == "__main__":
    main()
