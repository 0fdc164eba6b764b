"""Which fields the objects have that are there to be looked at: the record of a job, and what a report keeps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from laplace_dist.run.fields import Finite, Number, Positive, Strict

Seconds = Annotated[Finite, Field(ge=0)]


class _Stage(Strict):
    stage: str
    unit: str
    total: Number
    before: Number
    done: Number
    examples: Number
    bytes: Number
    retries: Number
    lost: Number
    busy: Number
    seconds: Seconds


class StatusFields(Strict):
    """The record of a job: see `run.journal`."""

    format_version: Positive
    plan: str
    job: str
    window: str | None
    node: str
    begun: str
    state: Literal["at work", "done", "failed", "interrupted"]
    why: str | None
    seconds: Seconds
    stages: list[_Stage]
    workers: list[Annotated[list[Finite], Field(min_length=2, max_length=2)]]


class _Spectrum(Strict):
    factor: str
    size: Number
    values: list[Finite]
    skipped: str | None


class SpectraFields(Strict):
    """The spectra of a posterior version's factors: see `run.spectra`."""

    format_version: Positive
    plan: str
    key: str
    spectra: list[_Spectrum]
