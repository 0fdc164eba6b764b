"""From settings back to the command line that gives them."""

from __future__ import annotations

import json
import shlex
from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.config.training import Training

OF_RECALIBRATIONS = (
    *("windows", "decay", "keep-partials", "shared-examples", "margin-nll", "margin-ece", "level", "draws", "gate"),
    *("keep-versions", "alert-cmd"),
)  # which do nothing in other jobs
_LEFT_OUT = (
    *("fresh", "storage_options", "data_storage_options", "weights_storage_options"),
    *(name.replace("-", "_") for name in OF_RECALIBRATIONS),  # which those jobs refuse
)

_ALWAYS = ("model", "checkpoint", "hessian_structure")  # a job has defaults of its own for these


def command_of(config: Config, job: str, training: Training | None = None) -> str:
    """Return the exact command that does a job with these settings, without secrets: storage options have to be given again.

    Args:
        config: The settings.
        job: Path of the script of a fit or a training, such as `jobs/fit_kron.py`.
        training: The further settings of a training by empirical Bayes.
    """
    words = ["python", job]
    for settings in (config, training) if training is not None else (config,):
        for name, field in type(settings).model_fields.items():
            value = getattr(settings, name)
            said = name in _ALWAYS or field.is_required() or value != field.get_default()
            if said and name not in _LEFT_OUT:
                words += _flag(name.replace("_", "-"), value)
    return " ".join(shlex.quote(word) for word in words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if value is None:
        return []
    return [f"--{name}", json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)]
