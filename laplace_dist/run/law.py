"""What the likelihood makes of the probe's examples, kept to recognise its code as the probe recognises the model's.

A likelihood of one's own is told from others by its name and settings, and an edited formula keeps both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace.likelihoods import BaseLikelihood
from laplace_dist.errors import SettingsError

MOST = 64  # outputs, above which the directions of an exact curvature are too many to look at
TOLERANCE = 1e-3  # relative, for other libraries; an edited formula makes of order 1
_WORDS = {"loss": "loss", "squares": "curvature in the outputs"}


def law_of(likelihood: BaseLikelihood, f: Tensor, y: Tensor, estimator: str) -> dict[str, Tensor]:
    """Return the targets, and what sums are made of: their loss, and the squares of the estimator's directions.

    Args:
        likelihood: That of the training data.
        f: Outputs of some examples.
        y: Their targets.
        estimator: `ggn`, `mc` or `ef`.
    """
    f = f.double()
    if estimator == "ef":
        directions = [likelihood.gradient(f, y)]
    elif estimator == "mc":
        directions = list(likelihood.sampled_gradients(f, y, 1, 0, 0))
    else:
        directions = list(likelihood.root_columns(f, y)) if f.shape[-1] <= MOST else []
    found = {"loss": likelihood.loss(f, y).reshape(1)}
    if directions:
        found["squares"] = torch.stack([column.double().square() for column in directions]).sum(0)
    return {"targets": y, **{name: value.detach().nan_to_num() for name, value in found.items()}}


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
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise SettingsError(_refusal(name, who, f"it fails on the run's examples ({error})")) from error
    for part, words in _WORDS.items():
        if part in law:
            scale = max(float(law[part].norm()), torch.finfo(torch.float32).tiny)
            error = float((found[part] - law[part]).norm()) / scale
            if not error <= TOLERANCE:
                raise SettingsError(
                    _refusal(name, who, f"the {words} of the same outputs differs by {error:.1e} of its size")
                )


def _refusal(name: str, who: str, what: str) -> str:
    return (
        f"--likelihood: {who} is the run's, but what {name!r} makes there is not: {what}. Its code, or a library that it uses, "
        "was changed since the run began, or is of another version on that node. Restore it, or begin another run."
    )
