"""The public classes and functions of the core library, from the lists of names that its public modules keep."""

from __future__ import annotations

import enum
import importlib
import inspect

MODULES = (
    "laplace", "laplace.utils", "laplace.utils.metrics", "laplace.utils.subnetmask", "laplace.curvature", "laplace.likelihoods",
    "laplace.transforms", "laplace.transforms.dense_ef", "laplace.transforms.dense_ggn", "laplace.transforms.dense_hessian",
    "laplace.transforms.diag_fisher", "laplace.transforms.diag_ggn",
)  # fmt: skip


def _found():
    """Every public value with the name under which it is found first."""
    values = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for key in module.__all__:
            value = getattr(module, key)
            if getattr(value, "__module__", "").startswith("laplace.") and value not in values.values():
                short = name.removeprefix("laplace").removeprefix(".")
                values[f"{short}.{key}" if short.startswith("transforms") else key] = value
    return values


_VALUES = _found()
CLASSES = {
    name: value for name, value in _VALUES.items() if inspect.isclass(value) and not issubclass(value, (enum.Enum, Exception))
}  # fmt: skip
FUNCTIONS = {name: value for name, value in _VALUES.items() if inspect.isfunction(value)}
