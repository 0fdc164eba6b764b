"""Notice that a model's weights are no longer those that a posterior was fitted at."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.turns import turn

_RELATIVE = 1e-9  # difference of a fingerprint that another order of addition explains


class Fingerprint:
    """Sum and norm of every parameter outside the posterior, as of the layers before a last layer, and of running statistics.

    Parameters with a distribution are not among them: the posterior's own mean tells whether they have changed. Nor are other
    buffers, in which modules may keep what is no part of their function.

    Args:
        model: The model, at the weights to remember.
        without: The parameters with a distribution.
    """

    def __init__(self, model: nn.Module, without: Iterable[nn.Parameter]):
        """See the class."""
        inferred = {id(p) for p in without}
        known = _remembered(model)
        self._names = [name for name, value in known.items() if id(value) not in inferred]
        self._values = self._of(known)
        self._versions = self._versions_of(model, known)

    def changed(self, model: nn.Module) -> list[str]:
        """Names of those that are gone or whose values have changed; looks at values only where torch has counted a change."""
        known = _remembered(model)
        gone = [name for name in self._names if name not in known]
        if gone:
            return gone
        versions = self._versions_of(model, known)
        if versions == self._versions:
            return []
        now = self._of(known).to(self._values.device)
        differs = ((now - self._values).abs() > _RELATIVE * (1 + self._values[:, 1:])).any(1).tolist()
        found = [name for name, other in zip(self._names, differs, strict=True) if other]
        if not found:
            self._versions = versions
        return found

    def _of(self, known: dict[str, Tensor]) -> Tensor:
        rows = [
            torch.stack([known[n].detach().sum(dtype=torch.float64), known[n].detach().double().norm()]).cpu()
            for n in self._names
        ]
        return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64, device="cpu")

    def _versions_of(self, model: nn.Module, known: dict[str, Tensor]) -> list[tuple[int, int]]:
        counters = [
            b for name, b in model.named_buffers() if name.endswith("num_batches_tracked") and not b.is_inference()
        ]
        values = [known[name] for name in self._names] + counters  # a batch norm counts no version of its statistics
        return [(value.data_ptr(), value._version) for value in values]


_STATISTICS = ("running_mean", "running_var", "running_std")  # other names may be what a module counts at every pass


def _remembered(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the statistics by which normalisations evaluate, which a forward pass in training mode changes."""
    statistics = {
        name: value
        for name, value in model.named_buffers()
        if name.rpartition(".")[2] in _STATISTICS and value.is_floating_point() and not value.is_inference()
    }
    return {**dict(model.named_parameters()), **statistics}


def _differing(model: nn.Module, params: Sequence[nn.Parameter], vector: Tensor) -> list[str]:
    """Names of the parameters whose entries are not those of the vector that they made up, or that the model has no more."""
    names = {id(p): name for name, p in model.named_parameters()}
    parts = vector.split([p.numel() for p in params])
    same = [(p.detach().flatten() == part.to(p.device)).all() for p, part in zip(params, parts, strict=True)]
    found = zip(params, torch.stack(same).tolist(), strict=True)
    return [names.get(id(p), "one that was replaced") for p, equal in found if not (equal and id(p) in names)]


def changed(la: Any) -> list[str]:
    """Names of the parameters of a fitted posterior's model that are not what they were at the fit."""
    with turn(la.model):
        return _differing(la.model, la.params, la.mean) + la._fingerprint.changed(la.model)


def check_type(la: Any) -> None:
    """Refuse a model that was converted since the fit, whose posterior is still of the type before.

    Raises:
        ValueError: If the parameters are of another floating-point type.
    """
    if la._mean is None:
        return
    now = reduce(torch.promote_types, [p.dtype for p in la.params])
    if la._mean.dtype != now:
        raise ValueError(
            f"The model was converted to {now} since the fit in {la._mean.dtype}, which this posterior is still of. Make a new "
            "posterior of the converted model and load this one's state into it: load_state_dict(la.state_dict())."
        )


def check_unchanged(la: Any) -> None:
    """Refuse to predict from curvature of other weights.

    Raises:
        ValueError: If the model's weights, or their type, have changed since the fit; names some of them.
    """
    check_type(la)
    names = changed(la)
    if names:
        raise ValueError(
            f"The model's weights have changed since the fit ({_some(names)}), and the posterior is that of the earlier ones. "
            "Call fit again, or load the earlier weights."
        )


def warn_of_addition(la: Any) -> None:
    """Say where a further fit adds curvature at other weights, as continual learning means to; refuse one of another type."""
    check_type(la)
    names = changed(la)
    if names:
        warnings.warn(
            f"fit(override=False) adds curvature at other weights: {_some(names)} changed since the earlier fit over "
            f"{la.n_data} examples. Use fit(override=True) unless that is meant, as in continual learning.",
            stacklevel=3,
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
