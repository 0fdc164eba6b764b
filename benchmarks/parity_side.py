"""Numbers of one library on fixed weights and data; run by ``parity.py`` once in each environment.

Only names that both libraries document are used.
"""

from __future__ import annotations

import argparse
import itertools
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LIKELIHOODS = ("classification", "regression")
STRUCTURES = ("full", "kron", "diag")
SUBSETS = ("all", "last_layer")
NETWORKS = ("mlp", "cnn")


def network(kind: str, outputs: int, dtype: torch.dtype) -> nn.Module:
    """A small MLP or CNN with random weights, the same in both environments."""
    torch.manual_seed(1)
    if kind == "mlp":
        layers = [nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, outputs)]
    else:
        layers = [nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, outputs)]
    return nn.Sequential(*layers).to(dtype).eval()


def data(likelihood: str, dtype: torch.dtype) -> tuple[DataLoader, torch.Tensor]:
    """Forty training examples in batches of sixteen, and five test inputs."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(45, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    if likelihood == "classification":
        y = torch.randint(0, 3, (40,), generator=generator)
    else:
        y = torch.randn(40, 3, generator=generator, dtype=torch.float64).to(dtype)
    return DataLoader(TensorDataset(x[:40], y), batch_size=16), x[40:]


def backends(which: str) -> dict[str, type]:
    """Backends by the name under which they are compared."""
    import laplace.curvature as c

    if which == "ours":
        return {"native GGN": c.NativeGGN, "native EF": c.NativeEF}
    return {
        "curvlinops GGN": c.CurvlinopsGGN,
        "curvlinops EF": c.CurvlinopsEF,
        "asdl GGN": c.AsdlGGN,
        "asdl EF": c.AsdlEF,
        "backpack GGN": c.BackPackGGN,
        "backpack EF": c.BackPackEF,
    }


def measure(kind: str, likelihood: str, structure: str, subset: str, backend: type, dtype: torch.dtype) -> dict:
    """Posterior precision, evidence and predictive of one posterior, or the reason why there is none."""
    from laplace import Laplace

    noise = {"sigma_noise": 0.7} if likelihood == "regression" else {}
    loader, x = data(likelihood, dtype)
    try:
        la = Laplace(
            network(kind, 3, dtype),
            likelihood,
            subset_of_weights=subset,
            hessian_structure=structure,
            prior_precision=2.0,
            backend=backend,
            **noise,
        )
        la.fit(loader)
        precision = la.posterior_precision
        precision = precision.to_matrix() if structure == "kron" else precision
        evidence = la.log_marginal_likelihood()
        predictive = la(x) if likelihood == "classification" else torch.cat([t.flatten() for t in la(x)])
    except Exception as error:  # noqa: BLE001 - whatever a peer raises becomes the table's entry
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    found = {"precision": precision, "evidence": evidence, "predictive": predictive}
    return {name: value.detach().double() for name, value in found.items()}


def main() -> None:
    """Write all numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--which", choices=["ours", "theirs"], required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        for kind, likelihood, structure, subset in itertools.product(NETWORKS, LIKELIHOODS, STRUCTURES, SUBSETS):
            for name, backend in backends(arguments.which).items():
                key = f"{str(dtype)[6:]}|{kind}|{likelihood}|{structure}|{subset}|{name}"
                results[key] = measure(kind, likelihood, structure, subset, backend, dtype)
    torch.save(results, arguments.out)


if __name__ == "__main__":
    main()
