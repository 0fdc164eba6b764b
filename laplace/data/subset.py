"""A random subset of a data set, the same at every pass: "subset of data" for posteriors that scale with its size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler


class SoDSampler(Sampler[int]):
    """The same random subset of a data set at every pass: "subset of data" for posteriors that scale with its size.

    Args:
        N: Number of examples in the data set.
        M: Number of examples in the subset.
        seed: Seed of the choice.

    Raises:
        ValueError: If the subset is empty or larger than the data set.

    Example:
        >>> from laplace.utils import SoDSampler
        >>> len(list(SoDSampler(N=100, M=10)))  # indices of ten examples of a hundred
        10
    """

    def __init__(self, N: int, M: int, seed: int = 0):
        """See the class."""
        if not 0 < M <= N:
            raise ValueError(f"A subset of M={M} examples must have between 1 and N={N}.")
        order = torch.randperm(N, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.indices = order[:M].sort().values.tolist()

    def __iter__(self) -> Iterator[int]:
        """Indices in ascending order."""
        return iter(self.indices)

    def __len__(self) -> int:
        """Size of the subset."""
        return len(self.indices)


def subset_of(loader: Iterable, n_data: int, size: int, seed: int = 0, dict_key_y: str = "labels") -> Iterable:
    """Batches of a random subset; the same examples at every call where the loader's data set can be indexed.

    Args:
        loader: Batches ``(x, y)``, or dict-like ones.
        n_data: Number of examples that it gives.
        size: Number of examples to choose.
        seed: Seed of the choice.
        dict_key_y: Key of the targets in dict-like batches.
    """
    if size == n_data:
        return loader
    sampler = SoDSampler(n_data, size, seed)
    usual = isinstance(loader, DataLoader) and isinstance(loader.sampler, (SequentialSampler, RandomSampler))
    if usual and loader.batch_size is not None and len(loader.dataset) == n_data:
        return DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)
    return _picked(loader, torch.tensor(sampler.indices, device="cpu"), dict_key_y)


def _picked(loader: Iterable, indices: Tensor, dict_key_y: str) -> Iterator[Any]:
    """Batches with the examples of these places alone."""
    start = 0
    for batch in loader:
        n = len(batch[dict_key_y] if isinstance(batch, Mapping) else batch[1])
        own = indices[(indices >= start) & (indices < start + n)] - start
        start += n
        if len(own):
            yield _rows(batch, own) if isinstance(batch, Mapping) else tuple(_rows(part, own) for part in batch)


def _rows(x: Any, indices: Tensor) -> Any:
    """Some examples of a tensor, or of the tensors of a dict-like batch."""
    if isinstance(x, Mapping):
        return {key: _rows(value, indices) if isinstance(value, Tensor) else value for key, value in x.items()}
    return x[indices.to(x.device)]
