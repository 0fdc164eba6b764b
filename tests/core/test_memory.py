"""What cannot fit into memory is refused before it is allocated, with its size and what to do instead."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laplace import Laplace, NotEnoughMemoryError
from laplace.capture import contractions
from laplace.curvature import NativeGGN
from laplace.linalg import memory
from laplace.linalg.lowrank import block_lanczos
from laplace.utils import FeatureExtractor

from .models import CASES, loader


def fitted(structure, **kwargs):
    model, x, y = CASES["mlp"].make()
    structure, _, subset = structure.partition(" ")
    la = Laplace(model, "classification", subset or "all", structure, **kwargs)
    la.fit(loader(x, y))
    return la, x, y


P = 3 * 4 + 4 + 4 * 3 + 3
CASES_BY_NAME = {
    "full sums": ("full", lambda la, x, y: la.fit(loader(x, y)), P * P * 8, "hessian_structure='kron', 'diag'"),
    "kron sums": ("kron", lambda la, x, y: la.fit(loader(x, y)), (9 + 16 + 16 + 9) * 8, "hessian_structure='diag'"),
    "diag sums": ("diag", lambda la, x, y: la.fit(loader(x, y)), P * 8, "last_layer"),
    "eigenvectors": ("full", lambda la, x, y: la.log_marginal_likelihood(), 4 * P * P * 8, "hessian_structure='kron'"),
    "root": ("full", lambda la, x, y: la.sample(2), 4 * P * P * 8, "hessian_structure='kron'"),
    "factor": ("kron", lambda la, x, y: la(x), 4 * 4 * 4 * 8, "hessian_structure='diag'"),
    "jacobians": ("diag", lambda la, x, y: la.backend.jacobians(x), 2 * 5 * 3 * P * 8, "Pass fewer examples"),
    "functorch": ("diag", lambda la, x, y: la.backend.functorch_jacobians(x), 2 * 5 * 3 * P * 8, "Pass fewer examples"),
    "last layer": (
        "diag last_layer",
        lambda la, x, y: la.backend.last_layer_jacobians(x),
        2 * 5 * 3 * 15 * 8,
        "Pass fewer examples",
    ),
    "eigenpairs": ("lowrank", lambda la, x, y: la.fit(loader(x, y)), (2 * 14 + 5 * 14) * P * 8, "Lower low_rank"),
    "kernel": ("gp", lambda la, x, y: la.fit(loader(x, y)), 3 * 10 * 10 * 8, "Lower n_subset"),
}


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_a_request_that_cannot_fit_stops_and_says_what_would(name, monkeypatch):
    structure, action, needed, instead = CASES_BY_NAME[name]
    la, x, y = fitted(structure)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(NotEnoughMemoryError, match=f"needs {needed:,} bytes .* but only {needed - 1:,}") as caught:
        action(la, x, y)
    assert instead in str(caught.value) and "Nothing was allocated" in str(caught.value)
    assert isinstance(caught.value, MemoryError) and isinstance(caught.value, ValueError)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    action(la, x, y)


def test_the_search_for_eigenpairs_asks_before_it_starts(monkeypatch):
    passes = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 14 * 1000 * 8 - 1)
    with pytest.raises(NotEnoughMemoryError, match="among 1,000 parameters needs 448,000 bytes"):
        block_lanczos(lambda v: passes.append(v) or v, 1000, 10)
    assert not passes


@pytest.mark.parametrize("action", ["jacobians", "functorch_jacobians", "last_layer_jacobians"])
def test_backends_alone_ask_too(action, monkeypatch):
    """Without a posterior that has looked at a batch before."""
    model, x, _ = CASES["sequence-output"].make()
    last = action == "last_layer_jacobians"
    backend = NativeGGN(FeatureExtractor(model, "2") if last else model, "classification", last_layer=last)
    needed = 2 * 5 * 6 * (15 if last else P) * 8
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(NotEnoughMemoryError, match=f"5 examples x 6 outputs .* needs {needed:,} bytes"):
        getattr(backend, action)(x)


def test_a_refused_fit_keeps_the_earlier_one(monkeypatch):
    la, x, y = fitted("full")
    before = la(x)
    with monkeypatch.context() as patch, pytest.raises(NotEnoughMemoryError):
        patch.setattr(memory, "free_bytes", lambda device: 1)
        la.fit(loader(x, y))
    assert torch.equal(la(x), before)


def test_kron_and_diag_need_no_jacobians_and_no_dense_matrix(monkeypatch):
    """On default paths nothing larger than the factors is asked for."""
    for structure in ("kron", "diag"):
        la, x, y = fitted(structure)
        monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 4 * 4 * 8)
        assert torch.isfinite(la(x)).all()
        la.log_marginal_likelihood()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.shape = torch.Size([])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.shape.numel():
                self.shape = tensor.shape
        return out


POSTERIORS = [(subset, structure) for subset in ("all", "last_layer") for structure in ("full", "kron", "diag", "gp")]
POSTERIORS += [("subnetwork", "full"), ("subnetwork", "diag"), ("all", "lowrank")]


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("subset, structure", POSTERIORS)
def test_no_jacobians_of_a_batch_on_any_default_path(subset, structure, monkeypatch):
    """Fit, evidence, predictive and both ways of tuning make nothing of the size (batch, outputs, parameters)."""
    monkeypatch.setattr(contractions, "_CHUNK", 1000)
    model, x, y = CASES["ten-classes"].make(n=64)
    kwargs = {"subnetwork_indices": torch.arange(0, 66, 2)} if subset == "subnetwork" else {}
    kwargs |= {"n_subset": 4} if structure == "gp" else {}
    la = Laplace(model, "classification", subset, structure, **kwargs)
    with Largest() as largest:
        la.fit(loader(x, y, batch_size=64))
        la(x)
        la.log_marginal_likelihood()
        la.optimize_prior_precision("gp" if structure == "gp" else "glm", n_steps=2)
        la.optimize_prior_precision(
            "gp" if structure == "gp" else "glm", "gridsearch", val_loader=loader(x, y, batch_size=64), grid_size=4
        )
    assert largest.shape.numel() < 64 * 10 * la.n_params, largest.shape


def test_free_bytes_of_this_machine():
    free = memory.free_bytes("cpu")
    assert free is None or 0 < free < 1 << 50
    assert memory.free_bytes("meta") is None


@pytest.mark.parametrize(
    "limit, used, cache, free",
    [("max", 10, 0, 5000), ("3000", 1000, 0, 2000), ("3000", 1000, 500, 2500), ("9000", 1000, 0, 5000)],
)
def test_the_limit_of_a_container_counts(limit, used, cache, free, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n".replace("5 kB", f"{5000 // 1024} kB"))
    for name, value in (
        ("memory.max", limit),
        ("memory.current", used),
        ("memory.stat", f"anon 1\ninactive_file {cache}"),
    ):
        (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes("cpu") == min(free, 4096)


def test_sizes_are_readable():
    assert memory.tensor_bytes(3, 5, dtype=torch.float32) == 60
    with pytest.raises(NotEnoughMemoryError, match=r"1,099,511,627,776,000 bytes \(1e\+03 TiB\)|\(1000 TiB\)"):
        memory.require(1000 << 40, "cpu", "A matrix", "Use a smaller one.")
