"""Objects: create-only commits, nothing outside the checkpoint, no half-state, no secrets shown."""

from __future__ import annotations

import errno
import os
import pickle
import uuid
import zipfile
from types import SimpleNamespace

import dist_cases
import numpy as np
import pytest
import tenacity
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

import laplace_dist
from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError, StorageError
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.storage import local as local_disk
from laplace_dist.storage import object_store, retry
from laplace_dist.storage.retry import Patient


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Checkpoint(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def local(tmp_path):
    return Checkpoint(str(tmp_path / "run"))


# ------------------------------------------------------------------ objects


def test_objects_are_created_once_and_replaced_whole(store):
    assert not store.exists("a/b.json")
    assert store.create("a/b.json", b"one")
    assert not store.create("a/b.json", b"two")
    assert store.read("a/b.json") == b"one"
    store.replace("a/b.json", b"three")
    store.replace("a/c.json", b"new")
    assert (store.read("a/b.json"), store.read("a/c.json"), store.size("a/b.json")) == (b"three", b"new", 5)
    assert store.exists("a/b.json")
    assert not store.exists("a")


def test_listing_and_deleting(store):
    for key in ("p/1.json", "p/1/x", "p/1/y/z", "pp/2", "top"):
        store.create(key, b"")
    assert store.list() == ["p/1.json", "p/1/x", "p/1/y/z", "pp/2", "top"]
    assert store.list("p") == ["p/1.json", "p/1/x", "p/1/y/z"]
    assert store.list("p", recursive=False) == ["p/1.json"]
    assert store.list("none") == []
    assert dict(store.read_many(["top", "p/1/x"])) == {"top": b"", "p/1/x": b""}
    store.delete_tree("p/1")
    store.delete_tree("p/none")
    assert store.list("p") == ["p/1.json"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EIO, "broken")])
def test_a_directory_that_cannot_be_listed_is_an_error_and_not_empty(local, monkeypatch, error):
    """Whoever lists would take what is in it for missing."""
    for key in ("p/1.json", "p/1/x", "q"):
        local.create(key, b"")
    scandir = os.scandir

    def broken(path):
        if os.fspath(path).endswith("/p/1"):
            raise error
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    for call in (local.list, local.modified, lambda: local.list("p"), lambda: local._flush("p")):
        with pytest.raises((SettingsError, StorageError), match=error.strerror):
            call()
    assert local.list("p", recursive=False) == ["p/1.json"]
    assert local.list("q") == local.list("none") == []


def test_what_goes_while_it_is_listed_is_not_listed(local, monkeypatch):
    for key in ("p/1.json", "q/x"):
        local.create(key, b"")
    lstat, scandir = os.lstat, os.scandir

    def late(path, *, dir_fd=None):
        local.delete_tree("p/1.json")
        return lstat(path)

    monkeypatch.setattr(local_disk, "os", SimpleNamespace(**{**vars(os), "lstat": late}))
    assert list(local.modified()) == ["q/x"]
    monkeypatch.undo()

    def gone(path):
        local.delete_tree("q")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", lambda path: gone(path) if str(path).endswith("/q") else scandir(path))
    assert local.list() == []


def test_a_missing_object_is_named_with_what_to_do(store):
    store.check_writable()
    for call in (store.read, store.size, lambda key: list(store.read_many([key, key]))):
        with pytest.raises(MissingObjectError, match=r"partials/000001.json is missing.*delete partials/000001.json"):
            call("partials/000001.json")


def test_a_relative_directory_is_a_url_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpoint("./runs/x/").create("k", b"v")
    assert Checkpoint(f"file://{tmp_path}/runs/x").read("k") == b"v"
    assert sorted(os.listdir(tmp_path / "runs" / "x")) == ["k"]


def test_a_commit_is_flushed_before_it_is_linked_and_its_directory_after(local, monkeypatch):
    local.check_writable()
    events, fsync, link = [], os.fsync, os.link

    def traced_fsync(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def traced_link(source, target):
        events.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "link", traced_link)
    local.create("m.json", b"x")
    assert events[0].startswith(".tmp-")
    assert events[1:] == ["link", "run"]


def test_arrays_are_flushed_with_all_their_directories(local, monkeypatch):
    seen, fsync = set(), os.fsync

    def traced(handle):
        seen.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", traced)
    local.write_arrays("p/1", {"a/b": np.ones(2)})
    written = {os.path.join(top, name) for top, folders, files in os.walk(local.url) for name in folders + files}
    assert len(written) >= 6
    assert written | {local.url, os.path.dirname(local.url)} <= seen


