"""Which module of the core library may import which, read from the sources; the picture is in docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "laplace"
# From what knows least to what knows most: a folder or file imports from those before it, and within its own folder.
PLACES = (
    "_clash",
    "errors",
    "enums",
    "noise",
    "data",
    "linalg",
    "likelihoods",
    "capture",
    "structures",
    "backends",
    "prior",
    "fitted",
    "predictive",
    "evidence",
    "search",
    "interpolation",
    "scoring",
    "temperature",
    "prior_search",
    "tuning",
    "renaming",
    "state",
    "posterior",
    "subsets",
    "laplace",
    "drift",
    "empirical_bayes",
    "marglik_training",
    "backends.conformance",  # tests to inherit, which fit whole posteriors
    "transforms",
    *("baselaplace", "lllaplace", "subnetlaplace", "curvature", "utils"),  # public paths, re-exports only
)
PUBLIC_PATHS = ("baselaplace", "lllaplace", "subnetlaplace", "curvature", "utils")


def name_of(path: Path) -> str:
    """Return a module's name below the package; the package itself has none."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source: str) -> set[str]:
    """Return the modules that a source imports, anywhere in it: in functions, for type checkers and by a name in a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("laplace.") in MODULES else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    found = {name.removeprefix("laplace.") for name in found if name.startswith("laplace.")}
    return found & MODULES.keys()


def place_of(module: str) -> int:
    """Return the number of the place that a module belongs to: its own, or that of its folder."""
    return PLACES.index(module if module in PLACES else module.partition(".")[0])


def against_the_order(module: str, source: str) -> list[str]:
    """Return the imports of a module that come after it."""
    return sorted(other for other in imports_of(source) if place_of(other) > place_of(module))


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_a_module_imports_only_from_places_before_its_own(module):
    assert against_the_order(module, MODULES[module].read_text()) == []


def test_every_folder_and_file_has_a_place():
    places = {name.partition(".")[0] for name in MODULES if name}
    assert places == {place for place in PLACES if "." not in place}
    assert set(PLACES) <= MODULES.keys()


def test_no_module_imports_itself_by_a_detour():
    edges = {name: imports_of(path.read_text()) - {name} for name, path in MODULES.items() if name}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges, f"a circle lies among {sorted(edges)}"


@pytest.mark.parametrize(
    "line",
    [
        "import laplace.posterior.full",
        "from laplace.posterior.full import FullLaplace",
        "from laplace.posterior import full",
        "def f():\n from laplace.posterior import full",
        "if TYPE_CHECKING:\n from laplace.posterior.full import FullLaplace",
        "importlib.import_module('laplace.posterior.full')",
    ],
)
def test_the_rule_sees_every_form_of_import(line):
    assert against_the_order("predictive", line) == ["posterior.full"]
    assert against_the_order("subsets.masks", line) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.partition(".")[0] in PUBLIC_PATHS])
def test_public_paths_hold_nothing_of_their_own(module):
    """But for imports on first use; whoever looks for behaviour finds it elsewhere."""
    tree = ast.parse(MODULES[module].read_text())
    own = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert [node.name for node in own if node.name != "__getattr__"] == []
