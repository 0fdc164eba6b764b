"""Which figures an evaluation will have, as far as the likelihood and the splits say so before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_dist.config import compatibility, gates
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config


def check_gates(config: Config) -> None:
    """Refuse thresholds on figures that the evaluation will not have.

    Raises:
        SettingsError: A threshold names one.
    """
    if names := figures(config):
        for text in config.gate:
            gates.refuse_unknown(gates.parse(text), names)


class _AnyScore(dict[str, Tensor]):
    """Scores of two examples, of whatever name is asked for."""

    def __missing__(self, name: str) -> Tensor:
        return torch.ones(2, dtype=torch.float64)


def figures(config: Config) -> list[str]:
    """Return the names of an evaluation's figures; none where code of the user's own decides which there are."""
    likelihood = likelihood_of(config.likelihood)
    if not (_is_ours(likelihood.scores) and _is_ours(likelihood.summarize)):
        return []
    outside = {name: torch.ones(2) for name in compatibility.ood(config) if name != config.unlabelled}
    return list(likelihood.summarize(_AnyScore(nll=torch.ones(2)), outside))


def _is_ours(method: Any) -> bool:
    return method.__module__.partition(".")[0] == "laplace"
