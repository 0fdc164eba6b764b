"""Tests that need a CUDA device: `make test-gpu`. Without one they fail, so that nobody takes them for passed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where workers import gpu_cases from


@pytest.fixture(autouse=True, scope="session")
def device():
    """The device; there has to be one."""
    assert torch.cuda.is_available(), "these tests need a CUDA device; `make test` runs all others"
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def torchs_own_settings():
    """Leave the switches of precision and determinism as they were."""
    from laplace.linalg.precision import products_in

    with products_in("ieee"):
        yield
    torch.use_deterministic_algorithms(False)
