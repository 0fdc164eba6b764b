"""The same bits on a GPU again and again, for every grouping of the sums; and no waiting for the device but once a batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from core import test_sum_rows as rows
from core.test_waits import networks

from laplace import Laplace
from laplace.curvature import backend_class
from laplace_dist.execution.kernels import deterministic_kernels


@pytest.fixture
def there(monkeypatch, device):
    """The cases of the CPU's tests, with their models and data on the GPU."""
    for name in ("mlp", "token_model"):
        make = getattr(rows, name)
        monkeypatch.setattr(rows, name, lambda *args, make=make, **kwargs: make(*args, **kwargs).to(device))
    return lambda case: rows.CASES[case]()


@pytest.mark.parametrize("case", rows.CASES)
def test_every_part_of_a_sum_has_the_bits_of_the_whole(case, there, device):
    la, data = there(case)
    x, y = (value.to(device) for value in data)
    with deterministic_kernels(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = la.initialize(x[:10])
        whole = rows.accumulated(la, x, y)
        again = rows.accumulated(la, x, y)
        assert all(torch.equal(value, again.tensors[name]) for name, value in whole.tensors.items())
        for part in rows.shares(spec):
            rows.check(whole, rows.accumulated(la, x, y, part), part)


@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("name", networks())
def test_a_batch_waits_for_the_device_once(name, structure, estimator, device):
    torch.manual_seed(0)
    model, shape = networks()[name]
    model = model.to(device).eval()
    x, y = torch.randn(32, *shape, device=device), torch.randint(10, (32,), device=device)
    cls, kwargs = backend_class("native", estimator)
    la = Laplace(model, "classification", "all", structure, backend=cls, backend_kwargs=kwargs)
    la.initialize(x)
    sums = la.zero_sums()
    la.accumulate(sums, x, y)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            la.accumulate(sums, x, y, 32)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]
    assert len(waits) <= 1, waits
