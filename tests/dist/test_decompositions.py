"""Eigendecompositions of large factors: made once, committed, read by whoever predicts, and the same numbers as without."""

from __future__ import annotations

import json
from pathlib import Path

import dist_cases
import pytest
import torch

import laplace_dist
from laplace.linalg.kronecker import Kron
from laplace.structures.decomposition import decompose
from laplace_dist.errors import CheckpointError
from laplace_dist.report.progress import Progress
from laplace_dist.run import decompositions
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.layout import CURRENT
from laplace_dist.stages.decompose import Decompose, tasks

KRON = ["0.weight/A", "0.weight/B", "4.weight/A", "4.weight/B"]
CASES = {"kron": ("kron", "all", KRON), "full": ("full", "last_layer", ["full"])}


@pytest.fixture
def worth(monkeypatch):
    """Let factors of any width be worth it."""
    monkeypatch.setattr(decompositions, "WORTH", 1)


@pytest.fixture
def eigh(monkeypatch):
    """Count the eigendecompositions of matrices, not of batches of small ones."""
    widths, plain = [], torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda M: plain(M) if M.ndim > 2 else (widths.append(len(M)), plain(M))[1]
    )
    return widths


def config(folder, structure="kron", subset="all", **changes):
    values = {"hessian_structure": structure, "subset_of_weights": subset, "skip_tune": False, "skip_evaluate": False}
    return dist_cases.config(folder, **{**values, **changes})


def manifests(folder) -> dict[str, Path]:
    """Return the files of the decompositions by factor."""
    return {
        json.loads(path.read_text())["factor"]: path for path in sorted(Path(folder).glob("decompositions/*/*.json"))
    }


@pytest.mark.parametrize("case", CASES)
def test_each_is_made_once_and_no_number_depends_on_it(tmp_path, monkeypatch, eigh, case):
    structure, subset, names = CASES[case]
    without = dist_cases.run_inline(config(tmp_path / "without", structure, subset))
    assert not manifests(tmp_path / "without")
    monkeypatch.setattr(decompositions, "WORTH", 1)
    eigh.clear()
    found = dist_cases.run_inline(config(tmp_path / "with", structure, subset))
    assert len(eigh) == len(names)
    assert found == without and sorted(manifests(tmp_path / "with")) == names
    eigh.clear()
    x, _ = dist_cases.tensors("test")
    loaded = [laplace_dist.load_posterior(str(tmp_path / name), dist_cases.convnet()) for name in ("with", "without")]
    assert torch.equal(loaded[0](x), loaded[1](x)) or structure == "full"  # a dense one takes the root that is cheaper
    torch.testing.assert_close(loaded[0](x), loaded[1](x), rtol=1e-5, atol=1e-7)
    assert len(eigh) == (len(names) if structure == "kron" else 0)  # of the run without
    assert laplace_dist.verify(str(tmp_path / "with")).ok


def test_a_job_goes_on_after_those_that_are_committed(tmp_path, worth, eigh):
    with dist_cases.inline_job(config(tmp_path / "run")) as job:
        job.open()
        job.map()
        version = job.reduce()
        assert decompositions.missing(job.store, job.plan, version) == KRON
        first = tasks(job.plan, version, KRON)[0]
        assert first.names == ("4.weight/A",)  # the widest
        job.session.run([first], "cpu", Progress("decompose", "groups of factors", 1))
        assert decompositions.read(job.store, job.plan, version, "cpu") is None  # not all of them
        eigh.clear()
        job.decompose(version)
        assert sorted(eigh) == [3, 3, 9]
        job.decompose(version)
        assert len(eigh) == 3
        read = decompositions.read(job.store, job.plan, version, "cpu")
        sums = laplace_dist.load_posterior(str(tmp_path / "run"), dist_cases.convnet())
    for name, (values, vectors) in read.items():
        factor = next(
            f
            for b, fs in zip(sums.H_facs.names, sums.H_facs.kfacs, strict=True)
            for n, f in zip(b, fs, strict=True)
            if n == name
        )
        torch.testing.assert_close(
            (vectors.double() * values) @ vectors.double().T, factor.double(), rtol=1e-5, atol=1e-6
        )


