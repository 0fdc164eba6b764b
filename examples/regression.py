"""A sinusoid: choose prior and noise by the evidence after training, and by online empirical Bayes during it.

    python examples/regression.py

writes ``regression.png``: the data, the MAP and two standard deviations of the predictive, for both ways.
"""

from __future__ import annotations

import argparse

import torch
from plots import pyplot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, marglik_training

NOISE = 0.3


def sinusoid(n: int = 150) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs and noisy targets on (0, 8), and test inputs beyond both ends."""
    generator = torch.Generator().manual_seed(711)
    x = 8 * torch.rand(n, 1, generator=generator)
    y = x.sin() + NOISE * torch.randn(n, 1, generator=generator)
    return x, y, torch.linspace(-5, 13, 500)[:, None]


def network() -> nn.Module:
    """One hidden layer of fifty units."""
    torch.manual_seed(711)
    return nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))


def train(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Ordinary training by Adam on the squared error."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()


def post_hoc(loader: DataLoader, epochs: int) -> Laplace:
    """Train, fit a full posterior, then climb its evidence in prior precision and noise together."""
    model = network()
    train(model, loader, epochs)
    la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    la.fit(loader)
    log_prior, log_sigma = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    for _ in range(epochs):
        optimizer.zero_grad()
        (-la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())).backward()
        optimizer.step()
    la.prior_precision, la.sigma_noise = log_prior.detach().exp(), log_sigma.detach().exp()
    return la


def online(loader: DataLoader, epochs: int) -> Laplace:
    """Network and hyperparameters trained together."""
    la, _, _, _ = marglik_training(
        model=network(),
        train_loader=loader,
        likelihood="regression",
        hessian_structure="full",
        n_epochs=epochs,
        optimizer_kwargs={"lr": 1e-2},
        prior_structure="scalar",
    )
    return la


def predictive(la: Laplace, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a new observation."""
    mean, variance = la(x)
    return mean.squeeze(), (variance.squeeze() + la.sigma_noise**2).sqrt()


def main(epochs: int = 1000, out: str | None = "regression.png") -> dict[str, Laplace]:
    """Fit both ways, print what was found, and plot it."""
    x, y, grid = sinusoid()
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    fitted = {"evidence after training": post_hoc(loader, epochs), "evidence during training": online(loader, epochs)}
    for name, la in fitted.items():
        print(f"{name}: σ = {la.sigma_noise.item():.3f} (true {NOISE}), δ = {la.prior_precision.mean().item():.3f}")
    if out is not None:
        plot(fitted, x, y, grid, out)
    return fitted


def plot(fitted: dict[str, Laplace], x: torch.Tensor, y: torch.Tensor, grid: torch.Tensor, out: str) -> None:
    """Draw one panel per fit."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(fitted), figsize=(10, 3.5), sharey=True, constrained_layout=True)
    for panel, (name, la) in zip(panels, fitted.items(), strict=True):
        mean, deviation = predictive(la, grid)
        line = grid.squeeze()
        panel.fill_between(
            line, mean - 2 * deviation, mean + 2 * deviation, alpha=0.25, label="± 2 standard deviations"
        )
        panel.plot(line, mean, label="mean")
        panel.scatter(x, y, s=8, color="black", label="data")
        panel.set(title=name, xlabel="x", ylim=(-4, 4))
    panels[0].set_ylabel("y")
    panels[0].legend(loc="lower left")
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--out", default="regression.png")
    main(**vars(parser.parse_args()))
