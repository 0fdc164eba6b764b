"""Folders of Hugging Face's `Dataset.save_to_disk`, read through the package `datasets`, which is an extra."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from laplace_dist.config.secrets import scrub
from laplace_dist.config.settings import Config
from laplace_dist.data.choice import choose
from laplace_dist.data.columns import obstacles, values_of
from laplace_dist.data.file_errors import FileError
from laplace_dist.data.files import Place
from laplace_dist.data.rows import Rows, Values
from laplace_dist.errors import SettingsError, StorageError, listed
from laplace_dist.outages import may_pass

_STATE = "state.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_ROWS = 256  # examples that are taken at once out of the memory map


def is_saved(place: Place, split: str) -> bool:
    """Say whether the folder is one of `save_to_disk`, of one data set or of several splits."""
    if {_STATE, "dataset_dict.json"} & place.top.keys():
        return True
    return place.top.get(split) == "directory" and _STATE in place.names(split)


class SavedDataset(Rows):
    """The rows of one split of a saved data set; columns that its format leaves out are left out here.

    Args:
        place: The folder.
        config: The settings.
        split: Name of the split.

    Raises:
        SettingsError: The package is missing, or there is no such split.
    """

    def __init__(self, place: Place, config: Config, split: str) -> None:
        self._where = f"split {split!r} of {place.url!r}"
        if _STATE in place.top:
            raise SettingsError(
                f"--data: {place.url!r} is one data set without splits; save a datasets.DatasetDict of train, val and test, or "
                "give the folder above it if that has one folder per split"
            )
        if place.top.get(split) != "directory":
            there = sorted(name for name, kind in place.top.items() if kind == "directory")
            raise SettingsError(f"--data: {place.url!r} has no split {split!r}; it has {listed(there)}")
        rows = self._rows = _load_from_disk(place, split)
        schema = rows.data.schema
        given = rows.format["columns"]
        there = {name: kind for name, kind in obstacles(schema).items() if name in given}
        choice = choose(config, there, self._where)
        self._files = [entry["filename"] for entry in rows.cache_files]
        self._versions = self._now()
        for name in self._files:
            _check_end(name)
        known = [(os.path.basename(name), size) for name, (size, _) in zip(self._files, self._versions, strict=True)]
        counts = [min(_ROWS, len(rows) - first) for first in range(0, len(rows), _ROWS)]
        super().__init__(counts, choice, hashlib.sha256(repr((str(schema), known)).encode()).hexdigest())
        self._rows = rows.with_format("arrow")

    def _load(self, chunk: int, names: Sequence[str]) -> Mapping[str, Values]:
        if self._now() != self._versions:
            raise OSError(
                f"{self._where} has changed since it was opened; leave the data as they are while a job is at work, "
                "and start it again"
            )
        start = self.start_of(chunk)
        table = self._rows.with_format("arrow", columns=list(names))[start : int(self._stops[chunk])]
        assert isinstance(table, pa.Table)
        return values_of(table, names, lambda row: self.where(start + row))

    def where(self, index: int) -> str:
        """Return in a person's words where an example lies."""
        return f"row {index} of {self._where}"

    def _now(self) -> list[tuple[int, int]]:
        found = []
        for name in self._files:
            info = os.stat(name)
            found.append((info.st_size, info.st_mtime_ns))
        return found


def _check_end(name: str) -> None:
    """Refuse a file that is cut off: Arrow would take what is left for all there is."""
    with open(name, "rb") as file:
        file.seek(-min(len(_END), os.path.getsize(name)), os.SEEK_END)
        if file.read() != _END:
            raise SettingsError(f"--data: {name} is truncated; restore it")


def _load_from_disk(place: Place, split: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise SettingsError(
            f"--data: {place.url!r} was written by Hugging Face's datasets, which is not installed here ({error}); "
            "pip install datasets, or the extra laplace-dist[hf]"
        ) from None
    try:
        _check_whole(place, split)
        return datasets.load_from_disk(f"{place.url.rstrip('/')}/{split}", storage_options=place.options or None)
    except (SettingsError, FileError):
        raise
    except Exception as error:  # of the package, of Arrow, of the file system
        text = scrub((str(error).strip().splitlines() or [""])[0][:200], place.options)
        said = f"--data: {place.url}/{split} cannot be loaded ({type(error).__name__}: {text})"
        # The package asks whether files exist, which answers no where the file system fails; they were there a moment ago.
        if may_pass(error) or isinstance(error, (FileNotFoundError, IsADirectoryError)):
            raise StorageError(said) from None
        raise SettingsError(f"{said}; restore it") from None


def _check_whole(place: Place, split: str) -> None:
    """Refuse a folder that names no files, which the package cannot load, or one that lacks some of them."""
    files = [file["filename"] for file in json.loads(place.content(f"{split}/{_STATE}") or b"")["_data_files"]]
    if not files:
        raise SettingsError(f"--data: {place.url!r} has an empty data set for split {split!r}")
    if missing := sorted({*files, "dataset_info.json"} - {*place.names(split)}):
        raise SettingsError(f"--data: {place.url}/{split} lacks {listed(missing)}; restore it")
