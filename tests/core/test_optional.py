"""Optional packages cost their own backend and nothing else; another package of the same name is said at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import laplace
import laplace.curvature
from laplace import Laplace, _clash
from laplace.backends.optional import import_optional
from laplace.curvature import backend_class, backend_names

from .models import CASES, loader

ROOT = Path(laplace.__file__).resolve().parents[1]
PACKAGES = {
    "asdl": ("asdfghjkl==0.1a4", "AsdlGGN", ("asdl",)),
    "backpack": ("backpack-for-pytorch", "BackPackGGN", ("backpack",)),
    "curvlinops": ("curvlinops-for-pytorch", "CurvlinopsGGN", ("curvlinops", "backpack")),
}


def forget(monkeypatch, *names):
    """Take modules and all that imported them out of the cache until the end of the test."""
    ours = [f"laplace.{folder}.{name}" for folder in ("backends", "curvature") for name in (*names, "asdfghjkl")]
    for module in list(sys.modules):
        if module.partition(".")[0] in names or module in ours:
            monkeypatch.delitem(sys.modules, module)


def fake(monkeypatch, folder, name, source):
    """A package of that name, first on the path."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(folder)


def check_the_rest_works():
    model, x, y = CASES["mlp"].make()
    for structure in ("kron", "lowrank"):
        la = Laplace(model, "classification", "all", structure)
        la.fit(loader(x, y))
        assert bool(torch.isfinite(la(x)).all())


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_what_to_install(name, monkeypatch):
    distribution, cls, modules = PACKAGES[name]
    forget(monkeypatch, *modules)
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"The {name} backend needs the package {distribution}. pip install 'laplace-dist\[{name}\]'. All other"
    with pytest.raises(ImportError, match=message):
        backend_class(name)
    with pytest.raises(ImportError, match=message):
        getattr(laplace.curvature, cls)
    check_the_rest_works()


BROKEN = {
    "RuntimeError('operator torchvision::nms does not exist')": "install torch and torchvision together, from one index",
    "AttributeError('module numpy has no attribute float')": "installed, but broken; reinstall it.*no attribute float",
    "OSError('libcudart.so.11: cannot open shared object file')": "installed, but broken.*libcudart",
    "ImportError('cannot import name vmap')": "installed, but broken.*cannot import name vmap",
    "ModuleNotFoundError(\"No module named 'einops'\", name='einops')": "installed, but broken.*einops",
    "ValueError('numpy.dtype size changed')": "installed, but broken.*dtype size changed",
}


@pytest.mark.parametrize("error", BROKEN)
@pytest.mark.parametrize("name", PACKAGES)
def test_a_broken_package_is_named_with_how_to_mend_it(name, error, monkeypatch, tmp_path):
    forget(monkeypatch, *PACKAGES[name][2])
    fake(monkeypatch, tmp_path, name, f"raise {error}\n")
    with pytest.raises(ImportError, match=f"The {name} backend needs.*{BROKEN[error]}"):
        backend_class(name)
    others = set(PACKAGES) - {name} - ({"curvlinops"} if name == "backpack" else set())
    for other in others:
        backend_class(other)
    check_the_rest_works()