def test_narrow_factors_go_together_and_wide_ones_alone(tmp_path, monkeypatch):
    with dist_cases.inline_job(config(tmp_path / "run")) as job:
        job.open()
        monkeypatch.setattr(decompositions, "WORTH", 28**3)
        assert [task.names for task in tasks(job.plan, "v", KRON)] == [
            ("4.weight/A", "0.weight/A", "0.weight/B", "4.weight/B")
        ]
        monkeypatch.setattr(decompositions, "WORTH", 9**3 + 30)
        assert [task.names for task in tasks(job.plan, "v", KRON)] == [
            ("4.weight/A",),
            ("0.weight/A", "0.weight/B"),
            ("4.weight/B",),
        ]
        assert tasks(job.plan, "v", KRON)[1].what == "eigendecomposition of 0.weight/A, …"


def test_what_is_damaged_is_named_and_made_anew_where_it_is_deleted(tmp_path, worth):
    chosen = config(tmp_path / "run")
    result = dist_cases.run_inline(chosen)
    path = manifests(tmp_path / "run")["4.weight/A"]
    chunk = max(
        (p for p in path.with_suffix("").rglob("*") if "vectors" in p.parts and p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-8] + bytes(8))
    found = laplace_dist.verify(str(tmp_path / "run"))
    assert len(found.problems) == 1 and "vectors" in found.problems[0][0]
    with pytest.raises(CheckpointError, match=r"delete decompositions/\w+/\d+.json and run the same command again"):
        laplace_dist.load_posterior(str(tmp_path / "run"), dist_cases.convnet())
    path.unlink()
    x, _ = dist_cases.tensors("test")
    expected = laplace_dist.load_posterior(str(tmp_path / "run"), dist_cases.convnet())(x)  # makes its own meanwhile
    with dist_cases.inline_job(chosen) as job:
        job.open()
        job.decompose(result[0])
    assert torch.equal(laplace_dist.load_posterior(str(tmp_path / "run"), dist_cases.convnet())(x), expected)
    assert laplace_dist.verify(str(tmp_path / "run")).ok


def test_one_factor_s_cannot_take_another_s_place(tmp_path, worth):
    dist_cases.run_inline(config(tmp_path / "run"))
    found = manifests(tmp_path / "run")
    found["0.weight/B"].write_bytes(found["4.weight/B"].read_bytes())
    with pytest.raises(CheckpointError, match=r"decompositions/\w+/\d+.json .* was written as"):
        laplace_dist.load_posterior(str(tmp_path / "run"), dist_cases.convnet())
    assert not laplace_dist.verify(str(tmp_path / "run")).ok


def test_a_deleted_run_s_do_not_count_and_fresh_deletes_them(tmp_path, worth):
    dist_cases.run_inline(config(tmp_path / "run"))
    assert manifests(tmp_path / "run")
    dist_cases.run_inline(config(tmp_path / "run", fresh=True, skip_tune=True, skip_evaluate=True))
    assert not manifests(tmp_path / "run")


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_small_and_diagonal_ones_are_left_to_whoever_needs_them(tmp_path, structure):
    store = Checkpoint(str(tmp_path / "run"))
    dist_cases.run_inline(config(tmp_path / "run", structure))
    assert not [key for key in store.list() if key.startswith("decompositions/")] and store.exists(CURRENT)


def test_a_factor_without_numbers_is_named(tmp_path):
    with dist_cases.inline_job(config(tmp_path / "run")) as job:
        job.open()
        spec = laplace_dist.run.posterior.SumsSpec.from_json(job.plan.spec)
    with pytest.raises(ValueError, match=r"factor '4.weight/B' \(3, 3\) holds NaN or Inf"):
        decompose(spec, "4.weight/B", torch.full((3, 3), torch.nan).double(), 5)


def test_known_decompositions_are_taken_by_name_and_once_for_shared_factors():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 9, dtype=torch.float64, generator=generator) for n in (3, 2))
    a, b = a @ a.T, b @ b.T
    kron = Kron([[b, a], [b]], [("B", "A"), ("B",)])
    known = {"B": tuple(torch.linalg.eigh(b))}
    assert kron.decompose(known=known).eigenvectors[1][0] is known["B"][1]
    torch.testing.assert_close(kron.decompose(known=known).to_matrix(), kron.to_matrix())


def test_the_task_says_what_it_is():
    assert Decompose("p", "v", ("a",)).what == "eigendecomposition of a"
