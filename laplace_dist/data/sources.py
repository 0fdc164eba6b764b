"""From an import path or URL to a split of the data as a map-style data set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
from torch.utils.data import IterableDataset

from laplace_dist.config.compatibility import evaluated, is_url
from laplace_dist.config.import_path import IMPORT_PATH, call
from laplace_dist.config.settings import Config
from laplace_dist.data.arrow_ipc import ArrowFiles
from laplace_dist.data.choice import ARGUMENTS
from laplace_dist.data.example_weights import refuse_forgotten, refuse_weighted
from laplace_dist.data.file_errors import FileError
from laplace_dist.data.files import Place
from laplace_dist.data.hugging_face import SavedDataset, is_saved
from laplace_dist.data.parquet import ParquetFiles
from laplace_dist.data.tar_shards import TarShards
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import CallFailed, ExampleError, SettingsError, StorageError, listed
from laplace_dist.outages import may_pass

_FILES = {"parquet": ParquetFiles, "arrow": ArrowFiles, "tar": TarShards}


def read_file(url: str, storage_options: Mapping[str, Any], field: str, hint: str = "") -> bytes:
    """Return the bytes of the file at a path or URL.

    Args:
        url: Path or URL.
        storage_options: For a URL; never shown.
        field: Name of the setting, for messages.
        hint: A sentence for the message.

    Raises:
        SettingsError: It cannot be read.
        StorageError: The file system failed; another attempt may succeed.
    """
    options = storage_options if is_url(url) else {}
    try:
        with fsspec.open(url, "rb", **options) as file:
            return file.read()
    except Exception as error:  # every file system has errors of its own
        reason = type(error).__name__ if options else f"{type(error).__name__}: {error}"
        refused = StorageError if may_pass(error) else SettingsError
        raise refused(f"{field}: cannot read {url!r} ({reason}). {hint}".rstrip()) from None


def weights_options(config: Config) -> Mapping[str, Any]:
    """Return the options that `--weights` is opened with: the checkpoint's own only for what lies under it.

    The settings that a run keeps name its own copy of the weights, which is under the checkpoint.
    """
    under = f"{config.checkpoint.rstrip('/')}/"
    place = config.weights or ""
    own = place.startswith(under) and re.fullmatch(r"(?!.*\.\.)[\w./-]+", place.removeprefix(under))
    return config.weights_storage_options or (config.storage_options if own else {})


def hint(config: Config, name: str) -> str:
    """Return what to say where `--data` or `--weights` cannot be opened: whose options `--storage-options` are.

    Args:
        config: The settings.
        name: `data` or `weights`.
    """
    if not config.storage_options or getattr(config, f"{name}_storage_options") or not is_url(getattr(config, name)):
        return ""
    return f"--storage-options go to --checkpoint alone: give --{name}-storage-options for this URL."


def load_split(config: Config, split: str) -> Any:
    """Return one split as a map-style data set with at least one example.

    Args:
        config: `data` is an import path, called with `split=` and `data_args`, or the path or URL of a Zarr group.
        split: `train`, `val`, `test` or one of `config.ood`.

    Raises:
        SettingsError: It cannot be found or called, is not map-style, or is empty; or it is not for training and has weights.
    """
    if IMPORT_PATH.fullmatch(config.data):
        dataset = call(config.data, "--data", {"split": split, **config.data_args})
    else:
        dataset = _at_url(config, split)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset | Mapping | str) or not sized:
        raise SettingsError(
            f"--data: {config.data!r} returned a {type(dataset).__name__} for split {split!r}; expected a map-style "
            "data set, with __len__ and __getitem__"
        )
    try:
        length = len(dataset)
    except Exception as error:  # the user's own code, as where an example is read
        raise SettingsError(
            f"--data: the length of what {config.data!r} returned for split {split!r} cannot be told "
            f"({type(error).__name__}: {error}); __len__ gives the number of examples"
        ) from error
    if length == 0:
        raise SettingsError(f"--data: {config.data!r} returned an empty data set for split {split!r}")
    if config.example_weights is not None and split != "train":
        with _weights_that_cannot_be_read():
            refuse_weighted(dataset, config.example_weights, split)
    return dataset


def refuse_forgotten_weights(config: Config, given: Mapping[str, str]) -> None:
    """Refuse a new window without weights whose data have the weights that other windows of the run count by.

    Args:
        config: The settings, with the window's data.
        given: Windows that count by weights, by what they call these.

    Raises:
        SettingsError: Naming the window, and an example.
    """
    if config.example_weights is not None:
        return
    for name, window in given.items():
        dataset = load_split(config.model_copy(update={"example_weights": name}), "train")
        with _weights_that_cannot_be_read():
            refuse_forgotten(dataset, name, window)


@contextmanager
def _weights_that_cannot_be_read() -> Iterator[None]:
    try:
        yield
    except ExampleError as error:
        raise (StorageError if may_pass(error.__cause__) else SettingsError)(str(error)) from error


def _at_url(config: Config, split: str) -> Any:
    """Return a split of what lies at a path or URL: a saved data set, files, or a Zarr group.

    Raises:
        SettingsError: It cannot be found, is damaged, or does not have what the settings ask for.
        StorageError: The file system failed; another attempt may succeed.
    """
    try:
        return _open(config, split)
    except FileError as error:
        raise (StorageError if error.passing else SettingsError)(f"--data: {error}") from None


def _open(config: Config, split: str) -> Any:
    place = Place(config.data, config.data_storage_options)
    if place.is_file:
        raise SettingsError(
            f"--data: {config.data!r} is one file; give the folder that it lies in, where split {split!r} is {split}.parquet "
            f"or the folder {split}"
        )
    if split not in place.splits and place.top.get("data") == "directory":  # as data sets on Hugging Face's hub have it
        place = Place(f"{config.data.rstrip('/')}/data", config.data_storage_options)
    if is_saved(place, split):
        return SavedDataset(place, config, split)
    if place.holds_files:
        kind, files = place.files(split)
        return _FILES[kind](place, files, config, split)
    if config.data_args:
        raise SettingsError(
            f"--data-args: {listed(list(config.data_args))} given, but {config.data!r} is no callable; "
            f"{listed(list(ARGUMENTS))} are for the path or URL of files"
        )
    return ZarrSplit(config.data, split, config.data_storage_options, hint(config, "data"))


def check_splits(config: Config) -> dict[str, Any]:
    """Return the splits which tuning and evaluation will ask for, and refuse data that lacks one.

    Raises:
        SettingsError: Naming the split.
    """
    tuning = ["val"] if not config.skip_tune and config.tuning == "gridsearch" else []
    found = {}
    for name in tuning + ([] if config.skip_evaluate else evaluated(config)):
        try:
            found[name] = load_split(config, name)
        except (ValueError, KeyError) as raised:
            error = raised.__cause__ if isinstance(raised, CallFailed) else raised
            if isinstance(error, SettingsError) or not isinstance(error, ValueError | KeyError):
                raise
            remedy = "--tune-method marglik or --skip-tune" if name == "val" else "--skip-evaluate"
            raise SettingsError(
                f"--data: {config.data!r} gives no split {name!r} ({type(error).__name__}: {error}); provide it, or "
                f"use {remedy}"
            ) from error
    return found
