r"""Counter-based random numbers: a pure function of seed, example, sample and class.

A Monte-Carlo Fisher is a sum over examples, so its noise has to belong to the example and not to the batch, the worker
or the order in which work was done. Each number is a hash of its coordinates (the SplitMix64 finaliser of Steele, Lea and
Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), computed in wrapping 64-bit integer arithmetic,
which gives the same bits on every device.

Beside them: directions that are the same at every call, and a seed where the user gave none.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_PERIOD = 2_039  # of fixed directions: a prime, so that no dimension of a tensor divides it


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of signed 64-bit integers."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def uniform(seed: int, examples: Tensor, draws: int) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: Any integer.
        examples: Indices of the examples in the data set, ``(batch,)`` int64.
        draws: How many numbers each example gets.

    Returns:
        ``(batch, draws)`` float64; row ``i`` depends on ``seed`` and ``examples[i]`` alone.
    """
    origin = int(_mix(torch.tensor(seed % (1 << 62), dtype=torch.int64, device="cpu") + _GOLDEN))
    rows = _mix(examples.to(torch.int64) * _GOLDEN + origin)
    columns = torch.arange(1, draws + 1, dtype=torch.int64, device=examples.device) * _GOLDEN
    bits = _shift_right(_mix(rows[:, None] + columns[None, :]), 12)
    return (bits.to(torch.float64) + 0.5) / float(1 << 52)


def normal(seed: int, examples: Tensor, draws: int) -> Tensor:
    """Standard normal numbers by the inverse distribution function; same coordinates as :func:`uniform`."""
    return torch.special.ndtri(uniform(seed, examples, draws))


def fixed_directions(like: Tensor) -> Tensor:
    """Standard normal numbers of a tensor's shape, type and place: the same ones at every call, over and over in large ones."""
    drawn = _drawn(like.device, like.dtype)
    return drawn.repeat(-(-like.numel() // _PERIOD))[: like.numel()].view(like.shape)


@lru_cache(maxsize=8)
def _drawn(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Drawn on the host, and moved once: a copy to a GPU waits for all that was asked of it before."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.randn(_PERIOD, generator=generator, device="cpu").to(device, dtype)


def fresh_seed(bits: int = 60) -> int:
    """Draw a seed from torch's global generator, which ``torch.manual_seed`` controls."""
    return int(torch.randint(1 << bits, (), device="cpu"))


def check_samples(n_samples: int) -> int:
    """Refuse a number of samples that is none.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
        raise ValueError(f"n_samples={n_samples!r} must be a whole number of at least 1.")
    return n_samples