@pytest.mark.parametrize("place", ["file/run", "file", "proc"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    url = "/proc/nowhere/run" if place == "proc" else str(tmp_path / place)
    with pytest.raises(SettingsError, match=r"--checkpoint .*cannot write .*may write to"):
        Checkpoint(url).check_writable()


def test_a_file_system_without_create_only_writes_is_refused(tmp_path):
    zipfile.ZipFile(tmp_path / "x.zip", "w").close()
    with pytest.raises(SettingsError, match=r"--checkpoint 'zip.*has no create-only write.*s3://"):
        Checkpoint("zip://run", {"fo": f"{tmp_path}/x.zip"}).check_writable()


@pytest.mark.parametrize("protocol", ["http", "https"])
def test_a_web_server_is_refused_by_name_and_not_asked(protocol, monkeypatch):
    """Before a request is sent, and before model or data are loaded."""
    monkeypatch.setattr("laplace_dist.data.sources.load_split", None)
    url = f"{protocol}://127.0.0.1:9/run"
    for call in (Checkpoint(url).check_writable, lambda: dist_cases.run_inline(dist_cases.config(url))):
        with pytest.raises(SettingsError, match=f"--checkpoint '{url}': a web server cannot be written to.*s3://"):
            call()


def test_a_remote_file_system_that_only_reads_is_refused():
    with pytest.raises(SettingsError, match=r"--checkpoint 'reference://x': .*has no create-only write"):
        object_store._check_creates(ReadsOnly(), "reference://x")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_said_to_be_that(local, monkeypatch, number):
    """FAT answers EPERM, which elsewhere means that one may not write."""

    def link(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(
        SettingsError, match=r"has no hard links, which commits need: use another directory or an object"
    ) as caught:
        local.check_writable()
    assert local.url in str(caught.value) and "cannot write" not in str(caught.value)
    assert os.listdir(local.url) == []


AMBIGUOUS = [
    "s3://bucket/a//b",
    "s3://bucket//a",
    "s3://bucket/./a",
    "s3://bucket/a/..",
    "memory://a/../b",
    "s3://",
    "s3:///a",
]


@pytest.mark.parametrize("url", [*AMBIGUOUS, "s3://bucket/run?versionId=3"])
def test_a_url_that_names_no_one_place_is_refused(url):
    calls = (
        Checkpoint,
        laplace_dist.verify,
        laplace_dist.status,
        lambda u: dist_cases.run_inline(dist_cases.config(u)),
    )
    for call in calls:
        with pytest.raises(SettingsError, match="expected parts joined by single slashes") as caught:
            call(url)
        assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["simplecache::memory://x/run", "filecache::s3://b/run", "zip://run::file:///x.zip"])
def test_a_chain_of_file_systems_is_refused(url):
    with pytest.raises(SettingsError, match="a chain of file systems; .* Give the URL at its end alone"):
        Checkpoint(url)


def test_slashes_at_the_end_of_a_url_change_nothing():
    url = f"memory://{uuid.uuid4().hex}/run"
    Checkpoint(f"{url}//").create("k", b"v")
    assert Checkpoint(url).read("k") == b"v"


@pytest.mark.parametrize(
    "spelling", ["{}//run", "{}/./run/.", "{}/run/../run", "{}/link/../run", "file://{}//run", "/{}/run"]
)
def test_a_local_path_means_what_the_operating_system_takes_it_for(tmp_path, spelling):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    store = Checkpoint(spelling.format(tmp_path))
    store.create("a/k", b"v")
    where = tmp_path / "elsewhere" if "link" in spelling else tmp_path
    assert (where / "run" / "a" / "k").read_bytes() == b"v"
    assert store.list() == store.list("a", recursive=False) == list(store.modified()) == ["a/k"]
    assert store.entries() == ["a/"]


def test_an_unknown_protocol_is_refused():
    with pytest.raises(SettingsError, match=r"--checkpoint 'nosuch://x/y': cannot be opened"):
        Checkpoint("nosuch://x/y").check_writable()


def test_a_name_that_is_too_long_for_the_file_system_is_refused(tmp_path):
    for call in (lambda store: store.read("plan.json"), lambda store: store.create("plan.json", b"")):
        with pytest.raises(SettingsError, match=r"--checkpoint .*: a name there is too long .* Give a shorter one"):
            call(Checkpoint(str(tmp_path / ("x" * 300))))


BAD_KEYS = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\\b", "a\nb", "a/"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_no_key_leaves_the_checkpoint(local, key):
    calls = [local.read, local.exists, local.size, local.delete_tree]
    calls += [lambda k: local.create(k, b""), lambda k: local.replace(k, b"")]
    calls += [lambda k: local.read_array("p", k, {}), lambda k: local.write_arrays("p", {k: np.ones(1)})]
    for call in calls:
        with pytest.raises(CheckpointError, match="not a key inside the checkpoint"):
            call(key)


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b/c", "a/b"], ["zarr.json"], ["__x/a"], ["a/..."], ["x" * 256]])
def test_names_that_zarr_cannot_hold_are_refused(local, names):
    with pytest.raises(CheckpointError, match="factor name"):
        local.write_arrays("p", {name: np.ones(1) for name in names})
    assert local.list() == []


# ------------------------------------------------------------------ object stores


class ReadsOnly(AsyncFileSystem):
    """Inherits the asynchronous write that only raises."""

    protocol, cachable = "readsonly", False


class Scripted(MemoryFileSystem):
    """A file system in memory whose conditional writes answer as scripted, before or after they have their effect."""

    store, pseudo_dirs, cachable = {}, [""], False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if mode == "create" and self.script:
            stored, error = self.script.pop(0)
            if stored is not None:
                super().pipe_file(path, stored)
            raise error
        super().pipe_file(path, value, mode=mode)


CONFLICT = OSError(errno.EIO, "ConditionalRequestConflict")
ANSWERS = [
    ("own write met by its retry", [(b"mine", FileExistsError())], True),
    ("own write, answer lost", [(b"mine", TimeoutError())], True),
    ("other's write", [(b"other", FileExistsError())], False),
    ("other's write, unnamed precondition", [(b"other", OSError(errno.EINVAL, "PreconditionFailed"))], False),
    ("conflict, then free", [(None, CONFLICT), (None, CONFLICT)], True),
    ("conflict, then other's", [(None, CONFLICT), (b"other", CONFLICT)], False),
]


@pytest.mark.parametrize(("script", "created"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
def test_what_is_stored_decides_who_created(monkeypatch, script, created):
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    store = Checkpoint("memory://scripted")
    fs = Scripted()
    fs.store, fs.script = {}, list(script)
    store._opened = Patient(fs, str), "/scripted"
    assert store.create("m", b"mine") is created
    assert store.read("m") == (b"mine" if created else b"other")
    assert fs.script == []


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (PermissionError("denied for sekrit-key"), SettingsError, "cannot write 'm'"),
        (FileNotFoundError("no bucket sekrit-key"), SettingsError, "cannot write 'm'"),
        (OSError(errno.EIO, "always sekrit-key"), CheckpointError, "could not write it"),
    ],
)
def test_a_store_that_refuses_is_reported_without_secrets(monkeypatch, error, expected, words):
    monkeypatch.setattr(retry, "PATIENCE", 0.2)
    options = {"client_kwargs": {"key": "sekrit-key"}}
    store = Checkpoint("memory://scripted", options)
    fs = Scripted()
    fs.store, fs.script = {}, [(None, error)] * 99
    store._opened = Patient(fs, lambda text: object_store.scrub(text, options)), "/scripted"
    with pytest.raises(expected, match=words) as caught:
        store.create("m", b"mine")
    assert "sekrit" not in str(caught.value)
    assert "***" in str(caught.value)
    assert caught.value.__cause__ is None
    assert "sekrit" not in repr(store)


def test_a_pickled_store_opens_for_itself():
    store = Checkpoint("memory://pickled", {"key": "abc"})
    store.exists("x")
    again = pickle.loads(pickle.dumps(store))
    assert again._opened is None
    assert (again.url, again._options) == (store.url, store._options)


# ------------------------------------------------------------------ no space left


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_state(local, monkeypatch, code):
    local.create("old.json", b"old")

    def full(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    for call in (lambda: local.create("new.json", b"new"), lambda: local.replace("old.json", b"newer")):
        with pytest.raises(RunFailed, match=r"json: no space left.*nothing of it is committed.*Run the same command"):
            call()
    with pytest.raises(RunFailed, match="no space left"):
        local.write_arrays("p", {"x": np.ones(3)})
    monkeypatch.undo()
    assert [key for key in local.list() if not key.startswith("p/")] == ["old.json"]
    assert local.read("old.json") == b"old"
    assert not any(name.startswith(".tmp-") for name in os.listdir(local.url))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30))
def test_a_crash_at_any_moment_of_a_commit_shows_nothing_or_all(tmp_path_factory, step):
    store = Checkpoint(str(tmp_path_factory.mktemp("crash") / "run"))
    calls = {"n": 0}

    class Crash(BaseException):
        pass

    def crashing(original):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == step:
                raise Crash
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "link", "unlink", "open", "makedirs"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        try:
            store.create("a/m.json", b"whole")
            finished = True
        except Crash:
            finished = False
    assert not finished or store.list() == ["a/m.json"]
    assert store.list() in ([], ["a/m.json"])
    assert all(store.read(key) == b"whole" for key in store.list())
