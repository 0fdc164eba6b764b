"""Small fitted posteriors of every subset, structure and prior, and their algebra written out densely."""

from __future__ import annotations

import torch

from laplace import Laplace

from . import naive
from .models import CASES, loader

STRUCTURES = ("full", "kron", "diag")
SIX = [(subset, structure) for subset in ("all", "last_layer") for structure in STRUCTURES]
PRIORS = {
    "full": ("scalar", "layerwise", "diag"),
    "kron": ("scalar", "layerwise"),
    "diag": ("scalar", "layerwise", "diag"),
}
COMBINATIONS = [(subset, structure, prior) for subset, structure in SIX for prior in PRIORS[structure]]


def fitted(subset="all", structure="full", case="mlp", n=5, **kwargs):
    model, x, y = CASES[case].make(n=n)
    la = Laplace(model, CASES[case].likelihood, subset, structure, **kwargs)
    la.fit(loader(x, y))
    return la


def prior_of(la, structure, seed=0):
    """A random positive prior precision."""
    size = {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}[structure]
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def dense_curvature(la):
    if la.structure == "kron":
        return naive.kron_matrix(la.H_facs.kfacs)
    return la.H if la.structure == "full" else torch.diag(la.H)


def dense_precision(la):
    """Posterior precision from the definition."""
    prior = la.prior_precision
    if len(prior) == la.n_layers and la.n_layers not in (1, la.n_params):
        prior = torch.cat([d.expand(p.numel()) for d, p in zip(prior, la.params, strict=True)])
    prior = torch.diag(prior.expand(la.n_params))
    return dense_curvature(la) / float(la.sigma_noise) ** 2 / la.temperature + prior


def close(value, truth, tolerance=1e-10):
    assert naive.relative_error(value.detach(), truth.detach()) < tolerance
