"""What the likelihood makes of the probe's examples, kept to recognise its code as the probe recognises the model's.

A likelihood of one's own is told from others by its name and settings, and an edited formula keeps both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from laplace.likelihoods import BaseLikelihood
from laplace.noise import fixed_directions
from laplace_dist.errors import SettingsError

MOST = 64  # outputs, above which the directions of an exact curvature are too many to look at
LARGEST = 1 << 22  # outputs of the examples that are looked at, if more than one example has them
TOLERANCE = 1e-3  # relative, for other libraries; an edited formula makes of order 1
# Of a formula that is given other tensors than it expects.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
_WORDS = {"loss": "loss", "lengths": "curvature in the outputs"}


def law_of(likelihood: BaseLikelihood, f: Tensor, y: Tensor, estimator: str) -> dict[str, Tensor]:
    """Return the targets, and what sums are made of: the loss, and the estimator's curvature along one fixed direction.

    Args:
        likelihood: That of the training data.
        f: Outputs of some examples; of large ones the first will do.
        y: Their targets.
        estimator: `ggn`, `mc` or `ef`.
    """
    count = max(1, min(len(f), LARGEST // max(f[0].numel(), 1)))
    f, y = f[:count].double(), y[:count]
    found = {"loss": likelihood.loss(f, y).reshape(1)}
    if estimator != "ggn" or f.shape[-1] <= MOST:
        along = fixed_directions(f)
        squares = [
            (v * along).sum(-1).square().reshape(count, -1).sum(1) for v in _directions(likelihood, f, y, estimator)
        ]
        found["lengths"] = sum(squares, f.new_zeros(count)).sqrt()
    return {"targets": y, **{name: value.detach().nan_to_num() for name, value in found.items()}}


def _directions(likelihood: BaseLikelihood, f: Tensor, y: Tensor, estimator: str) -> Iterable[Tensor]:
    if estimator == "ef":
        return [likelihood.gradient(f, y)]
    if estimator == "mc":
        return likelihood.sampled_gradients(f, y, 1, 0, 0)
    return likelihood.root_columns(f, y)


def difference(law: Mapping[str, Tensor], found: Mapping[str, Tensor], f: Tensor) -> str | None:
    """Return what of two laws differs by more than rounding, and by how much, in a person's words; None if nothing does.

    Args:
        law: As it should be.
        found: As it is.
        f: The outputs, whose rounding is all that there is of the loss of confident predictions.
    """
    least = torch.finfo(torch.float32).eps * (1 + float(f.abs().max())) / TOLERANCE
    for part, words in _WORDS.items():
        if part in law:
            error = float((found[part] - law[part]).norm()) / max(float(law[part].norm()), least)
            if not error <= TOLERANCE:
                return f"the {words} of the same outputs differs by {error:.1e} of its size"
    return None


def check_law(
    law: Mapping[str, Tensor], f: Tensor, likelihood: BaseLikelihood, name: str, estimator: str, who: str
) -> None:
    """Refuse a likelihood that makes something else of the same outputs and targets.

    Args:
        law: As the run has it.
        f: The outputs.
        likelihood: That of the training data.
        name: Its name or import path.
        estimator: As of `law_of`.
        who: Whose model has been found to be the run's, in a person's words.

    Raises:
        SettingsError: It is another one.
    """
    try:
        found = law_of(likelihood, f, law["targets"], estimator)
    except FAILURES as error:
        raise SettingsError(_refusal(name, who, f"it fails on the run's examples ({error})")) from error
    if what := difference(law, found, f):
        raise SettingsError(_refusal(name, who, what))


def _refusal(name: str, who: str, what: str) -> str:
    return (
        f"--likelihood: {who} is the run's, but what {name!r} makes there is not: {what}. Its code, or a library that it uses, "
        "was changed since the run began, or is of another version on that node. Restore it, or begin another run."
    )
