"""Structures side by side on the demo's noisy digits: distance from the dense curvature, evidence, predictive, time.

    python benchmarks/structures.py --seeds 5

For every seed a convolutional network and an MLP are trained as the demo trains its own. Each scalar prior precision is tuned
twice, by the evidence and by the validation loss, and scored on the test split. Prints Markdown, means over the seeds and
standard deviations.

Columns: relative Frobenius distance from the dense curvature, and from its blocks of single parameter tensors; mean factor
between predictive variances and the dense posterior's at a prior precision of 10; log evidence at its maximum, with the scores
there; the scores of the prior that the validation loss prefers, and that prior; CPU seconds of the fit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace import Laplace
from laplace.predictive import glm_distribution
from laplace.utils.metrics import classification_scores, summarize_classification
from laplace_dist import demo

STRUCTURES = ("full", "blockdiag", "ekfac", "kron", "diag")
COLUMNS = (
    "distance",
    "of blocks",
    "variances",
    "evidence",
    "nll, evidence",
    "ece, evidence",
    "nll",
    "ece",
    "prior",
    "cpu s",
)


def mlp() -> nn.Module:
    """One hidden layer, in which no position shares a weight."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def trained(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network after the demo's training, from another start."""
    torch.manual_seed(seed)
    model = build()
    demo._fit(model, *demo.digits("train").tensors)
    return model.eval()


def dense(la: Laplace) -> Tensor:
    """The summed curvature as a matrix, float64."""
    if la.structure == "kron":
        return la.H_facs.to_matrix().double()
    if la.structure == "ekfac":
        return la.H.to_matrix().double()
    if la.structure == "blockdiag":
        return torch.block_diag(*la.H).double()
    return torch.diag(la.H).double() if la.structure == "diag" else la.H.double()


def distances(la: Laplace, ours: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative distances of two dense matrices: as they are, and of their blocks of single parameter tensors."""
    owner = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(la.params)])
    within = owner[:, None] == owner
    return {
        "distance": float((ours - truth).norm() / truth.norm()),
        "of blocks": float((ours - truth)[within].norm() / truth[within].norm()),
    }


def scores(probabilities: Tensor, y: Tensor) -> tuple[float, float]:
    """NLL and ECE."""
    found = summarize_classification(classification_scores(probabilities, y))
    return found["nll"], found["ece"]


def measured(model: nn.Module, full: Laplace | None, structure: str) -> tuple[dict[str, float], Laplace]:
    """One row of the table; `full` is the dense posterior of the same model."""
    x, y = demo.digits("test").tensors
    begun = time.process_time()
    la = Laplace(model, "classification", "all", structure)
    la.fit(DataLoader(demo.digits("train"), batch_size=128))
    row = {"cpu s": time.process_time() - begun}
    reference = full or la
    la.optimize_prior_precision(
        method="gridsearch", val_loader=DataLoader(demo.digits("val"), batch_size=128), grid_size=41
    )
    row["prior"] = float(la.prior_precision)
    row["nll"], row["ece"] = scores(la(x), y)
    la.prior_precision = 1.0
    la.optimize_prior_precision(method="marglik", n_steps=300, lr=0.1)
    row["evidence"] = float(la.log_marginal_likelihood())
    row["nll, evidence"], row["ece, evidence"] = scores(la(x), y)
    truth = dense(reference)
    row |= distances(la, dense(la), truth)
    la.prior_precision = reference.prior_precision = 10.0
    ours, theirs = (glm_distribution(one, x, diagonal=True)[1].double() for one in (la, reference))
    row["variances"] = float(((ours / theirs).log()).abs().mean().exp())
    return row, la


def table(build: Callable[[], nn.Module], seeds: int) -> list[str]:
    """The lines of one network's table."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in STRUCTURES}
    maps = []
    for seed in range(seeds):
        model, full = trained(build, seed), None
        x, y = demo.digits("test").tensors
        maps.append(scores(model(x).detach().softmax(-1), y))
        for name in STRUCTURES:
            row, la = measured(model, full, name)
            full = full or la
            rows[name].append(row)
    lines = ["| structure | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, found in rows.items():
        lines.append(f"| {name} | " + " | ".join(spread([row[column] for row in found]) for column in COLUMNS) + " |")
    nll, ece = (spread(list(values)) for values in zip(*maps, strict=True))
    return [*lines, f"| MAP |  |  |  |  |  |  | {nll} | {ece} |  |  |"]


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in four digits."""
    deviation = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for title, build in (("convolutional, 1,898 weights", demo.network), ("MLP, 2,410 weights", mlp)):
        print(f"\n{title}\n")
        print("\n".join(table(build, options.seeds)), flush=True)


if __name__ == "__main__":
    main()
