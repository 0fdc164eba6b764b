"""Arrays: back bit for bit, plain Zarr, and every bad byte of them noticed."""

from __future__ import annotations

import os
import uuid
from functools import partial

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec

from laplace_dist.errors import CheckpointError, MissingObjectError
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.storage import arrays, chunks
from laplace_dist.storage.pieces import Ahead, Piece, in_order

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
    groups = np.random.default_rng(0).standard_normal((5, 1, 3, 3)).astype(np.float32)
    given["groups"] = groups + groups.mT
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
    assert blosc["blocksize"] == 512 * 2**10
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


@pytest.mark.parametrize("value", [np.arange(6.0), np.zeros((2, 3), np.float32), np.float64(1.0), np.full(3, np.nan)])
def test_other_numbers_than_were_written_are_noticed_though_their_chunk_is_whole(local, monkeypatch, value):
    read = local._load_chunk
    local.write_arrays("right", {"x": value})
    monkeypatch.setattr(local, "_load_chunk", lambda *args: -read(*args))  # of zero another zero, of NaN another NaN
    with pytest.raises(CheckpointError, match="what was read back is not what was written"):
        local.write_arrays("wrong", {"x": value})


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
