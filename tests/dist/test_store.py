"""Objects and arrays: create-only commits, every bad byte noticed, nothing outside the checkpoint, no secrets shown."""

from __future__ import annotations

import errno
import os
import pickle
import uuid
import zipfile
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import dist_cases
import numpy as np
import pytest
import tenacity
import zarr
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec

import laplace_dist
from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError, StorageError
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.storage import arrays, chunks, object_store, retry, triangles
from laplace_dist.storage import local as local_disk
from laplace_dist.storage.pieces import Ahead, Piece, in_order
from laplace_dist.storage.retry import Patient
from laplace_dist.storage.triangles import mirror, pack, unpack

ARRAYS = {
    "features.0.weight/A": np.array([[2.0, 1.0], [1.0, 3.0]], np.float32),
    "features.0.weight/B": np.arange(6, dtype=np.float64).reshape(2, 3),
    "H": np.zeros((4, 4), np.float32),
    "loss": np.array(1.5),
    "nothing": np.empty((0, 3), np.float32),
}
SYMMETRIC = {"features.0.weight/A", "H"}


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Checkpoint(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def local(tmp_path):
    return Checkpoint(str(tmp_path / "run"))


# ------------------------------------------------------------------ triangles


def symmetric(seed, shape, dtype):
    value = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return value + value.swapaxes(-1, -2)


@given(
    seed=st.integers(0, 99),
    size=st.integers(0, 12),
    cuts=st.lists(st.integers(0, 78), max_size=4),
    block=st.integers(1, 14),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_packing_a_symmetric_matrix_in_any_parts_loses_nothing(seed, size, cuts, block, dtype):
    value = symmetric(seed, (size, size), dtype)
    total = size * (size + 1) // 2
    edges = sorted({0, total, *(min(cut, total) for cut in cuts)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triangles, "_BLOCK", block)
        parts = {start: pack(value, start, stop) for start, stop in pairwise([*edges, total])}
        back = np.full_like(value, np.nan)
        for start, part in parts.items():
            assert part.dtype == value.dtype
            unpack(back, start, part)
        mirror(back)
    assert back.tobytes() == value.tobytes()
    whole = np.concatenate([parts[start] for start in edges if len(parts[start])] or [np.empty(0, dtype)])
    assert np.array_equal(whole, value[np.tril_indices(size)])


def laid_out(value, layout):
    """Return the same numbers in another memory layout."""
    if layout == "F":
        return np.asfortranarray(value)
    if layout == "strided":
        wide = np.full([2 * n for n in value.shape], np.nan, value.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        view[...] = value
        return view
    if layout == "reversed":
        return np.ascontiguousarray(value[::-1, ::-1])[::-1, ::-1]
    if layout == "transposed":
        return np.ascontiguousarray(value.T).T
    return value.copy()


LAYOUTS = ["C", "F", "strided", "reversed", "transposed"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packing_never_writes_to_its_input(size, dtype, layout):
    """At sizes around the block's edges: there a block of one row or column is its own transpose's memory."""
    value = symmetric(0, (size, size), dtype)
    given = laid_out(value, layout)
    given.flags.writeable = False
    packed = pack(given, 0, size * (size + 1) // 2)
    assert np.array_equal(packed, value[np.tril_indices(size)])
    assert np.array_equal(given, value)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.one_of(
        st.tuples(st.integers(1, 70)).map(lambda s: (s[0], s[0])),
        st.tuples(st.integers(0, 3), st.integers(1, 5)).map(lambda s: (s[0], s[1], s[1])),
        st.lists(st.integers(0, 6), max_size=3).map(tuple),
    ),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([np.float32, np.float64]),
    rows=st.integers(1, 400),
)
def test_what_is_stored_and_read_is_what_was_given(seed, shape, layout, dtype, rows):
    """Pack, store, read, unpack is the identity for every shape, layout and cut into chunks, and the input stays."""
    square = len(shape) >= 2 and shape[-1] == shape[-2]
    value = np.asarray(symmetric(seed, shape, dtype) if square else np.random.default_rng(seed).random(shape), dtype)
    given = laid_out(value, layout if len(shape) == 2 else "C")
    given.flags.writeable = False
    store = Checkpoint(f"memory://{uuid.uuid4().hex}/run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", rows * np.dtype(dtype).itemsize)
        entry = store.write_arrays("a", {"x": given}, {"x"} if square else set())["x"]
    back = store.read_array("a", "x", entry)
    assert back.dtype == value.dtype and back.shape == value.shape
    assert np.array_equal(back, value) and np.array_equal(given, value)


def test_packing_symmetrises_rounding_and_refuses_more():
    value = np.array([[1.0, 2.0], [2.03125, 5.0]])
    assert pack(value, 0, 3).tolist() == [1.0, 2.015625, 5.0]
    with pytest.raises(AssertionError, match="declared symmetric is not"):
        pack(np.array([[1.0, 2.0], [3.0, 4.0]]), 0, 3)


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
        Checkpoint(f"zip://run::{tmp_path}/x.zip").check_writable()


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


# ------------------------------------------------------------------ arrays


def test_arrays_come_back_bit_for_bit(store):
    entries = store.write_arrays("p/0/a", ARRAYS, SYMMETRIC)
    for name, value in ARRAYS.items():
        back = store.read_array("p/0/a", name, entries[name])
        assert (back.dtype, back.shape, back.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert {name for name, entry in entries.items() if entry["packed"]} == SYMMETRIC
    stored = sum(store.size(k) for k in store.list("p/0/a/H"))
    assert entries["H"]["stored_bytes"] == stored


def test_a_chunk_that_equals_the_fill_value_is_written(local):
    entries = local.write_arrays("p", {"x": np.full(3, np.nan)})
    assert local.exists("p/x/c/0")
    assert np.isnan(local.read_array("p", "x", entries["x"])).all()


def test_arrays_of_several_chunks_come_back(store, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 64)
    given = {"flat": np.arange(100.0), "rows": np.arange(60, dtype=np.float32).reshape(20, 3, 1), "s": np.eye(9)}
    given["groups"] = symmetric(0, (5, 1, 3, 3), np.float32)
    entries = store.write_arrays("p", given, {"s", "groups"})
    assert [len([k for k in store.list("p") if k.startswith(f"p/{n}/c/")]) for n in ("s", "groups")] == [6, 3]
    assert sum(key.startswith("p/flat/c/") for key in store.list("p")) == 13
    for name, value in given.items():
        assert np.array_equal(store.read_array("p", name, entries[name]), value)


def test_arrays_are_plain_zarr(local):
    local.write_arrays("p/0", ARRAYS, SYMMETRIC)
    group = zarr.open_group(f"{local.url}/p/0", mode="r")
    assert sorted(group.keys()) == ["H", "features.0.weight", "loss", "nothing"]
    assert sorted(group["features.0.weight"].keys()) == ["A", "B"]
    assert group["features.0.weight/A"][:].tolist() == [2.0, 1.0, 3.0]
    assert "triangle" in group["features.0.weight/A"].attrs["packed"]
    assert group["loss"][()] == 1.5
    metadata = group["H"].metadata
    names = [codec["name"] for codec in metadata.to_dict()["codecs"]]
    assert names == ["bytes", "blosc", "crc32c"]
    blosc = metadata.to_dict()["codecs"][1]["configuration"]
    assert (blosc["cname"], blosc["clevel"], blosc["shuffle"]) == ("zstd", 1, "bitshuffle")
    assert np.isnan(metadata.fill_value)
    assert (group["H"][:] == 0).all()  # a chunk of zeros is there
    assert local.exists("p/0/H/c/0")


@pytest.mark.parametrize("dtype", [np.int64, np.float16, object])
def test_other_dtypes_are_refused(local, dtype):
    with pytest.raises(CheckpointError, match=r"p/x has dtype .*; factors are float32 or float64"):
        local.write_arrays("p", {"x": np.ones(2).astype(dtype)})


def bad_copies(data):
    """Yield every truncation and every single altered byte of a file."""
    yield from (data[:length] for length in range(len(data)))
    yield data + b"\0"
    for position in range(len(data)):
        yield data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


@pytest.mark.parametrize("name", ["features.0.weight/A", "features.0.weight/B", "loss"])
def test_no_truncated_or_altered_byte_goes_unnoticed(local, name):
    entries = local.write_arrays("partials/000000/a", ARRAYS, SYMMETRIC)
    for key in local.list(f"partials/000000/a/{name}"):
        path = os.path.join(local.url, key)
        with open(path, "rb") as file:
            good = file.read()
        for bad in bad_copies(good):
            with open(path, "wb") as file:
                file.write(bad)
            with pytest.raises(CheckpointError, match=f"{key} is truncated or altered.*partials/000000.json"):
                local.read_array("partials/000000/a", name, entries[name])
        with open(path, "wb") as file:
            file.write(good)
        local.read_array("partials/000000/a", name, entries[name])


def test_deleted_objects_are_errors_not_zeros(store):
    entries = store.write_arrays("partials/000000/a", ARRAYS, SYMMETRIC)
    for key in store.list("partials/000000/a/H"):
        data = store.read(key)
        store.delete_tree(key)
        with pytest.raises(MissingObjectError, match=f"{key} is missing"):
            store.read_array("partials/000000/a", "H", entries["H"])
        store.create(key, data)


@pytest.mark.parametrize("field", ["sha256", "shape", "dtype", "packed", "metadata_sha256"])
def test_an_entry_that_says_something_else_is_noticed(local, field):
    entries = local.write_arrays("p", ARRAYS, SYMMETRIC)
    wrong = {"sha256": "0" * 64, "shape": [5, 5], "dtype": "float64", "packed": False, "metadata_sha256": "0" * 64}
    with pytest.raises(CheckpointError, match="p/H.*altered"):
        local.read_array("p", "H", {**entries["H"], field: wrong[field]})


@pytest.mark.parametrize("shape", [[], [10], [2, 5], [10, 1]])
def test_an_entry_that_calls_something_else_a_packed_matrix_is_refused(local, shape):
    entries = local.write_arrays("p", ARRAYS, SYMMETRIC)
    with pytest.raises(CheckpointError, match="p/H.*packed symmetric matrix"):
        local.read_array("p", "H", {**entries["H"], "shape": shape})


def test_valid_bytes_of_another_array_are_noticed(local):
    entries = local.write_arrays("p", {"x": np.ones(4), "y": np.full(4, 2.0)})
    os.replace(f"{local.url}/p/y/c/0", f"{local.url}/p/x/c/0")
    with pytest.raises(CheckpointError, match="p/x.*sha256"):
        local.read_array("p", "x", entries["x"])


def test_bytes_that_change_while_they_are_written_are_noticed_before_the_commit(local, monkeypatch):
    put = Checkpoint._put
    monkeypatch.setattr(Checkpoint, "_put", lambda self, k, data: put(self, k, data[:-1] if "/c/" in k else data))
    with pytest.raises(CheckpointError, match="p/x/c/0 is truncated or altered"):
        local.write_arrays("p", {"x": np.ones(4)})


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


@pytest.mark.parametrize("how", ["as written here", "big-endian", "other codecs"])
def test_chunks_are_decoded_as_zarr_decodes_them(how):
    """What this package writes without zarr's copies, and whatever else the metadata describe by zarr itself."""
    codecs = {
        "as written here": {"compressors": [BloscCodec(cname="zstd", shuffle="bitshuffle"), Crc32cCodec()]},
        "big-endian": {"serializer": BytesCodec(endian="big"), "compressors": [BloscCodec(), Crc32cCodec()]},
        "other codecs": {"compressors": [GzipCodec()]},
    }
    for shape, chunk in (((100, 3), (32, 3)), ((), ())):
        memory = {}
        value = np.random.default_rng(0).standard_normal(shape)
        array = zarr.create_array(
            zarr.storage.MemoryStore(memory), shape=shape, chunks=chunk, dtype="f8", **codecs[how]
        )
        array[...] = value
        stored = {key: data.to_bytes() for key, data in memory.items()}
        opened = {"zarr.json": memory["zarr.json"]}
        array = zarr.open_array(zarr.storage.MemoryStore(opened), mode="r")
        for number, rows in chunks.chunks(array):
            assert np.array_equal(chunks.decode(array, opened, number, rows, stored[number]), value[rows])
        assert list(opened) == ["zarr.json"] and chunks._written_here(array) == (how == "as written here")


@pytest.mark.parametrize("ahead", [Ahead(0, 0, 0), Ahead(1, 2, 8), Ahead(4, 4, 24)], ids=["none", "one", "several"])
def test_what_is_wrong_with_an_array_is_raised_by_its_own_pieces(ahead):
    """Neither when it is taken nor by those of another, whether it cannot be opened or a piece of it not be read."""

    def opened(number):
        if number == 1:
            raise CheckpointError("array 1")
        return [Piece(slice(i, i + 1), 8, partial(loaded, number, i)) for i in range(3)]

    def loaded(number, i):
        if (number, i) == (3, 1):
            raise CheckpointError("piece 1 of array 3")
        return np.array([10.0 * number + i])

    found = []
    for pieces in in_order([partial(opened, number) for number in range(5)], ahead):
        found.append([])
        try:
            found[-1] += [piece.item() for _, piece in pieces]
        except CheckpointError as error:
            found[-1].append(str(error))
    assert found == [[0, 1, 2], ["array 1"], [20, 21, 22], ["piece 1 of array 3"], [40, 41, 42]]
