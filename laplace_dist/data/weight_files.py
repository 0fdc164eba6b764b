"""Where weights lie: in one file, or in safetensors shards that an index names, which are read one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from laplace_dist.config.compatibility import is_url
from laplace_dist.data.sources import read_file
from laplace_dist.errors import SettingsError, listed

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")


@dataclass(frozen=True)
class Shards:
    """A folder of safetensors.

    Attributes:
        folder: Path or URL.
        names: The tensors of each file by the file's name; None where no index says them, of one file alone.
        options: Of the file system.
        field: Name of the setting, for messages.
    """

    folder: str
    names: dict[str, list[str] | None]
    options: Mapping[str, Any]
    field: str

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield every file's path and tensors, one file in memory at a time.

        Raises:
            SettingsError: A file cannot be read, is damaged, or holds other tensors than the index says.
        """
        for name, wanted in self.names.items():
            place = f"{self.folder}/{name}"
            try:
                if is_url(place):
                    found = safetensors.torch.load(read_file(place, self.options, self.field))
                else:  # mapped, not read whole
                    found = safetensors.torch.load_file(place.removeprefix("file://"))
            except (SafetensorError, OSError, ValueError) as error:
                raise SettingsError(
                    f"{self.field}: {place!r} is no whole file of safetensors ({type(error).__name__}: {error}); restore it"
                ) from None
            if wanted is not None and set(wanted) != found.keys():
                odd = sorted(set(wanted) ^ found.keys())
                raise SettingsError(
                    f"{self.field}: {place!r} does not hold the tensors that its index says ({listed(odd)}); restore the folder"
                )
            yield place, found
            del found


def shards_of(place: str, options: Mapping[str, Any], field: str) -> Shards | None:
    """Return the shards that a folder, or the index in it, names; None where the place is one file.

    Args:
        place: Path or URL of a folder of `save_pretrained`, of its `model.safetensors.index.json`, or of a file.
        options: For a URL; never shown.
        field: Name of the setting, for messages.

    Raises:
        SettingsError: The folder holds no safetensors, or more than one set of them; the index is damaged, or names a file
            that is not there.
    """
    folder, _, last = place.rstrip("/").rpartition("/")
    if last.endswith(INDEX):
        there = _listing(folder or ".", options, field)
        return _of_index(folder or ".", last, there or [], options, field)
    there = None if re.search(r"\.[a-z]+$", last) and last != "." else _listing(place, options, field)
    if there is None:
        return None
    folder, indices = place.rstrip("/"), [name for name in there if name.endswith(INDEX)]
    files = [name for name in there if name.endswith(".safetensors")]
    if len(indices) == 1 or f"model{INDEX}" in indices:
        index = f"model{INDEX}" if f"model{INDEX}" in indices else indices[0]
        return _of_index(folder, index, there, options, field)
    if len(files) == 1 or "model.safetensors" in files:
        return Shards(folder, {"model.safetensors" if len(files) > 1 else files[0]: None}, options, field)
    raise SettingsError(f"{field}: {_without(place, there, files)}")


def _without(place: str, there: list[str], files: list[str]) -> str:
    """Say why a folder has no weights to load."""
    if files:
        return f"{place!r} holds {listed(files)} and no *{INDEX} that says what is where; name one file, or restore the index"
    if pickles := [name for name in there if name.endswith(_PICKLES)]:
        return (
            f"{place!r} holds its weights as pickles ({listed(pickles)}), which can run code, and no .safetensors; save them "
            "again with save_pretrained(…, safe_serialization=True) where you trust them"
        )
    return f"{place!r} holds no .safetensors; it holds {listed(there)}"


def _of_index(folder: str, index: str, there: list[str], options: Mapping[str, Any], field: str) -> Shards:
    where = f"{folder}/{index}"
    if index not in there:
        raise SettingsError(f"{field}: there is no {where!r}; the folder holds {listed(there)}")
    try:
        files = json.loads(read_file(where, options, field))["weight_map"]
        named = {name: file for name, file in files.items() if isinstance(file, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SettingsError(f"{field}: {where!r} is no index of safetensors, with a weight_map; restore it") from None
    names: dict[str, list[str] | None] = {}
    for name, file in sorted(named.items(), key=lambda item: (item[1], item[0])):
        names.setdefault(file, []).append(name)  # type: ignore[union-attr]
    if len(named) < len(files) or not named or not all(map(_SHARD.fullmatch, names)):
        odd = [file for file in names if not _SHARD.fullmatch(file)] or ["nothing"]
        raise SettingsError(f"{field}: {where!r} names {listed(odd)}; expected .safetensors files beside it")
    if missing := [file for file in names if file not in there]:
        raise SettingsError(
            f"{field}: {where!r} names {listed(missing)}, which is missing; restore it beside the index"
        )
    return Shards(folder, names, options, field)


def _listing(place: str, options: Mapping[str, Any], field: str) -> list[str] | None:
    """Return the names in a folder; None where the place is none."""
    try:
        fs, path = fsspec.core.url_to_fs(place, **(options if is_url(place) else {}))
        if not fs.isdir(path):
            return None
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False))
    except Exception as error:  # every file system has errors of its own
        reason = type(error).__name__ if options else f"{type(error).__name__}: {error}"
        raise SettingsError(f"{field}: cannot list {place!r} ({reason})") from None
