"""From Arrow columns to arrays: numbers, nested lists of one shape, tensors stored as raw bytes or as extension types."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types

from laplace_dist.data.choice import TWICE
from laplace_dist.data.rows import Values
from laplace_dist.errors import SettingsError

Where = Callable[[int], str]


def obstacles(schema: pa.Schema) -> dict[str, str]:
    """Return for each column what torch cannot join about its values, or nothing where it can."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    return {field.name: TWICE if field.name in twice else _obstacle(field) for field in schema}


def check_same(first: pa.Schema, other: pa.Schema, names: Sequence[str], where: tuple[str, str]) -> None:
    """Refuse files whose columns are of different types: the bits of a batch would depend on where it lies.

    Args:
        first: Schema of the first file.
        other: Schema of another one.
        names: The columns that are used.
        where: Names of the two files.

    Raises:
        SettingsError: Naming the column and both files.
    """
    for name in names:
        place = other.get_field_index(name)
        one, two = first.field(name), other.field(place) if place >= 0 else None
        if two is None or one.type != two.type or _form(one) != _form(two):
            found = "is missing" if two is None else f"holds {_shown(two)}"
            raise SettingsError(
                f"--data: column {name!r} holds {_shown(one)} in {where[0]} and {found} in {where[1]}; write all files "
                "with one schema"
            )


def values_of(table: pa.Table, names: Sequence[str], where: Where) -> dict[str, Values]:
    """Return the values of columns.

    Args:
        table: Some rows.
        names: Of the columns.
        where: Says in a person's words where a row lies, by its place in the table.

    Returns:
        For each column one array for all rows, or a list where rows differ in shape or are no numbers.

    Raises:
        ValueError: A value is null, or its bytes are not of the shape that the schema gives; naming the row.
    """
    return {name: _values(_whole(table.column(name)), table.schema.field(name), where) for name in names}


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole if isinstance(whole, pa.Array) else whole.chunk(0)


def _values(array: pa.Array, field: pa.Field, where: Where) -> Values:
    _refuse_nulls(array, field.name, where)
    if isinstance(array, pa.FixedShapeTensorArray):
        _refuse_nulls(array.storage.flatten(), field.name, lambda i: where(i // max(math.prod(array.type.shape), 1)))
        return array.to_numpy_ndarray()
    form = _form(field)
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    if form and _is_bytes(array.type):
        return _from_bytes(array, form, field.name, where)
    values = _plain(array, field.name, where)
    if form and isinstance(values, np.ndarray):
        if math.prod(values.shape[1:]) != math.prod(form["shape"]):
            raise ValueError(
                f"column {field.name!r} has shape {form['shape']} by its schema, but {values.shape[1:]} in {where(0)}"
            )
        return values.reshape(len(values), *form["shape"])
    return values


def _plain(array: pa.Array, name: str, where: Where) -> Values:
    kind = array.type
    if types.is_dictionary(kind):
        return _plain(array.dictionary_decode(), name, where)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _lists(array, name, where)
    if _is_number(kind):
        return array.to_numpy(zero_copy_only=False)
    return array.to_pylist()


def _lists(array: pa.Array, name: str, where: Where) -> Values:
    """Return lists as rows of one array where all are of one length, else one by one."""
    if types.is_fixed_size_list(array.type):
        stops = np.arange(1, len(array) + 1) * array.type.list_size
    else:
        offsets = array.offsets.to_numpy()
        stops = offsets[1:] - offsets[0]
    flat = array.flatten()
    _refuse_nulls(flat, name, lambda place: where(int(np.searchsorted(stops, place, "right"))))
    inner = _plain(flat, name, lambda place: where(int(np.searchsorted(stops, place, "right"))))
    lengths = np.diff(stops, prepend=0)
    if isinstance(inner, np.ndarray) and len(set(lengths.tolist())) == 1:
        return inner.reshape(len(array), int(lengths[0]), *inner.shape[1:])
    return [inner[stop - length : stop] for stop, length in zip(stops.tolist(), lengths.tolist(), strict=True)]


def _from_bytes(array: pa.Array, form: Mapping[str, Any], name: str, where: Where) -> np.ndarray:
    """Return tensors that are stored as their bytes."""
    dtype, shape = np.dtype(form["dtype"]), form["shape"]
    wanted, rows = dtype.itemsize * math.prod(shape), array.to_pylist()
    for row, content in enumerate(rows):
        if len(content) != wanted:
            raise ValueError(
                f"column {name!r} has {len(content)} bytes in {where(row)}, but {dtype} of shape {tuple(shape)}, as its schema "
                f"says, takes {wanted}"
            )
    return np.frombuffer(b"".join(rows), dtype).reshape(len(rows), *shape)


def _refuse_nulls(array: pa.Array, name: str, where: Where) -> None:
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(
            f"column {name!r} has a null, which is what pandas writes for NaN, in {where(row)}; fill it, or leave the row out"
        )


# ------------------------------------------------------------------ types


def _obstacle(field: pa.Field) -> str:
    kind, form = field.type, _form(field)
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    kind = kind.value_type if types.is_dictionary(kind) else kind
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if _is_number(kind) or (form and _is_bytes(kind)):
        return ""
    if _is_bytes(kind):
        return "bytes (if these are tensors, give the field the metadata dtype and shape)"
    return "strings" if types.is_string(kind) or types.is_large_string(kind) else f"{field.type}, which is no number"


def _form(field: pa.Field) -> dict[str, Any] | None:
    """Return the shape, and of bytes the dtype, of the tensors in a column, where its schema says so."""
    metadata, kind = field.metadata or {}, field.type
    if isinstance(kind, pa.FixedShapeTensorType):
        return None
    if isinstance(kind, pa.ExtensionType):
        metadata = {
            b"ARROW:extension:name": kind.extension_name.encode(),
            b"ARROW:extension:metadata": kind.__arrow_ext_serialize__(),
        }
        kind = kind.storage_type
    if metadata.get(b"ARROW:extension:name", b"").startswith(b"ray.data.arrow_tensor"):
        shape = json.loads(metadata[b"ARROW:extension:metadata"])
        return {"shape": tuple(shape)} if isinstance(shape, list) else None
    if _is_bytes(kind) and {b"dtype", b"shape"} <= metadata.keys():
        try:
            return {"dtype": np.dtype(metadata[b"dtype"].decode()).str, "shape": tuple(json.loads(metadata[b"shape"]))}
        except (TypeError, ValueError) as error:
            raise SettingsError(
                f"--data: the metadata of column {field.name!r} gives dtype {metadata[b'dtype']!r} and shape "
                f"{metadata[b'shape']!r} ({error}); expected such as 'float32' and '[3, 32, 32]'"
            ) from None
    return None


def _shown(field: pa.Field) -> str:
    form = _form(field)
    return f"{field.type} {form}" if form else str(field.type)


def _is_number(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
