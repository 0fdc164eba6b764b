"""Calibration of an image classifier: MAP against a last-layer and an all-weights posterior.

    python examples/calibration.py

uses the bundled noisy digits, prints accuracy, NLL and ECE, and writes ``calibration.png``, a reliability diagram.
"""

from __future__ import annotations

import argparse

import torch
from plots import pyplot
from torch.utils.data import DataLoader

from laplace import Laplace
from laplace.utils.metrics import classification_scores, summarize_classification
from laplace_dist import demo


def posterior(model: torch.nn.Module, subset: str, structure: str) -> Laplace:
    """Fit, and choose the prior precision by the validation loss."""
    la = Laplace(model, "classification", subset_of_weights=subset, hessian_structure=structure)
    la.fit(DataLoader(demo.digits("train"), batch_size=128))
    la.optimize_prior_precision(
        method="gridsearch", val_loader=DataLoader(demo.digits("val"), batch_size=128), grid_size=41
    )
    return la


def main(out: str | None = "calibration.png") -> dict[str, dict[str, float]]:
    """Print the table and draw the diagram."""
    model = demo.trained_network()
    x, y = demo.digits("test").tensors
    predictions = {"MAP": model(x).detach().softmax(-1)}
    for subset, structure in (("last_layer", "kron"), ("all", "kron"), ("all", "full")):
        predictions[f"{subset} × {structure}"] = posterior(model, subset, structure)(x)
    scores = {name: classification_scores(probs, y) for name, probs in predictions.items()}
    table = {name: summarize_classification(values) for name, values in scores.items()}
    for name, row in table.items():
        print(f"{name:18} accuracy {row['accuracy']:.3f}  NLL {row['nll']:.3f}  ECE {row['ece']:.3f}")
    if out is not None:
        reliability_diagram(scores, out)
    return table


def reliability_diagram(scores: dict[str, dict[str, torch.Tensor]], out: str, bins: int = 10) -> None:
    """Draw accuracy against confidence, one line per predictor."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(5, 5), constrained_layout=True)
    panel.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    for name, values in scores.items():
        index = (values["confidence"] * bins).long().clamp(max=bins - 1)
        count = torch.zeros(bins).double().index_add(0, index, torch.ones_like(values["confidence"]))
        mean = {k: torch.zeros(bins).double().index_add(0, index, values[k]) / count for k in ("confidence", "correct")}
        kept = count >= 5
        panel.plot(mean["confidence"][kept], mean["correct"][kept], marker="o", markersize=4, label=name)
    panel.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability on noisy digits")
    panel.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="calibration.png")
    main(**vars(parser.parse_args()))
