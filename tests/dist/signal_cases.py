"""A data set that holds up whoever reads an example after the plan was made, in whichever process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dist_cases
from torch.utils.data import Dataset


class Gate(Dataset):
    """At the trap, says that somebody is there and waits until the test says `go`."""

    def __init__(self, split: str, folder: str, trap: int) -> None:
        self.folder, self.trap = Path(folder), trap
        self.x, self.y = dist_cases.tensors(split)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        planned = list(self.folder.glob("run/**/plan.json"))
        if index == self.trap and planned and not dist_cases.only_compared():
            (self.folder / f"waiting-{os.getpid()}").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.01)
        return self.x[index], self.y[index]
