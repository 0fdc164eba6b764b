"""What every store must do with arrays, as tests to inherit; `StoreConformance` has them among its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import zarr
import zarr.storage

from laplace_dist.errors import CheckpointError, MissingObjectError
from laplace_dist.storage import arrays
from laplace_dist.storage.store import Store

ARRAYS = {
    "conv.weight/A": np.array([[2.0, 1.0], [1.0, 3.0]], np.float32),
    "conv.weight/B": np.arange(24, dtype=np.float64).reshape(4, 6),
    "blocks": np.arange(18, dtype=np.float32).reshape(2, 3, 3) + np.arange(18, dtype=np.float32).reshape(2, 3, 3).mT,
    "odd [0]*?/name": np.array([1.0, np.nan, -np.inf]),
    "zeros": np.zeros((5, 5)),
    "loss": np.array(1.5),
    "no rows": np.empty((0, 3), np.float32),
    "no columns": np.empty((3, 0)),
    "no triangle": np.empty((0, 0)),
}
SYMMETRIC = {"conv.weight/A", "blocks", "zeros", "no triangle"}


def _bad_copies(data: bytes) -> Iterator[bytes]:
    """Yield truncations, an extension, and copies with one altered byte."""
    yield from (b"", data[: len(data) // 2], data[:-1], data + b"\0")
    for position in sorted({0, 7, 16, 20, len(data) // 2, len(data) - 5, len(data) - 1} & set(range(len(data)))):
        yield data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


class ArrayConformance:
    """The tests; a subclass supplies the fixture `store`."""

    def test_arrays_come_back_bit_for_bit(self, store: Store) -> None:
        """Packed or not, of any shape, from another client."""
        entries = store.write_arrays("p/0/a", ARRAYS, SYMMETRIC)
        other = copy.deepcopy(store)  # from its arguments, as in another process
        for name, value in ARRAYS.items():
            back = other.read_array("p/0/a", name, entries[name])
            assert (back.dtype, back.shape, back.tobytes()) == (value.dtype, value.shape, value.tobytes()), name
        assert {name for name, entry in entries.items() if entry["packed"]} == SYMMETRIC
        assert entries["zeros"]["stored_bytes"] == sum(store.size(key) for key in store.list("p/0/a/zeros"))
        store.delete_tree("p/0/a")
        assert store.list() == []

    def test_many_arrays_come_in_order_and_a_bad_one_fails_alone(self, store: Store) -> None:
        """However many are read at once; of the missing one it is said when its turn comes, and the others are read."""
        rng, factors = np.random.default_rng(0), {}
        for number in range(40):
            shape = (1_500, 1_500) if number == 20 else (number + 1, 3)
            factors[f"f{number}"] = rng.standard_normal(shape, np.float32)
        entries = store.write_arrays("group", factors)
        store.delete_tree("group/f7/zarr.json")
        entries["f9"] = {**entries["f9"], "sha256": "0" * 64}
        bad = {"f7": "group/f7/zarr.json is missing", "f9": "group/f9 is truncated or altered.*sha256"}
        reads = store.read_pieces(("group", name, entry) for name, entry in entries.items())
        for (name, value), pieces in zip(factors.items(), reads, strict=True):
            if name in bad:
                with pytest.raises(CheckpointError, match=bad[name]):
                    list(pieces)
            else:
                assert np.array_equal(np.concatenate([piece for _, piece in pieces]), value)

    def test_the_pieces_of_large_arrays_come_in_order_and_a_bad_one_ends_its_array_alone(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of several chunks each, more than are read ahead: every row once, whatever is taken, left or missing before it."""
        monkeypatch.setattr(arrays, "CHUNK_BYTES", 4096)
        values = {f"f{number}": np.arange(3000.0) + number for number in range(6)}
        entries = store.write_arrays("group", values)
        assert len(store.list("group/f0/c")) == 6
        store.delete_tree("group/f2/c/1")
        reads = store.read_pieces(("group", name, entry) for name, entry in entries.items())
        for (name, value), pieces in zip(values.items(), reads, strict=True):
            if name == "f4":
                assert next(pieces)[0] == slice(0, 512)  # and no more of it
                continue
            found, seen = np.full(3000, np.nan), []
            try:
                for rows, piece in pieces:
                    found[rows] = piece
                    seen.append(rows.start)
            except MissingObjectError as error:
                assert name == "f2" and "group/f2/c/1 is missing" in str(error) and seen == [0]
            else:
                assert name != "f2" and seen == [*range(0, 3000, 512)] and np.array_equal(found, value)
        whole = store.read_array("group", "f5", entries["f5"])
        assert np.array_equal(whole, values["f5"])

    def test_arrays_are_plain_zarr(self, store: Store) -> None:
        """`zarr.open_group` alone reads them, whatever the store."""
        store.write_arrays("p/0", ARRAYS, SYMMETRIC)
        options = (dict(store._options) or None) if "://" in store.url else None
        group = zarr.open_group(f"{store.url}/p/0", mode="r", storage_options=options)
        assert group["conv.weight/A"][:].tolist() == [2.0, 1.0, 3.0]
        assert "triangle" in group["conv.weight/A"].attrs["packed"]
        assert np.array_equal(group["conv.weight/B"][:], ARRAYS["conv.weight/B"])
        assert (group["loss"][()], group["no rows"].shape) == (1.5, (0, 3))
        codecs = group["zeros"].metadata.to_dict()["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes", "blosc", "crc32c"]
        assert np.isnan(group["zeros"].metadata.fill_value)
        assert (group["zeros"][:] == 0).all()  # the chunk of zeros is there, or these would be NaN

    def test_no_altered_truncated_or_deleted_object_goes_unnoticed(self, store: Store) -> None:
        """Of metadata and of chunks; the message names the object and what to do."""
        name, prefix = "conv.weight/B", "partials/000000/a"
        entries = store.write_arrays(prefix, ARRAYS, SYMMETRIC)
        keys = store.list(f"{prefix}/{name}")
        assert [key.rsplit("/", 3)[-1] for key in keys] == ["0", "zarr.json"]
        for key in keys:
            good = store.read(key)
            for bad in _bad_copies(good):
                store.replace(key, bad)
                with pytest.raises(CheckpointError, match=f"{key} is truncated or altered.*partials/000000.json"):
                    store.read_array(prefix, name, entries[name])
            store.delete_tree(key)
            with pytest.raises(MissingObjectError, match=f"{key} is missing.*partials/000000.json"):
                store.read_array(prefix, name, entries[name])
            store.replace(key, good)
        assert np.array_equal(store.read_array(prefix, name, entries[name]), ARRAYS[name])
