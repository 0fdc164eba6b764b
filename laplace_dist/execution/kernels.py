"""Which kernels a worker computes with: their precision, and on GPUs those that add in the same order every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from laplace.linalg.precision import products_in, use_products_in

_PRODUCTS = {"float32": "ieee", "tf32": "tf32", "bf16": "ieee"}  # of float32 tensors, by --precision


def use_deterministic_kernels() -> None:
    """Ask CUDA for deterministic kernels, from now on; an operation that has none warns, and does as it likes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Ask CUDA for deterministic kernels, for a while."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    use_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def use_precision(wanted: str) -> None:
    """Set the precision of products in float32, from now on.

    Left alone, convolutions on GPUs use TF32 with its three digits, which no float64 sum mends afterwards.

    Args:
        wanted: `float32`, `tf32`, or `bf16`, which leaves them alone.
    """
    use_products_in(_PRODUCTS[wanted])


def precision(wanted: str) -> AbstractContextManager[None]:
    """Set the precision of products in float32, for a while."""
    return products_in(_PRODUCTS[wanted])


def passes(wanted: str, device_type: str) -> AbstractContextManager[None]:
    """Run forward passes, and so what is differentiated in them, in the precision that `--precision` names.

    In bfloat16 torch's autocast decides which operations round, as in training with it; weights, and whatever the core
    library computes from captured inputs and gradients, stay as they are. Rounded weights are not kept: autocast would
    use them on after weights were loaded into the same tensors. Autocast is a matter of the thread.
    """
    if wanted != "bf16":
        return nullcontext()
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)
