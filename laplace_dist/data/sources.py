"""From an import path or URL to a split of the data as a map-style data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec
import numpy as np
import torch
import zarr
from torch import Tensor
from torch.utils.data import IterableDataset

from laplace_dist.config.compatibility import ood
from laplace_dist.config.settings import Config
from laplace_dist.data.import_path import IMPORT_PATH, call
from laplace_dist.errors import SettingsError, listed


def read_file(url: str, storage_options: Mapping[str, Any], field: str) -> bytes:
    """Return the bytes of the file at a path or URL.

    Args:
        url: Path or URL.
        storage_options: For a URL; never shown.
        field: Name of the setting, for messages.

    Raises:
        SettingsError: It cannot be read.
    """
    options = storage_options if "://" in url else {}
    try:
        with fsspec.open(url, "rb", **options) as file:
            return file.read()
    except (OSError, ValueError, ImportError) as error:
        reason = type(error).__name__ if options else f"{type(error).__name__}: {error}"
        raise SettingsError(f"{field}: cannot read {url!r} ({reason})") from None


class ZarrSplit:
    """One split of a Zarr group as a map-style data set: arrays `x` and `y`, read as they are asked for.

    Args:
        url: Path or URL of the group that holds the splits.
        split: Name of the subgroup.
        storage_options: For the URL; never shown.
    """

    def __init__(self, url: str, split: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self._arguments = url, split, dict(storage_options or {})
        options = self._arguments[2] if "://" in url and not url.startswith("file:") else None
        try:
            group = zarr.open_group(url, mode="r", storage_options=options or None)
        except (OSError, ValueError, ImportError, TypeError) as error:
            raise SettingsError(
                f"--data: got {url!r}; expected an import path of the form module:callable, or the path or URL of a "
                f"Zarr group ({type(error).__name__} when it was opened)"
            ) from None
        if split not in group:
            raise SettingsError(f"--data: {url!r} has no split {split!r}; it has {listed(sorted(group.keys()))}")
        arrays = [group.get(f"{split}/{name}") for name in "xy"]
        if not all(isinstance(array, zarr.Array) and array.ndim for array in arrays):
            raise SettingsError(f"--data: split {split!r} of {url!r} needs the arrays 'x' and 'y'")
        self.x, self.y = arrays
        if self.x.shape[0] != self.y.shape[0]:
            counts = f"{self.x.shape[0]} x but {self.y.shape[0]} y"
            raise SettingsError(f"--data: split {split!r} of {url!r} has {counts}")

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor]:
        if not isinstance(index, slice) and not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        x, y = (torch.from_numpy(np.array(array[index])) for array in (self.x, self.y))
        return x, y if y.is_floating_point() else y.long()

    def __reduce__(self) -> tuple[Any, ...]:
        return ZarrSplit, self._arguments


def load_split(config: Config, split: str) -> Any:
    """Return one split as a map-style data set with at least one example.

    Args:
        config: `data` is an import path, called with `split=` and `data_args`, or the path or URL of a Zarr group.
        split: `train`, `val`, `test` or one of `config.ood`.

    Raises:
        SettingsError: It cannot be found or called, is not map-style, or is empty.
    """
    if IMPORT_PATH.fullmatch(config.data):
        dataset = call(config.data, "--data", {"split": split, **config.data_args})
    elif config.data_args:
        raise SettingsError(f"--data-args: {listed(list(config.data_args))} given, but {config.data!r} is no callable")
    else:
        dataset = ZarrSplit(config.data, split, config.storage_options)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset | Mapping | str) or not sized:
        raise SettingsError(
            f"--data: {config.data!r} returned a {type(dataset).__name__} for split {split!r}; expected a map-style "
            "data set, with __len__ and __getitem__"
        )
    if len(dataset) == 0:
        raise SettingsError(f"--data: {config.data!r} returned an empty data set for split {split!r}")
    return dataset


def check_splits(config: Config) -> None:
    """Refuse data that lacks a split which tuning or evaluation will ask for.

    Raises:
        SettingsError: Naming the split.
    """
    tuning = ["val"] if not config.skip_tune and config.tuning == "gridsearch" else []
    for name in tuning + ([] if config.skip_evaluate else ["test", *ood(config)]):
        try:
            load_split(config, name)
        except (ValueError, KeyError) as error:
            if isinstance(error, SettingsError):
                raise
            remedy = "--tune-method marglik or --skip-tune" if name == "val" else "--skip-evaluate"
            raise SettingsError(
                f"--data: {config.data!r} gives no split {name!r} ({type(error).__name__}: {error}); provide it, or "
                f"use {remedy}"
            ) from error
