"""Paths that mean the same in every process: absolute, since workers may have another directory."""

from __future__ import annotations

import os

from laplace_dist.config.import_path import IMPORT_PATH
from laplace_dist.config.settings import HF, Config


def absolute(config: Config) -> Config:
    """Return the settings with relative paths, and those that begin with `~`, made absolute."""
    data = None if IMPORT_PATH.fullmatch(config.data) else config.data
    paths = {"checkpoint": config.checkpoint, "weights": config.weights, "data": data}
    found = {name: _absolute_path(path) for name, path in paths.items() if path and "://" not in path}
    if config.model.startswith(HF):
        found["model"] = HF + _absolute_path(config.model.removeprefix(HF))
    return config.model_copy(update=found)


def _absolute_path(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
