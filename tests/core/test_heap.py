"""What is freed stays with the process while batches are added up, and goes back to the kernel afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MEASURED = """
import ctypes, os, torch
from laplace.linalg.heap import keeping_freed

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20

def work():
    return [torch.ones(8, 1 << 18) for _ in range(16)]  # 128 MB in blocks of 8

work()
before = megabytes()
with keeping_freed, keeping_freed:
    work()
    inside = megabytes()
    with keeping_freed:
        pass
    work()
    still = megabytes()
print(inside - before, still - before, megabytes() - before)
"""


def grown(**environment: str) -> list[int]:
    """By how many MB a process has grown after its work inside of two blocks, once one of them has ended, and after both."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return list(map(int, done.stdout.split()))


def test_memory_is_kept_inside_and_let_go_of_after():
    inside, still, after = grown()
    assert min(inside, still) > 100
    assert after < 20


@pytest.mark.parametrize("choice", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_users_own_choice_stays(choice):
    assert max(grown(**{choice: str(1 << 20)})) < 20
