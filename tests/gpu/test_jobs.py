"""Whole jobs on a GPU: the sums of the CPU, the same bits for any number of workers, and what is said and refused."""

from __future__ import annotations

import json

import gpu_cases
import pytest
import torch
from core.naive import relative_error

import laplace_dist
from laplace.errors import NotEnoughMemoryError
from laplace.linalg.memory import free_bytes, require
from laplace.linalg.precision import float32_products, products_in
from laplace_dist.config.settings import Config
from laplace_dist.data.read_ahead import ReadAhead
from laplace_dist.errors import SettingsError


def config(checkpoint, **changes) -> Config:
    values = {
        "model": "gpu_cases:network",
        "data": "gpu_cases:images",
        "batch_size": 16,
        "segment_size": 32,
        "checkpoint": str(checkpoint),
        "ray_address": "inline",
    }
    return Config(**{**values, "device": "cuda", **changes})


def sums(checkpoint, device="cuda"):
    la = laplace_dist.load_posterior(str(checkpoint), gpu_cases.network().to(device))
    return {name: value.cpu() for name, value in la.sums.to_tensors().items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with tuning, evaluation and report, in this process."""
    place = tmp_path_factory.mktemp("jobs") / "run"
    return place, laplace_dist.fit(config(place))


def test_the_sums_are_those_of_the_cpu(run, tmp_path):
    laplace_dist.fit(config(tmp_path, device="cpu", skip_tune=True, skip_evaluate=True, skip_report=True))
    expected = sums(tmp_path, "cpu")
    for name, value in sums(run[0]).items():
        assert relative_error(value, expected[name]) < 2e-5, name


def test_the_report_and_the_provenance_name_the_device(run):
    place, result = run
    assert (place / "report.html").exists() and result.metrics is not None
    partial = next((place / "partials").glob("*.json"))
    made = json.dumps(json.loads(partial.read_text()))
    assert torch.cuda.get_device_name() in made and f"CUDA {torch.version.cuda}" in made


def test_verify_and_the_same_command_again(run):
    place, _ = run
    assert laplace_dist.verify(str(place)).problems == []
    assert laplace_dist.fit(config(place)).version == run[1].version


def test_another_device_is_refused_for_a_run_that_was_begun_on_this_one(run):
    with pytest.raises(SettingsError, match="--device: stored 'cuda', now 'cpu'"):
        laplace_dist.fit(config(run[0], device="cpu"))


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_two_workers_of_ray_give_the_bits_of_one_process(structure, tmp_path):
    """Both on the one device."""
    less = {"skip_tune": True, "skip_evaluate": True, "skip_report": True, "hessian_structure": structure}
    if structure == "full":
        less |= {"subset_of_weights": "last_layer"}
    laplace_dist.fit(config(tmp_path / "one", **less))
    workers = {"ray_address": "local", "gpus_per_worker": 0.5, "num_workers": 2}
    laplace_dist.fit(config(tmp_path / "two", **less, **workers))
    one, two = sums(tmp_path / "one"), sums(tmp_path / "two")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 5e-3), ("bf16", 0.1)])
def test_low_precision_is_of_the_passes_alone_and_recorded(precision, tolerance, run, tmp_path):
    place = tmp_path / precision
    laplace_dist.fit(config(place, precision=precision, skip_tune=True, skip_evaluate=True, skip_report=True))
    expected = sums(run[0])
    errors = {name: relative_error(value, expected[name]) for name, value in sums(place).items()}
    assert 0 < max(errors.values()) < tolerance, errors
    assert errors["0.weight/A"] < 2e-6, "inputs of the first layer are not rounded"


def test_float32_is_float32_whatever_the_users_module_has_set(run, tmp_path):
    with products_in("tf32"):
        laplace_dist.fit(config(tmp_path, skip_tune=True, skip_evaluate=True, skip_report=True))
        assert set(float32_products().values()) == {"tf32"}, "the process is left as it was"
    one, two = sums(run[0]), sums(tmp_path)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    """The allocator is given so much less memory that 8 examples fit at once, and 16 do not."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.9 * 2**30 / total)
    try:
        less = {"skip_tune": True, "skip_evaluate": True, "skip_report": True}
        laplace_dist.fit(config(tmp_path / "greedy", model="gpu_cases:greedy", **less))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    plan = json.loads((tmp_path / "greedy" / "plan.json").read_text())
    assert (plan["settings"]["batch_size"], plan["halved_from"]) == (8, 16)
    laplace_dist.fit(config(tmp_path / "small", model="gpu_cases:greedy", batch_size=8, **less))
    one, two = (
        laplace_dist.load_posterior(str(tmp_path / name), gpu_cases.greedy().cuda()).sums.to_tensors()
        for name in ("greedy", "small")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_free_memory_is_what_the_driver_has_left(device):
    before = free_bytes(device)
    held = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    after = free_bytes(device)
    assert abs(before - after - (1 << 30)) < 1 << 26
    with pytest.raises(NotEnoughMemoryError, match="free on cuda"):
        require(after * 2, device, "This test", "Nothing.")
    del held


def test_batches_are_read_ahead_into_pinned_memory():
    ahead = ReadAhead(gpu_cases.images("train"), 16, workers=2, pin=True)
    try:
        found = [
            (inputs.clone(), inputs.is_pinned() and targets.is_pinned())
            for _, inputs, targets in ahead.batches(0, gpu_cases.N)
        ]
    finally:
        ahead.close()
    assert all(pinned for _, pinned in found)
    assert torch.equal(torch.cat([x for x, _ in found]), gpu_cases.tensors("train")[0])
