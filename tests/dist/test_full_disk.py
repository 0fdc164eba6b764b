"""A disk that fills up, or is read-only, at any stage of a run: an error that says so, nothing half, then the same bytes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import dist_cases
import pytest
from storage_cases import SMALL, recorded_run, repeated
from test_integrity import facts

import laplace_dist
from laplace_dist import fit, load_posterior
from laplace_dist.cli import main
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.job import evaluate_posterior, tune_posterior
from laplace_dist.run import settings_file
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.map import MapSegment
from laplace_dist.storage import local, store


class Disk:
    """Takes the place of `open` where objects are written; the `full_at`-th write and all later ones find no space.

    Attributes:
        writes: What each write was for, the attempts' ids left out.
    """

    def __init__(self, monkeypatch, full_at=0, code=errno.ENOSPC):
        self.full_at, self.code, self.writes = full_at, code, []
        monkeypatch.setattr(store, "open", self.open, raising=False)
        monkeypatch.setattr(local, "open", self.open, raising=False)
        link, replace = os.link, os.replace
        self.pending = ""
        monkeypatch.setattr(local.os, "link", lambda a, b: self.place(b) or link(a, b))
        monkeypatch.setattr(local.os, "replace", lambda a, b: self.place(b) or replace(a, b))

    def place(self, path):
        """Note where the temporary file that was written last has gone."""
        self.writes[-1] = self.kind(path)

    @staticmethod
    def kind(path):
        name = re.sub(r".*/run/", "", str(path))
        kind = "chunk" if re.search("/c(/|$)", name) else name.rpartition("/")[2] if "zarr.json" in name else "manifest"
        return "probe" if name.startswith("probe-") else f"{name.split('/')[0]} {kind}"

    def open(self, path, mode):
        file = open(path, mode)  # noqa: SIM115 - the caller closes it
        if "x" in mode:
            write = file.write
            self.writes.append(self.kind(path))

            def write_or_fail(data):
                if self.full_at and len(self.writes) >= self.full_at:
                    write(data[: len(data) // 2])
                    raise OSError(self.code, os.strerror(self.code))
                return write(data)

            file = _File(file, write_or_fail)
        return file


class _File:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def attempt(url):
    return recorded_run(dist_cases.config(url, **SMALL))


def test_a_disk_that_fills_up_at_any_stage_stops_the_run_and_nothing_is_half_committed(tmp_path, monkeypatch):
    """At every write: of plan, weights, settings, arrays and manifests of all stages; of alike ones at the first and the last."""
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        attempt(tmp_path / "whole" / "run")
    expected = facts(tmp_path / "whole" / "run")
    kinds = set(disk.writes)
    assert kinds >= {"probe", "plan.json manifest", "weights.safetensors manifest", "config.yaml manifest"}
    assert kinds >= {f"{folder} chunk" for folder in ("partials", "posteriors", "tuning", "evaluation")}
    assert kinds >= {
        f"{folder} manifest" for folder in ("partials", "posteriors", "tuning", "evaluation", "CURRENT.json")
    }
    seen, middle = set(), repeated(disk.writes)
    for at in (at for at in range(1, len(disk.writes) + 1) if at - 1 not in middle):
        url = tmp_path / str(at) / "run"
        with monkeypatch.context() as patch:
            full = Disk(patch, at)
            if all(kind.startswith("status") for kind in disk.writes[at - 1 :]):
                attempt(url)  # the record of a job that has ended: nothing depends on it
                continue
            with pytest.raises(RunFailed, match=r"no space left on the device.*Free some space.*Run the same command"):
                attempt(url)
            assert full.writes[at - 1 :], disk.writes[at - 1]
        if (url / "plan.json").exists():
            assert laplace_dist.verify(str(url)).problems == [], disk.writes[at - 1]
        assert not list(url.rglob(".tmp-*"))
        before = {path.stem for path in url.glob("partials/*.json")}
        _, pool = attempt(url)
        again = {task.segment.id for task in pool.done(MapSegment)}
        assert again == {f"{i:06d}" for i in range(2)} - before, "what was committed is not done again"
        seen.add(len(before))
        assert facts(url) == expected, disk.writes[at - 1]
        shutil.rmtree(url)
    assert seen == {0, 1, 2}


def tune_again(url):
    """Tune a finished run with other settings."""
    tune_posterior(dist_cases.config(url, **{**SMALL, "grid_size": 5}))


@pytest.fixture
def open_folder():
    """Return a folder that every user of the machine may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def asked(*_):
    raise AssertionError("a cluster was asked for")