def test_torchvision_of_another_build_breaks_what_imports_it_and_both_say_so(monkeypatch, tmp_path):
    """As releases of curvlinops did that import BackPACK, and of BackPACK that import torchvision."""
    forget(monkeypatch, "curvlinops", "backpack", "torchvision")
    fake(monkeypatch, tmp_path, "curvlinops", "import backpack\n")
    fake(monkeypatch, tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    fake(monkeypatch, tmp_path, "backpack", "import torchvision\n")
    for name in ("backpack", "curvlinops"):
        with pytest.raises(ImportError, match=f"The {name} backend.*install torch and torchvision together"):
            backend_class(name)
    backend_class("asdl")
    check_the_rest_works()


def test_interruptions_pass(monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path, "interrupted", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        import_optional("interrupted", "interrupted", "interrupted")


def python(code, *path, check=True):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command, folder = [sys.executable, "-c", code], path[0]  # the working directory comes first on the path
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_import_laplace_imports_no_optional_package():
    code = "import sys, laplace, laplace.curvature; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = eval(python(code, ROOT).stdout)
    assert "laplace" in loaded
    assert not {"asdl", "backpack", "curvlinops", "torchvision", "hypothesis", "ray"} & set(loaded)


def test_every_public_name_is_found_where_it_is_said_to_be():
    assert backend_names() == ["native", "curvlinops", "asdl", "backpack"]
    for name in laplace.curvature.__all__:
        assert getattr(laplace.curvature, name) is not None
    for name in backend_names():
        for estimator in ("ggn", "mc", "ef"):
            cls, kwargs = backend_class(name, estimator)
            assert cls(CASES["mlp"].make()[0], "classification", **kwargs).stochastic == (estimator == "mc")
    with pytest.raises(AttributeError, match="no attribute 'AsdlDiag'"):
        _ = laplace.curvature.AsdlDiag


class Distribution:
    version = "0.3"

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, name):
        return self.folder / name


def test_laplace_torch_in_the_same_folder_is_an_error(monkeypatch):
    asked = []
    monkeypatch.setattr(metadata, "distribution", lambda name: asked.append(name) or Distribution(ROOT))
    message = "laplace-dist and laplace-torch 0.3 are both installed in .*pip uninstall laplace-torch && pip install"
    with pytest.raises(ImportError, match=message):
        _clash.check()
    assert asked == ["laplace-torch"]


def test_laplace_torch_elsewhere_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(tmp_path))
    with pytest.warns(
        UserWarning, match="shares the import name 'laplace'.*comes first on the path. Run: pip uninstall"
    ):
        _clash.check()


def test_the_clash_is_said_by_the_import_itself(tmp_path):
    """With metadata as pip writes it, and a folder that is this package."""
    (tmp_path / "laplace_torch-0.3.dist-info").mkdir()
    (tmp_path / "laplace_torch-0.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: laplace-torch\nVersion: 0.3\n"
    )
    elsewhere = python("import laplace._clash", ROOT, tmp_path)
    assert "UserWarning: laplace-torch 0.3 is installed in" in elsewhere.stderr
    (tmp_path / "laplace").symlink_to(ROOT / "laplace")
    same = python("import laplace", tmp_path, check=False)
    assert same.returncode == 1
    assert "ImportError: laplace-dist and laplace-torch 0.3 are both installed in" in same.stderr
    assert "Warning" not in python("import laplace._clash", ROOT).stderr


LEFT = [
    "laplace.tuning",
    "laplace.errors",
    "laplace.structures.sums",
    "laplace.transforms",
    "laplace_dist.execution.worker",
]


def test_laplace_torch_installed_later_is_found_by_what_it_leaves(tmp_path):
    """It has replaced ``__init__`` and whatever else has the same name; the other modules are still this package's."""
    (tmp_path / "laplace_torch-0.3.dist-info").mkdir()
    (tmp_path / "laplace_torch-0.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: laplace-torch\nVersion: 0.3\n"
    )
    shutil.copytree(ROOT / "laplace", tmp_path / "laplace", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "laplace_dist").symlink_to(ROOT / "laplace_dist")
    for name in ("__init__.py", "curvature/__init__.py", "utils/__init__.py", "laplace.py", "utils/enums.py"):
        (tmp_path / "laplace" / name).write_text("Laplace = 'of laplace-torch'\n")
    code = f"""
import importlib, laplace
print(laplace.Laplace)
for name in {LEFT}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""
    said = python(code, tmp_path).stdout.splitlines()
    assert said[0] == "of laplace-torch"
    for name, line in zip(LEFT, said[1:], strict=True):
        assert line.startswith(f"{name} laplace-dist and laplace-torch 0.3 are both installed in")
        assert "pip uninstall laplace-torch && pip install --force-reinstall" in line
