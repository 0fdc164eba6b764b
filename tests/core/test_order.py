"""The files that the suite begins with are there."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_the_files_that_are_begun_first_are_there(pytestconfig):
    [plugin] = [found for found in pytestconfig.pluginmanager.get_plugins() if hasattr(found, "LONGEST")]
    assert Path(plugin.__file__) == TESTS / "conftest.py"
    assert {*plugin.LONGEST} <= {path.stem for path in TESTS.rglob("test_*.py")}
