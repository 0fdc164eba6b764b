"""Which fields every JSON object of a checkpoint has: what is sealed correctly may still come from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Number = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # one part of a key
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Entry(_Strict):
    """One stored array, as `Store.write_arrays` describes it."""

    sha256: Sha256
    shape: list[Number]
    dtype: Literal["float32", "float64"]
    packed: bool
    metadata_sha256: Sha256
    stored_bytes: Number

    @model_validator(mode="after")
    def _square(self) -> Entry:
        if self.packed and (len(self.shape) < 2 or self.shape[-1] != self.shape[-2]):
            raise ValueError("only square matrices are packed")
        return self


class _Segment(_Strict):
    id: Name
    start: Number
    stop: Positive


class _Factor(_Strict):
    shape: list[Number]
    symmetric: bool


class _Spec(_Strict):
    """Of the core library, which checks the rest."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)
    factors: dict[str, _Factor]


class _Data(_Strict):
    length: Positive
    sha256: str


class _Model(_Strict):
    path: str
    args: dict[str, Any]


class _Plan(_Strict):
    format_version: Positive
    segments: Annotated[list[_Segment], Field(min_length=1)]
    settings: dict[str, Any]
    data: _Data
    weights: str
    model: _Model
    spec: _Spec

    @model_validator(mode="after")
    def _covers_the_data(self) -> _Plan:
        edges = [0, *(segment.stop for segment in self.segments)]
        starts = [segment.start for segment in self.segments]
        distinct = len({segment.id for segment in self.segments}) == len(starts)
        if starts != edges[:-1] or edges != sorted(set(edges)) or edges[-1] != self.data.length or not distinct:
            raise ValueError("the segments do not cover the data once")
        return self


class _Partial(_Strict):
    format_version: Positive
    plan: str
    segment: str
    start: Number
    stop: Number
    attempt: Name
    n_data: Number
    prefix: str
    arrays: dict[str, Entry]


class _Place(_Strict):
    prefix: str
    entry: Entry


class _Version(_Strict):
    format_version: Positive
    plan: str
    version: Name
    n_data: Positive
    factors: dict[str, _Place]


class _Current(_Strict):
    format_version: Positive
    version: Name
    tuning: Annotated[str, Field(pattern=r"^tuning/[^/]+\.json$")] | None


class _Owned(_Strict):
    """An object that carries its own key, so that none can take another's place."""

    format_version: Positive
    key: str


class _Tuning(_Owned):
    settings: dict[str, Any]
    shards: list[Name]
    prefix: str
    arrays: dict[Literal["prior_precision"], Entry]
    sigma_noise: Annotated[Finite, Field(gt=0)] | None
    log_marginal_likelihood: Finite

    @model_validator(mode="after")
    def _has_the_prior(self) -> _Tuning:
        if not self.arrays:
            raise ValueError("no prior precision")
        return self


class _TuningShard(_Owned):
    scores: str


class _Evaluation(_Owned):
    settings: dict[str, Any]
    shards: dict[str, list[Name]]
    metrics: dict[Literal["map", "laplace"], dict[str, Finite]]


class _EvaluationShard(_Owned):
    prefix: str
    arrays: dict[str, Entry]


_KINDS: dict[str, type[_Strict]] = {
    r"plan\.json": _Plan,
    r"CURRENT\.json": _Current,
    r"partials/[^/]+\.json": _Partial,
    r"posteriors/[^/]+\.json": _Version,
    r"tuning/[^/]+\.json": _Tuning,
    r"tuning/[^/]+/[^/]+\.json": _TuningShard,
    r"evaluation/[^/]+\.json": _Evaluation,
    r"evaluation/[^/]+/[^/]+\.json": _EvaluationShard,
}


def problem(key: str, values: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the fields of an object, or None.

    Args:
        key: Its key, which says of what kind it is; of a key that is not in the layout nothing is known.
        values: Its fields.
    """
    kind = next((kind for pattern, kind in _KINDS.items() if re.fullmatch(pattern, key)), None)
    if kind is None:
        return None
    try:
        kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"its {'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    except RecursionError:
        return "its fields are nested too deeply"
    if values.get("key", key) != key:
        return f"it was written as {values['key']!r}"
    return _foreign_prefix(key.removesuffix(".json"), values)


def _foreign_prefix(own: str, values: Mapping[str, Any]) -> str | None:
    """Say which prefix in an object is not directly under its own key."""
    if own.startswith("partials/"):
        return None  # compared with the attempt's id by `partials.parse_manifest`
    for place in (values, *values.get("factors", {}).values()):
        prefix = place.get("prefix")
        if prefix is not None and not re.fullmatch(rf"{re.escape(own)}/[^/]+", prefix):
            return f"its prefix {prefix!r} is not its own"
    return None
