"""Windows of days for the tests of recalibrations: their data, the settings of their runs, and what came of them."""

from __future__ import annotations

import dist_cases
import numpy as np
import torch
from torch.utils.data import TensorDataset

import laplace_dist
from laplace_dist.job import fit
from laplace_dist.recalibration import recalibrate
from laplace_dist.run import pointer, versions
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan

SIZES = {"monday": 44, "tuesday": 20, "wednesday": 27, "thursday": 21, "friday": 22}


def days(split: str, day: str, kind: str = "float32") -> TensorDataset:
    """Return one day's data; what is fresh is the same every day, and enough. `a+b` is two days."""
    if split != "train":
        parts = [dist_cases.tensors(name) for name in (split, "train", "val", "test")]
        return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    parts = []
    for name in day.split("+"):
        if name == "none":
            return TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64))
        generator = torch.Generator().manual_seed(100 + list(SIZES).index(name))
        x = torch.randn(SIZES[name], 1, 6, 6, generator=generator, dtype=torch.float64)
        parts.append((x.to(getattr(torch, kind)), (x.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2)))
    return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def config(checkpoint, day="monday", **changes):
    given = {
        "data": "window_cases:days",
        "data_args": {"day": day},
        "margin_nll": 10.0,
        "margin_ece": 1.0,
        "grid_size": 5,
        "prior_range": [1e-4, 1e4],
    }
    return dist_cases.config(checkpoint, **{**given, "skip_tune": False, "skip_evaluate": False, **changes})


def fit_inline(chosen):
    return fit(chosen, executor=laplace_dist.Inline)


def add(checkpoint, day, **changes):
    extra = {name: changes.pop(name) for name in ("dry_run", "drop_window") if name in changes}
    chosen = config(checkpoint, day, **{"window": day, **changes})
    return recalibrate(chosen, laplace_dist.Inline, **extra)


def two_windows(place):
    """Make a run with two windows, which tests copy."""
    fit_inline(config(place, window="monday"))
    add(place, "tuesday")
    return place


def factors(place, version=None):
    store = Checkpoint(str(place))
    version = version or pointer.read_current(store)["version"]
    manifest = versions.read_version(store, read_plan(store), version)
    found = {n: store.read_array(p["prefix"], n, p["entry"]) for n, p in manifest["factors"].items()}
    return {**found, "loss": manifest["loss"], "n": manifest["n_data"]}


def names_of(place, version):
    store = Checkpoint(str(place))
    return versions.windows_in(store, read_plan(store), version)


def same(one, other):
    return all(np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes() for name in one)


def damaged(store, key):
    content = bytearray(store.read(key))
    content[len(content) // 2] ^= 1
    store.replace(key, bytes(content))
