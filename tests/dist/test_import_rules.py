"""Which module may import what, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("laplace", "laplace_dist") for path in (ROOT / package).rglob("*.py"))
ALLOWED = {
    "ray": {"laplace_dist/cluster.py", "laplace_dist/pool.py"},
    "zarr": {"laplace_dist/arrays.py", "laplace_dist/data.py", "laplace_dist/conformance.py"},
    "fsspec": {"laplace_dist/store.py", "laplace_dist/remote.py", "laplace_dist/data.py"},
    "laplace_dist": {str(p.relative_to(ROOT)) for p in SOURCES if "laplace_dist" in p.parts},
}


def imported(source: str) -> set[str]:
    """Return the top-level packages that a source imports, wherever in it, by statement or by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {str(arg.value).partition(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_is_imported_only_where_the_rule_says(package):
    users = {str(path.relative_to(ROOT)) for path in SOURCES if package in imported(path.read_text())}
    assert users <= ALLOWED[package]
    assert users, f"nothing imports {package}: the rule is out of date"


@pytest.mark.parametrize(
    "line", ["import ray", "from ray.util import x", "def f():\n import ray", "import_module('ray')"]
)
def test_the_rule_sees_every_form_of_import(line):
    assert "ray" in imported(line)


def test_the_jobs_package_contains_no_mathematics():
    forbidden = {"einsum", "linalg", "autograd", "eigh", "svd", "cholesky", "func"}
    for path in SOURCES:
        if "laplace_dist" in path.parts:
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not names & forbidden, path