@contextmanager
def reader_only(folder):
    """Take away the right to write from every file and directory, and the rights of root from this process."""
    places = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in places}
    root = os.geteuid() == 0
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            (folder / "new").mkdir()
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_run_whose_directory_may_only_be_read_is_read_and_jobs_say_why_they_stop(open_folder, monkeypatch, capsys):
    """By the permissions of the file system, before any cluster is asked for."""
    url = open_folder / "run"
    attempt(url)
    kept = {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}
    expected = facts(url)
    with reader_only(open_folder):
        assert facts(url) == expected
        assert laplace_dist.verify(str(url)).ok
        assert laplace_dist.status(str(url))["complete"]
        load_posterior(str(url), dist_cases.convnet())
        monkeypatch.setattr(Cluster, "connect", asked)
        chosen = {**SMALL, "ray_address": "127.0.0.1:1", "gpus_per_worker": None}
        message = r"--checkpoint '.*': cannot write .*Permission denied.*may write to"
        for call in (
            lambda: fit(dist_cases.config(url, **chosen)),
            lambda: fit(dist_cases.config(open_folder / "new", **chosen)),
            lambda: tune_again(url),
            lambda: evaluate_posterior(dist_cases.config(url, **chosen, seed=1)),
        ):
            with pytest.raises(SettingsError, match=message):
                call()
        flags = ["--model=dist_cases:convnet", "--data=dist_cases:blobs", "--seed=1", "--ray-address=127.0.0.1:1"]
        for job in ("fit", "tune", "evaluate"):
            assert main(job, [*flags, f"--checkpoint={url}"]) == 2
            assert re.search(message, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in url.rglob("*") if path.is_file()} == kept
    assert list(open_folder.iterdir()) == [url]


def test_a_run_in_a_read_only_directory_can_be_read_and_says_why_it_does_not_go_on(tmp_path, monkeypatch):
    """As where the file system was mounted read-only after the run."""
    url = tmp_path / "run"
    attempt(url)
    kept = {key: Checkpoint(str(url)).read(key) for key in Checkpoint(str(url)).list()}
    expected = facts(url)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        Disk(patch, 1, errno.EROFS)
        for name in ("makedirs", "link", "replace", "unlink", "mkdir"):
            patch.setattr(os, name, refuse)
        assert facts(url) == expected
        assert laplace_dist.verify(str(url)).ok
        assert laplace_dist.status(str(url))["complete"]
        for call in (
            lambda: attempt(url),
            lambda: attempt(tmp_path / "new"),
            lambda: tune_again(url),
        ):
            with pytest.raises(
                SettingsError, match=r"--checkpoint '.*': cannot write .*Read-only file system.*may write"
            ):
                call()
    for path in [
        *url.rglob(".tmp-*"),
        *(path for path in url.glob("probe-*") if not path.suffix),
    ]:  # what the stand-in could not clean up
        path.unlink()
    assert {key: Checkpoint(str(url)).read(key) for key in Checkpoint(str(url)).list()} == kept
    assert not (tmp_path / "new").exists()


def test_loading_needs_no_write(tmp_path, monkeypatch):
    url = Path(tmp_path / "run")
    attempt(url)
    disk = Disk(monkeypatch)
    load_posterior(str(url), dist_cases.convnet())
    settings_file.read_config(Checkpoint(str(url)))
    assert disk.writes == []
