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
# What is compared with every GGN and EF backend, and with every Hessian backend.
POSTERIORS = [(structure, subset) for structure in ("full", "kron", "diag") for subset in ("all", "last_layer")] + [
    ("full", "subnetwork"),
    ("diag", "subnetwork"),
    ("gp", "all"),
    ("gp", "last_layer"),
    ("gp, independent outputs", "all"),
    ("full", "marglik_training"),
    ("kron", "marglik_training"),
    ("diag", "marglik_training"),
]
HESSIANS = [("full", "all"), ("lowrank", "all")]
PRIOR, NOISE = 2.0, 0.7
HESSIAN_PRIOR = 200.0  # large enough for a Hessian at random weights, which is indefinite
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
        return {"native GGN": c.NativeGGN, "native EF": c.NativeEF, "native Hessian": c.NativeHessian}
    return {
        "curvlinops GGN": c.CurvlinopsGGN,
        "curvlinops EF": c.CurvlinopsEF,
        "curvlinops Hessian": c.CurvlinopsHessian,
        "asdl GGN": c.AsdlGGN,
        "asdl EF": c.AsdlEF,
        "asdl Hessian": c.AsdlHessian,
        "backpack GGN": c.BackPackGGN,
        "backpack EF": c.BackPackEF,
    }


def fit(kind: str, likelihood: str, structure: str, subset: str, backend: type, dtype: torch.dtype):
    """A fitted posterior."""
    from laplace import Laplace

    model, (loader, _) = network(kind, 3, dtype), data(likelihood, dtype)
    kwargs: dict = {"sigma_noise": NOISE} if likelihood == "regression" else {}
    structure, _, independent = structure.partition(", ")
    if structure == "gp":
        kwargs |= {"n_subset": 40, "independent_outputs": bool(independent)}
    if subset == "subnetwork":
        kwargs["subnetwork_indices"] = subnetwork(model)
    prior = HESSIAN_PRIOR if backend.__name__.endswith("Hessian") else PRIOR
    la = Laplace(
        model,
        likelihood,
        subset_of_weights=subset,
        hessian_structure=structure,
        prior_precision=prior,
        backend=backend,
        **kwargs,
    )
    la.fit(loader)
    return la


def subnetwork(model: nn.Module) -> torch.Tensor:
    """Every third parameter."""
    return torch.arange(0, sum(p.numel() for p in model.parameters()), 3)


def train(kind: str, likelihood: str, structure: str, backend: type, dtype: torch.dtype):
    """Weights and hyperparameters trained together, and the evidence of every step."""
    from laplace import marglik_training

    la, _, margliks, _ = marglik_training(
        network(kind, 3, dtype),
        data(likelihood, dtype)[0],
        likelihood,
        structure,
        backend=backend,
        optimizer_kwargs={"lr": 1e-2},
        n_epochs=5,
        prior_structure="scalar",
    )
    return la, torch.as_tensor(margliks)


def measure(kind: str, likelihood: str, structure: str, subset: str, backend: type, dtype: torch.dtype) -> dict:
    """Posterior precision, evidence and predictives of one posterior, or the reason why there is none."""
    try:
        if subset == "marglik_training":
            la, evidence = train(kind, likelihood, structure, backend, dtype)
            precision = torch.cat([la.prior_precision.reshape(-1), torch.as_tensor(la.sigma_noise).reshape(-1)])
        else:
            la = fit(kind, likelihood, structure, subset, backend, dtype)
            evidence = la.log_marginal_likelihood()
            precision = None if structure.startswith("gp") else dense(la.posterior_precision, structure)
        slope = None if subset == "marglik_training" else gradient(la, likelihood)
        found = {
            "precision": precision,
            "evidence": evidence,
            "gradient": slope,
            **predictives(la, likelihood, data(likelihood, dtype)[1]),
        }
    except Exception as error:  # noqa: BLE001 - whatever a peer raises becomes the table's entry
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    return {name: value.detach().double() for name, value in found.items() if value is not None}


def dense(precision, structure: str) -> torch.Tensor:
    """A posterior precision as one tensor."""
    if structure == "lowrank":
        (vectors, values), prior = precision
        return vectors * values @ vectors.T + torch.diag(prior)
    return precision.to_matrix() if structure == "kron" else precision


def gradient(la, likelihood: str) -> torch.Tensor:
    """Derivatives of the evidence in prior precision and noise."""
    prior = la.prior_precision.detach().reshape(-1)[:1].clone().requires_grad_()
    noise = [torch.full((1,), NOISE, dtype=prior.dtype, requires_grad=True)] if likelihood == "regression" else []
    found = torch.autograd.grad(la.log_marginal_likelihood(prior, *noise), [prior, *noise])
    la.prior_precision = prior.detach()
    if noise:
        la.sigma_noise = NOISE
    return torch.cat(found)


def predictives(la, likelihood: str, x: torch.Tensor) -> dict:
    """The default predictive, and the other links of a classifier or the joint covariance of a regression."""
    if likelihood == "regression":
        return {
            "predictive": torch.cat([t.detach().flatten() for t in la(x)]),
            "links, joint": torch.cat([t.detach().flatten() for t in la(x, joint=True)]),
        }
    links = [la(x, link_approx=link).detach() for link in ("bridge", "bridge_norm")]
    return {"predictive": la(x), "links, joint": torch.cat(links)}


def main() -> None:
    """Write all numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--which", choices=["ours", "theirs"], required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import laplace.curvature

    if hasattr(laplace.curvature, "NativeGGN") != (arguments.which == "ours"):
        raise SystemExit(f"This environment's laplace is not {arguments.which}: {laplace.curvature.__file__}")
    results = {}
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        for kind, likelihood in itertools.product(NETWORKS, LIKELIHOODS):
            for name, backend in backends(arguments.which).items():
                for structure, subset in HESSIANS if name.endswith("Hessian") else POSTERIORS:
                    key = f"{str(dtype)[6:]}|{kind}|{likelihood}|{structure}|{subset}|{name}"
                    results[key] = measure(kind, likelihood, structure, subset, backend, dtype)
    torch.save(results, arguments.out)


if __name__ == "__main__":
    main()
