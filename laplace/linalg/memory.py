"""Refuse what cannot fit into memory before it is allocated, and say what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from laplace.errors import NotEnoughMemoryError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_ON_GPU = 1 << 26  # elements


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say.

    On CPUs this is the kernel's estimate of what is available without swapping, or what the container's limit leaves,
    whichever is less. On GPUs it is what the driver has left and what torch holds in reserve.
    """
    device = torch.device(device)
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    limits = [int(fields["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in fields else []
    limits += [left for left in [_left_in_container()] if left is not None]
    return min(limits, default=None)


def _left_in_container() -> int | None:
    """Bytes below the limit of the control group (version 2); file caches count as free."""
    limit, used, details = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    caches = dict(line.split() for line in details.read_text().splitlines()) if details.exists() else {}
    return int(limit.read_text()) - int(used.read_text()) + int(caches.get("inactive_file", 0))


def at_once(elements: int, device: torch.device) -> int:
    """How many elements of a temporary are held at once: as many as suit a processor's caches, or on a GPU some 256 MB.

    On GPUs it is the number of kernels that costs, and small ones leave most of the chip idle.
    """
    return max(elements, _ON_GPU) if device.type == "cuda" else elements


def ranges(n: int, each: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``n`` items of ``each`` elements in steps of about ``elements`` elements."""
    step = max(1, elements // max(1, each))
    for start in range(0, n, step):
        yield start, min(start + step, n)


def tensor_bytes(*shape: int, dtype: torch.dtype = torch.float64) -> int:
    """Bytes of a tensor."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def require(needed: int, device: torch.device | str, what: str, instead: str) -> None:
    """Stop before an allocation that cannot succeed.

    Args:
        needed: Bytes that are about to be allocated.
        device: Where.
        what: What they are for, as the start of a sentence.
        instead: What to do instead, as a sentence.

    Raises:
        NotEnoughMemoryError: If fewer bytes are free.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise NotEnoughMemoryError(
            f"{what} needs {needed:,} bytes ({_human(needed)}), but only {free:,} ({_human(free)}) are free on {device}. "
            f"Nothing was allocated. {instead}"
        )


def _human(n: int) -> str:
    value, unit = float(n), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, bigger
    return f"{value:.3g} {unit}" if unit != "B" else f"{n} B"
