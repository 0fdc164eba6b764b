"""A worker's start on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import os

import dist_cases
import pytest
import torch

from laplace_dist.errors import SettingsError
from laplace_dist.execution.worker import Worker


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Return a worker that Ray gave a GPU; what it sets in this process is set back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    yield Worker(dist_cases.config(tmp_path / "run", gpus_per_worker=1.0), [], os.getcwd(), True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_a_gpu_that_torch_cannot_use_is_refused(worker, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="gpus_per_worker=1.0: Ray gave this worker a GPU, but torch cannot use one"):
        raise worker.start().rebuilt()
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_of_a_gpu_are_deterministic(worker, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    worker.start()
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert worker._context.device.type == "cuda"
