"""Data sets of items that are written down, for the tests of batches and fingerprints."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class Items(Dataset):
    """A data set of arbitrary items; one that is an exception is raised when it is read."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def pairs(n):
    return [(torch.full((2,), float(i)), i) for i in range(n)]
