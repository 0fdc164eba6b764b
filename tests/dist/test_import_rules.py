"""Which module may import what, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("laplace", "laplace_dist") for path in (ROOT / package).rglob("*.py"))
PACKAGE = ROOT / "laplace_dist"
# In the order in which a run meets them: a folder imports from those before it only.
FOLDERS = ("config", "data", "plan", "storage", "run", "stages", "execution", "report", "testing", "demo")
ALLOWED = {
    "ray": ("laplace_dist/execution/",),
    "zarr": ("laplace_dist/storage/", "laplace_dist/data/", "laplace_dist/testing/"),
    "fsspec": ("laplace_dist/storage/", "laplace_dist/data/"),
    "pyarrow": ("laplace_dist/data/",),
    "datasets": ("laplace_dist/data/hugging_face.py",),
    "laplace_dist": ("laplace_dist/",),
}


@cache
def nodes_of(source: str) -> list[ast.AST]:
    """Return all that a source consists of; every rule asks for that."""
    return list(ast.walk(ast.parse(source)))


@cache
def imported(source: str) -> set[str]:
    """Return the top-level packages that a source imports, wherever in it, by statement or by name."""
    found = set()
    for node in nodes_of(source):
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
    assert [user for user in users if not user.startswith(ALLOWED[package])] == []
    assert users, f"nothing imports {package}: the rule is out of date"


def modules_of(source: str) -> set[str]:
    """Return the modules of `laplace_dist` that a source imports, as far as it names them."""
    found = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("laplace_dist.a relative import")
    return {name for name in found if name.partition(".")[0] == "laplace_dist"}


def folder_of(module: str) -> str:
    """Return the first part below the package: a folder, or a module of the top."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_from_those_before_it(folder):
    before = {*FOLDERS[: FOLDERS.index(folder) + 1], "errors", "outages", "__version__"}
    for path in (PACKAGE / folder).rglob("*.py"):
        wrong = [module for module in modules_of(path.read_text()) if folder_of(module) not in before]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_every_folder_has_its_place_and_the_top_holds_thirteen_modules():
    inside = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert inside == set(FOLDERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {
        "__init__",
        "job",
        "fit_stages",
        "recalibration",
        "recalibration_windows",
        "planning",
        "cli",
        "cli_settings",
        "cli_readers",
        "cli_training",
        "marglik",
        "errors",
        "outages",
    }


def test_no_module_imports_itself_by_a_detour():
    """Imports inside functions count too: they hide circles, they do not break them."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    names = {name: path for name, path in names.items() if name.startswith("laplace_dist")}
    edges = {
        name: {
            next((m for m in (module, module.rpartition(".")[0]) if m in names), "")
            for module in modules_of(path.read_text())
        }
        - {"", name}
        for name, path in names.items()
    }
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges, f"a circle lies among {sorted(edges)}"


@pytest.mark.parametrize(
    "line", ["import ray", "from ray.util import x", "def f():\n import ray", "import_module('ray')"]
)
def test_the_rule_sees_every_form_of_import(line):
    assert "ray" in imported(line)


def test_the_jobs_package_contains_no_mathematics():
    forbidden = {"einsum", "linalg", "autograd", "eigh", "svd", "cholesky", "func"}
    for path in SOURCES:
        if "laplace_dist" in path.parts:
            names = {node.attr for node in nodes_of(path.read_text()) if isinstance(node, ast.Attribute)}
            assert not names & forbidden, path


def test_what_a_start_does_not_need_is_not_loaded():
    """Packages that take a tenth of a second and more, and are for one kind of storage, failure or backend."""
    code = "import sys, laplace; print(sorted(sys.modules)); import laplace_dist.cli; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    library, jobs = done.stdout.splitlines()
    for package in (
        "aiohttp",
        "botocore",
        "scipy",
        "ray",
        "sklearn",
        "curvlinops",
        "matplotlib",
        "torchmetrics",
        "transformers",
    ):
        assert f"'{package}'" not in library, package
        assert f"'{package}'" not in jobs, package
