r"""Products of float32 matrices on CPUs, by oneDNN where MKL leaves half of a processor's rate.

torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone: where a thread of an AMD EPYC reaches
115 GFLOP/s by it, it does 250 by oneDNN, which torch brings along for convolutions (``benchmarks/products.py``). Neither rounds
what it multiplies; they differ in the order in which the terms of a product are added.

Which of the two multiplies follows from processor, number of threads and shapes alone, so that bits do.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_CPUINFO = Path("/proc/cpuinfo")
_FEWEST = 1 << 21  # multiplications from which on oneDNN's preparations pay on one thread
_NARROWEST = 8  # rows, columns and terms of a product
_SQUARES = 28  # that are added up one after the other, before they go into a sum in float64: no small one is lost
_WIDEST = 1 << 14  # entries of a weight from which on a batch of 128 has as many


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of matrices ``(m, k)`` and ``(n, k)``."""
    if _suits(left, right):
        return _one_dnn(left, right)
    return left @ right.T


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of values ``(…, k)`` and a matrix ``(k, n)``."""
    rows = left.flatten(0, -2) if left.ndim > 2 and left.is_contiguous() else left
    if rows.ndim == 2 and right.ndim == 2 and _suits(rows, right.T):
        return times_transposed(rows, right.T).view(*left.shape[:-1], right.shape[1])
    return left @ right


def batched(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of as many matrices ``(m, k)`` and ``(k, n)``, ``(batch, m, n)``."""
    return product(left[0], right[0])[None] if len(left) == 1 else torch.bmm(left, right)


def sum_of_squared_products(left: Tensor, right: Tensor) -> Tensor:
    """The squares of ``leftᵀ right``, entry by entry and added up, of as many matrices ``(k, m)`` and ``(k, n)``."""
    if not len(left) or not _suits(left[0].T, right[0].T):
        return torch.bmm(left.mT, right).square_().sum(0)
    total = left.new_zeros(left.shape[2], right.shape[2], dtype=torch.float64)
    for start in range(0, len(left), _SQUARES):
        some: Tensor | None = None
        for one, other in zip(left[start : start + _SQUARES], right[start : start + _SQUARES], strict=True):
            entries = times_transposed(one.T, other.T)
            some = entries.square_() if some is None else some.addcmul_(entries, entries)
        total += some
    return total


def turned(rows: Tensor, most: int) -> Tensor:
    """Rows ``(…, n, width)`` transposed, in the memory from which their outer products are made, ``most`` high."""
    pays = rows.shape[-2] * rows.shape[-1] * most >= _fewest() and _of_float32(rows) and is_faster()
    if not pays or rows.ndim == 2:
        return rows.mT.contiguous() if pays else rows.mT
    found = rows.new_empty(rows.mT.shape)
    for one, other in zip(found, rows, strict=True):  # torch transposes a matrix faster than several
        one.copy_(other.T)
    return found


def add_times_transposed_(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right.T``, in place, of one pair of matrices or of several one after the other; else a new one.

    Args:
        total: ``(m, n)``; None to begin from zero.
        left: ``(m, k)``, or of several ``(pairs, m, k)``.
        right: ``(n, k)``, or of several ``(pairs, n, k)``.
    """
    left, right = (values if values.ndim == 3 else values[None] for values in (left, right))
    if not len(left) or not _suits(left[0], right[0]):
        return (
            torch.addbmm(left.new_zeros(()), left, right.mT, beta=0) if total is None else total.addbmm_(left, right.mT)
        )
    for one, other in zip(left.unbind(), right.unbind(), strict=True):
        product = _one_dnn(one, other)
        total = product if total is None else total.add_(product)
    return total


def faster_products(weights: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Inside the block, passes through a network with these weights multiply as this module does.

    Nothing of it is seen above: graphs, hooks and types of tensors are those of torch.
    """
    if is_faster() and any(w.ndim == 2 and w.numel() >= _WIDEST and _of_float32(w) for w in weights):
        return _FasterProducts()
    return nullcontext()


class _FasterProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if types or kwargs:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and _pays(left := args[0], right := args[1].T):
            return _one_dnn(left, right)
        if func is torch.ops.aten.addmm.default and args[0].ndim == 1 and _pays(left := args[1], right := args[2].T):
            return _one_dnn(left, right, args[0].expand(len(right)).contiguous())
        return func(*args)


def _one_dnn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, "none", [], "")


def _suits(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN makes ``left @ right.T``: where it is faster, and nobody asks for its derivative, which it has not."""
    differentiated = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    return not differentiated and _pays(left, right)


def _pays(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies ``left @ right.T`` faster."""
    enough = left.numel() * len(right) >= _fewest() and min(*left.shape, len(right)) >= _NARROWEST
    return enough and _of_float32(left) and _of_float32(right) and is_faster()


def _fewest() -> int:
    """Multiplications from which on oneDNN's preparations pay; several threads have to be called together each time too."""
    threads = torch.get_num_threads()
    return _FEWEST if threads == 1 else 2 * threads * _FEWEST


def _of_float32(values: Tensor) -> bool:
    return values.dtype == torch.float32 and values.device.type == "cpu" and values.layout == torch.strided


def _dense(matrix: Tensor) -> Tensor:
    """In rows or columns without gaps: of other views oneDNN makes products a thousand times more slowly."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


@lru_cache
def is_faster() -> bool:
    """Whether torch multiplies by MKL, on a processor that has AVX-512 and is not Intel's."""
    if not torch.backends.mkl.is_available() or not is_possible() or not _CPUINFO.exists():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in _CPUINFO.read_text()


def is_possible() -> bool:
    """Whether this torch has oneDNN's product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
