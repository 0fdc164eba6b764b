"""Distributed, resumable batch jobs that fit Laplace approximations."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Inline",
    "Training",
    "__version__",
    "check_model",
    "estimate",
    "fit",
    "load_posterior",
    "load_trained",
    "marglik_train",
    "recalibrate",
    "rollback",
    "status",
    "verify",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # who uses the library decides what is shown

_LAZY = {
    "Config": "config.settings",
    "Inline": "execution.inline",
    "Training": "config.training",
    "check_model": "stages.model_check",
    "estimate": "planning",
    "fit": "job",
    "load_posterior": "run.posterior",
    "load_trained": "run.trained",
    "marglik_train": "marglik",
    "recalibrate": "recalibration",
    "rollback": "recalibration",
    "status": "run.lifecycle",
    "verify": "report.verification",
}


def __getattr__(name: str) -> Any:
    """Import the module behind a public name on first use, so that `import laplace_dist` stays cheap."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
