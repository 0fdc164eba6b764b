"""Running out of memory: how it is told, and what a process lets go of before it says so."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import torch

from laplace_dist.execution.raised import Raised, outcome_of

WORDS = re.compile(r"MemoryError|out of memory|(can't|cannot) allocate memory|bad_alloc", re.IGNORECASE)
OF_SUMS = "laplace.errors.NotEnoughMemoryError"  # refused before it was allocated: no batch is to blame


def is_out_of_memory(raised: Raised) -> bool:
    """Say whether an allocator has refused a task's request, or its sums were not begun for lack of memory."""
    return WORDS.search(str(raised)) is not None


def outcome_with_memory(call: Callable[[], Any], let_go: Callable[[], None] = lambda: None) -> Any:
    """Return what a call returns, or what it raised as plain data; where memory ran out it is made once more.

    Before that the process lets go of what it holds beside the task: a commit that goes on, what Python has not collected yet,
    and what torch's allocator keeps in pieces that are too small. The task is the same, so that its bits are.

    Args:
        call: Made a second time only if it has run out of memory.
        let_go: Lets go of what the caller holds.
    """
    outcome = outcome_of(call)
    if not isinstance(outcome, Raised) or not is_out_of_memory(outcome):
        return outcome
    let_go()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return outcome_of(call)
