"""Whether a storage compares before it sets, which promotions need: found out before any work is done."""

from __future__ import annotations

import pytest

from laplace_dist.errors import SettingsError
from laplace_dist.run.checkpoint import Checkpoint


def test_a_directory_and_s3_are_taken_and_nothing_is_left(s3, tmp_path):
    for store in (Checkpoint(str(tmp_path)), Checkpoint(s3.url(), s3.options)):
        store.check_swaps()
        assert store.list() == []


def test_a_store_without_conditions_is_refused(tmp_path):
    store = Checkpoint("memory://conditions/run")
    with pytest.raises(SettingsError, match="cannot replace an object on the condition that it has not changed"):
        store.check_swaps()
    assert store.list() == []


def test_a_store_that_ignores_the_condition_is_refused(s3, monkeypatch):
    store = Checkpoint(s3.url(), s3.options)
    fs = store._fs.fs
    written = fs.pipe_file
    monkeypatch.setattr(fs, "pipe_file", lambda path, data, IfMatch=None, **how: written(path, data, **how))
    with pytest.raises(SettingsError, match="overwrote an object that was not as the request's If-Match says"):
        store.check_swaps()
    assert store.list() == []
