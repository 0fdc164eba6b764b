"""The kinds of fields that the JSON objects of a checkpoint share, checked strictly."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # one part of a key
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Fields that are checked strictly; others are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Entry(Strict):
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


class Environment(Strict):
    """Where numbers were made, as `provenance.environment` describes it."""

    node: str
    laplace_dist: str
    torch: str
    python: str
    device: str
    driver: str
    threads: Positive
    precision: dict[str, str | bool]


class Term(Strict):
    """A window and its weight in a version's sum."""

    window: Name
    weight: Annotated[Finite, Field(gt=0, le=1)]
    sum: Sha256


class Owned(Strict):
    """An object that carries its own key, so that none can take another's place."""

    format_version: Positive
    key: str
