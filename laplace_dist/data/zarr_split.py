"""A split of a Zarr group as a map-style data set that decodes each chunk once, however small the batches are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from laplace_dist.config.compatibility import is_url
from laplace_dist.config.secrets import scrub
from laplace_dist.errors import SettingsError, StorageError, listed
from laplace_dist.outages import may_pass


class _Rows:
    """Rows of one array, read in whole chunks; the chunk in which the last reading ended is kept.

    Args:
        array: Of one dimension or more.
    """

    def __init__(self, array: zarr.Array) -> None:
        self.array, self.step = array, array.chunks[0]
        self._first, self._kept = 0, np.empty((0, *array.shape[1:]), array.dtype)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Return a contiguous range of rows as an array of its own."""
        start, stop = rows.start, rows.stop
        known = self._kept[max(start - self._first, 0) : max(stop - self._first, 0)] if start >= self._first else None
        if known is None or not len(known):
            return self._read(start, stop).copy()
        if len(known) == stop - start:
            return known.copy()
        return np.concatenate([known, self._read(start + len(known), stop)])

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Read the chunks of these rows, keep the last one, and return the rows."""
        first = start - start % self.step
        content = np.asarray(self.array[first : min(-(-stop // self.step) * self.step, self.array.shape[0])])
        last = (stop - 1) // self.step * self.step
        self._first, self._kept = last, content if last == first else content[last - first :].copy()
        return content[start - first : stop - first]


class ZarrSplit:
    """One split of a Zarr group as a map-style data set: arrays `x` and `y`, read as they are asked for.

    Args:
        url: Path or URL of the group that holds the splits.
        split: Name of the subgroup.
        storage_options: For the URL; never shown.
        hint: A sentence about the options that were given elsewhere, for the message if the group cannot be opened.

    Attributes:
        group: What `data.groups` asks for, from the array `group` if the split has one, else None.
    """

    def __init__(self, url: str, split: str, storage_options: Mapping[str, Any] | None = None, hint: str = "") -> None:
        self._arguments = url, split, dict(storage_options or {}), hint
        options = self._arguments[2] if is_url(url) else None
        with _opening(url, self._arguments[2], hint):
            self._open(zarr.open_group(url, mode="r", storage_options=options or None), url, split)

    def _open(self, group: zarr.Group, url: str, split: str) -> None:
        if split not in group:
            raise SettingsError(f"--data: {url!r} has no split {split!r}; it has {listed(sorted(group.keys()))}")
        arrays = [group.get(f"{split}/{name}") for name in "xy"]
        if not all(isinstance(array, zarr.Array) and array.ndim for array in arrays):
            raise SettingsError(f"--data: split {split!r} of {url!r} needs the arrays 'x' and 'y'")
        self._x, self._y = (_Rows(array) for array in arrays)
        lengths = [array.shape[0] for array in arrays]
        if lengths[0] != lengths[1]:
            raise SettingsError(f"--data: split {split!r} of {url!r} has {lengths[0]} x but {lengths[1]} y")
        self._length, self._split = lengths[0], group[split]
        group_of = group.get(f"{split}/group")
        self.group = group_of[:] if isinstance(group_of, zarr.Array) else None

    def __len__(self) -> int:
        return self._length

    @property
    def absent(self) -> str:
        """Say how many chunks of `x` and `y` are not stored, which Zarr reads as the fill value; empty where all are.

        An array written with Zarr's own settings lacks the chunks that hold nothing else, and so does an incomplete copy.
        """
        said = []
        for name, array in (("x", self._x.array), ("y", self._y.array)):
            try:
                missing = array.nchunks - array.nchunks_initialized if array.store.supports_listing else 0
            except Exception as error:  # every file system has errors of its own, and reading may need no listing
                text = scrub(f"{type(error).__name__}: {error}", self._arguments[2])
                return f"whether all chunks are stored cannot be told ({text})"
            if missing:
                said.append(
                    f"{missing:,} of {array.nchunks:,} chunks of {name} are not stored and read as {array.fill_value}"
                )
        return "; ".join(said)

    def chunk_of(self, index: int) -> int:
        """Return the chunk of `x` that an example is read with."""
        return index // self._x.step

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1 and start < stop, f"{index}: a range of examples, in order"
            x, y = self._read(start, stop)
        elif 0 <= index < len(self):
            x, y = (rows[0] for rows in self._read(index, index + 1))
        else:
            raise IndexError(f"example {index} of {len(self)}")
        return x, y if y.is_floating_point() else y.long()

    def column(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return a range of rows of another array of the split; None where there is none.

        Raises:
            ValueError: It has another number of rows than `x`.
        """
        array = self._split.get(name)
        if not isinstance(array, zarr.Array):
            return None
        if array.shape[:1] != (len(self),):
            raise ValueError(f"the array {name!r} has shape {array.shape} beside {len(self)} examples")
        return np.asarray(array[start:stop])

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        options = self._arguments[2]
        try:
            return _tensor(self._x[start:stop]), _tensor(self._y[start:stop])
        except Exception as error:
            if not options:
                raise
            raise OSError(scrub(f"{type(error).__name__}: {error}", options)) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return ZarrSplit, self._arguments


@contextmanager
def _opening(url: str, options: Mapping[str, Any], hint: str) -> Iterator[None]:
    """Turn what is raised while a group is opened into an error that names the URL, and no option."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:  # every file system has errors of its own
        if may_pass(error):
            text = scrub(f"{type(error).__name__}: {error}", options)
            raise StorageError(f"--data: {url!r} cannot be read ({text})") from None
        raise SettingsError(
            f"--data: got {url!r}; expected an import path of the form module:callable, or the path or URL of a "
            "Zarr group, or of a folder of Parquet, Arrow or tar files such as train/*.parquet "
            f"({type(error).__name__} when it was opened). {hint}".rstrip()
        ) from None


def _tensor(rows: np.ndarray) -> Tensor:
    """Return rows as a tensor, in this machine's byte order."""
    return torch.from_numpy(rows if rows.dtype.isnative else rows.astype(rows.dtype.newbyteorder("=")))
