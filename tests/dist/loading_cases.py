"""Data sets that say who read them, how and when, for the tests of loading; processes that read ahead import this module."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset


class Traced(Dataset):
    """`n` pairs; notes in a folder which process read which example, and does something at `trap`."""

    def __init__(self, n: int = 24, folder: str | None = None, trap: int = -1, what: str = "") -> None:
        self.n, self.folder, self.trap, self.what = n, folder, trap, what

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        if self.folder is not None:
            with open(Path(self.folder) / f"reads-{os.getpid()}", "a") as file:
                file.write(f"{index}\n")
        if index == self.trap:
            getattr(self, self.what)()
        return torch.full((2,), float(index)).sin(), index

    def raises(self) -> None:
        raise KeyError("no file 13.png")

    def odd(self) -> None:
        raise Odd(1, 2)

    def dies(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def waits(self) -> None:
        time.sleep(60)


def split(split: str) -> Traced:
    return Traced()


class Odd(Exception):
    """An error that cannot be built from its text, nor sent to another process."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


class Unsendable(Traced):
    """A data set with an open file."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class State(Dataset):
    """What torch computes with in the process that reads."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return torch.tensor([torch.get_num_threads()]), torch.zeros(1).dtype == torch.float64


def join(items):
    """A function for `--collate`: padded sequences and their lengths."""
    lengths = torch.tensor([len(x) for x, _ in items])
    return {
        "ids": torch.nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True),
        "lengths": lengths,
        "target": torch.tensor([y for _, y in items]),
    }


def bad_join(items):
    raise ValueError("no idea how\nat all")


def join_to_lock(items):
    return {"x": torch.zeros(len(items), 2), "lock": threading.Lock(), "labels": torch.zeros(len(items))}


def reads(folder: Path) -> dict[int, list[int]]:
    """Return the examples that each process read, by its id."""
    return {int(p.name.split("-")[1]): [int(i) for i in p.read_text().split()] for p in folder.glob("reads-*")}
