"""From settings back to the command line that gives them, and which of them do nothing in which jobs."""

from __future__ import annotations

import json
import shlex
from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.config.training import Training

OF_RECALIBRATIONS = [
    "windows",
    "decay",
    "keep-partials",
    "shared-examples",
    "margin-nll",
    "margin-ece",
    "gate",
    "keep-versions",
    "alert-cmd",
]  # which do nothing in other jobs
OF_SUMS = ["module-groups"]  # which do nothing in jobs that add nothing up
OF_MAPS = [*OF_SUMS, "segment-size", "window"]  # which do nothing where no window is added
OF_FITS = ["skip-evaluate", *OF_SUMS]  # which do nothing in a recalibration, or follow what the run has
_LEFT_OUT = ("fresh", "storage_options", "data_storage_options", "weights_storage_options")
RECALIBRATE = "jobs/recalibrate.py"
_ALWAYS = ("model", "checkpoint", "hessian_structure")  # a job has defaults of its own for these


def command_of(config: Config, job: str, training: Training | None = None) -> str:
    """Return the exact command that does a job with these settings, without secrets: storage options have to be given again.

    Settings that do nothing in the job are left out, since it refuses them as flags; a file may hold them.

    Args:
        config: The settings.
        job: Path of its script, such as `jobs/fit_kron.py`.
        training: The further settings of a training by empirical Bayes.
    """
    idle = OF_FITS if job == RECALIBRATE else OF_RECALIBRATIONS
    left_out = {*_LEFT_OUT, *(name.replace("-", "_") for name in idle)}
    words = ["python", job]
    for settings in (config, training) if training is not None else (config,):
        for name, field in type(settings).model_fields.items():
            value = getattr(settings, name)
            said = name in _ALWAYS or field.is_required() or value != field.get_default()
            if said and name not in left_out:
                words += _flag(name.replace("_", "-"), value)
    return " ".join(shlex.quote(word) for word in words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if name == "gate":  # which is given once for each
        return [word for one in value for word in (f"--{name}", one)]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if value is None:
        return []
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
