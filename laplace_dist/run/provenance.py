"""Where numbers were made: versions, device, threads and precision flags, recorded beside every committed result."""

from __future__ import annotations

import os
import platform
import socket
from functools import lru_cache
from typing import Any

import torch

from laplace.linalg import matmul
from laplace.linalg.precision import float32_products, matmul_precision
from laplace_dist import __version__


def environment(device: torch.device | str) -> dict[str, Any]:
    """Return what the last bits of a result depend on beside the plan, and the node's name.

    Args:
        device: Where this process computes.
    """
    device = torch.device(device)
    return {
        "node": node(),
        "laplace_dist": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device_name(device.type),
        "driver": _driver(device.type),
        "threads": torch.get_num_threads(),
        "precision": precision(device.type),
    }


def node() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def precision(device_type: str) -> dict[str, Any]:
    """Return the flags that change the precision of this thread's products."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else ""
    products = float32_products()
    return {
        "autocast": str(autocast).removeprefix("torch."),
        "float32_matmul_precision": matmul_precision(products),
        "cudnn_allow_tf32": products["cudnn.conv"] == "tf32",
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
    }


@lru_cache
def _device_name(kind: str) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name()
    products = ", products by oneDNN" if matmul.is_faster() else ""
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}{products}"


@lru_cache
def _driver(kind: str) -> str:
    return f"CUDA {torch.version.cuda}" if kind == "cuda" else "none"
