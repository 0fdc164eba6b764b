"""Symmetric matrices as packed triangles: what is packed, in any parts and of any layout, comes back bit for bit."""

from __future__ import annotations

import uuid
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.storage import arrays, triangles
from laplace_dist.storage.triangles import mirror, pack, unpack


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
