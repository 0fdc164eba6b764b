"""Columns of Parquet and Arrow files: which become tensors, in which forms, and what is said of the others."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from source_cases import load, raw_bytes, table, write

from laplace_dist.data.loader import batches
from laplace_dist.errors import ExampleError, SettingsError


def extension(values, name):
    """Return a column as it looks when the package that writes it is not there to read it."""
    form = {"ARROW:extension:name": name, "ARROW:extension:metadata": json.dumps(list(values.shape[1:]))}
    schema = pa.schema([pa.field("x", pa.list_(pa.float32()), metadata=form)])
    return pa.table([pa.array([value.reshape(-1).tolist() for value in values], pa.list_(pa.float32()))], schema=schema)


FORMS = {
    "lists": lambda v: pa.table({"x": pa.array(v.tolist(), pa.list_(pa.list_(pa.float32())))}),
    "large lists": lambda v: pa.table({"x": pa.array(v.tolist(), pa.large_list(pa.list_(pa.float32(), 3)))}),
    "Arrow's tensors": lambda v: pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(v)}),
    "Ray's tensors": lambda v: extension(v, "ray.data.arrow_tensor"),
    "Ray's tensors, version 2": lambda v: extension(v, "ray.data.arrow_tensor_v2"),
    "bytes": lambda v: raw_bytes(torch.tensor(v)),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_tensors_are_stored_in_many_forms(tmp_path, make):
    values = np.random.default_rng(0).normal(size=(12, 2, 3)).astype(np.float32)
    write(tmp_path / "train.parquet", make(values).append_column("y", pa.array(range(12))), rows=5)
    ((_, x, y),) = batches(load(tmp_path), 3, 12, 16)
    assert x.dtype == torch.float32 and np.array_equal(x.numpy(), values[3:]) and y.tolist() == list(range(3, 12))


def test_numbers_keep_their_types_and_classes_become_int64(tmp_path):
    kinds = ["bool", "uint8", "int16", "float16", "float64"]
    columns = {kind: pa.array(np.ones(4, kind)) for kind in kinds}
    labels = pa.array([1, 2, 0, 1], pa.int8()).dictionary_encode()
    write(tmp_path / "train.parquet", pa.table({**columns, "labels": labels}))
    ((_, x, y),) = batches(load(tmp_path), 0, 4, 4)
    assert [x[kind].dtype for kind in kinds] == [getattr(torch, kind) for kind in kinds]
    assert y.dtype == torch.int64 and y.tolist() == [1, 2, 0, 1]


def test_bytes_that_are_not_what_the_schema_says_are_named(tmp_path):
    found = raw_bytes(torch.zeros(6, 2, 3)).append_column("y", pa.array(range(6)))
    cut = [b"1" * 24] * 4 + [b"1" * 20, b"1" * 24]
    write(tmp_path / "train.parquet", pa.table([pa.array(cut), found["y"]], schema=found.schema))
    with pytest.raises(
        ExampleError, match=r"column 'x' has 20 bytes in row 4 of train.parquet, but float32 of shape \(2, 3\).*24"
    ):
        list(batches(load(tmp_path), 0, 6, 6))
    odd = pa.schema([pa.field("x", pa.binary(), metadata={"dtype": "floaty", "shape": "[2]"}), found.schema.field("y")])
    write(tmp_path / "train.parquet", pa.table([pa.array(cut), found["y"]], schema=odd))
    with pytest.raises(
        SettingsError, match=r"metadata of column 'x' gives dtype b'floaty' .*expected such as 'float32'"
    ):
        load(tmp_path)


ODD = {
    "bytes (if these are tensors, give the field the metadata dtype and shape)": pa.array([b"jpg"] * 4),
    "timestamp[us], which is no number": pa.array([0] * 4, pa.timestamp("us")),
    "struct<bytes: binary>, which is no number": pa.array([{"bytes": b"jpg"}] * 4),
    "list<element: string>, which is no number": pa.array([["a"]] * 4),
}


@pytest.mark.parametrize("words", ODD)
def test_columns_that_are_no_numbers_are_refused_unless_they_are_left_out(tmp_path, words):
    write(tmp_path / "train.parquet", table(4, odd=ODD[words]).rename_columns(["z", "labels", "odd"]))
    with pytest.raises(SettingsError) as caught:
        load(tmp_path)
    assert "column 'odd' of split 'train'" in str(caught.value) and "leave it out with --data-args" in str(caught.value)
    assert words.replace("list<element: string>, which is no number", "strings") in str(caught.value)
    assert sorted(load(tmp_path, data_args={"columns": ["z", "labels"]})[0]) == ["labels", "z"]


def test_columns_that_cannot_be_meant(tmp_path):
    """One name twice; an index of pandas, which is no input unless it is asked for."""
    x = pa.array([1.0, 2.0])
    write(tmp_path / "train.parquet", pa.Table.from_arrays([x, x, pa.array([0, 1])], names=["x", "x", "y"]))
    with pytest.raises(SettingsError, match="^--dict-key-x: .* has two columns 'x'; rename one"):
        load(tmp_path)
    assert load(tmp_path, dict_key_x="y", dict_key_y="y")[1][0] == 1
    write(tmp_path / "train.parquet", pa.table({"z": x, "labels": [0, 1], "__index_level_0__": ["a", "b"]}))
    assert sorted(load(tmp_path)[0]) == ["labels", "z"]
    with pytest.raises(SettingsError, match="--data-args: columns takes a list of names, such as"):
        load(tmp_path, data_args={"columns": "z"})


def test_a_null_inside_a_list_is_found(tmp_path):
    x = pa.array([[1.0, 2.0]] * 7 + [[3.0, None]] + [[1.0, 2.0]], pa.list_(pa.float32(), 2))
    write(tmp_path / "train.parquet", pa.table({"x": x, "y": np.arange(9)}), rows=4)
    with pytest.raises(
        ExampleError, match="column 'x' has a null, which is what pandas writes for NaN, in row 7 of train.parquet"
    ):
        list(batches(load(tmp_path), 0, 9, 9))
