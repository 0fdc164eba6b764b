"""Which fields the plans, sums and versions of a checkpoint have: what is sealed correctly may still come from elsewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from laplace_dist.plan.sketch import Sketch
from laplace_dist.run.fields import Entry, Environment, Finite, Name, Number, Owned, Positive, Sha256, Strict, Term


class _Segment(Strict):
    id: Name
    start: Number
    stop: Positive


class _Factor(Strict):
    shape: list[Number]
    symmetric: bool


class _Spec(Strict):
    """Of the core library, which checks the rest."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)
    factors: dict[str, _Factor]


class _Weights(Strict):
    """What the weights of the examples are told by, as `data.example_weights.facts` describes it."""

    name: Annotated[str, Field(min_length=1)]
    sha256: Sha256
    sum: Annotated[Finite, Field(gt=0)]
    zero: Number
    sampled: dict[Annotated[str, Field(pattern=r"^[0-9]+$")], Annotated[Finite, Field(ge=0)]]


class _Data(Strict):
    length: Positive
    sha256: str
    examples: dict[Annotated[str, Field(pattern=r"^[0-9]+$")], str] = {}
    files: Sha256 | None = None
    weights: _Weights | None = None


class _Model(Strict):
    path: str
    args: dict[str, Any]


class _Window(Strict):
    name: Name
    number: Number


class _Further(Strict):
    name: Annotated[str, Field(pattern=r"^\w+$")]
    spec: _Spec


class _InBasis(Strict):
    name: Annotated[str, Field(pattern=r"^\w+$")]
    sha256: Sha256


class PlanFields(Strict):
    """`plan.json`."""

    format_version: Positive
    segments: Annotated[list[_Segment], Field(min_length=1)]
    settings: dict[str, Any]
    data: _Data
    weights: str
    model: _Model
    spec: _Spec
    probe: Sha256 | None = None
    part_entries: Positive | None = None
    run: Name | None = None
    window: _Window | None = None
    further: _Further | None = None
    basis: _InBasis | None = None
    module_groups: Positive | None = None
    halved_from: Positive | None = None

    @model_validator(mode="after")
    def _covers_the_data(self) -> PlanFields:
        edges = [0, *(segment.stop for segment in self.segments)]
        starts = [segment.start for segment in self.segments]
        distinct = len({segment.id for segment in self.segments}) == len(starts)
        if starts != edges[:-1] or edges != sorted(set(edges)) or edges[-1] != self.data.length or not distinct:
            raise ValueError("the segments do not cover the data once")
        return self


class _Examples(Strict):
    """The digests of examples, as `plan.sketch.Sketch` describes them."""

    limit: Annotated[str, Field(pattern=r"^[0-9a-f]{1,17}$")]
    digests: str
    repeats: list[list[Number]]

    @model_validator(mode="after")
    def _can_be_read(self) -> _Examples:
        if any(len(repeat) != 2 for repeat in self.repeats):
            raise ValueError("a repeat is a place and a number")
        Sketch.from_values(dict(self))
        return self


class WeightsIndexFields(Strict):
    """The index of a large model's weights; `weight_map` and `metadata` are those of `save_pretrained`."""

    format_version: Positive
    weight_map: dict[str, str]
    files: dict[Annotated[str, Field(pattern=r"^weights-[0-9a-f]{16}\.safetensors$")], Sha256]
    model: Sha256
    metadata: dict[str, Any]

    @model_validator(mode="after")
    def _names_its_files(self) -> WeightsIndexFields:
        if set(self.weight_map.values()) != self.files.keys():
            raise ValueError("its files are not those that its tensors lie in")
        return self


class PartialFields(Strict):
    """The manifest of a partial."""

    format_version: Positive
    plan: str
    segment: str
    start: Number
    stop: Number
    attempt: Name
    n_data: Number
    weight: Annotated[Finite, Field(ge=0)] | None = None
    prefix: str
    arrays: dict[str, Entry]
    loss: Finite | None = None
    data_sha256: Sha256 | None = None
    examples: _Examples | None = None
    environment: Environment | None = None

    @model_validator(mode="after")
    def _says_where_it_comes_from(self) -> PartialFields:
        if self.format_version > 1 and None in (self.loss, self.data_sha256, self.environment):
            raise ValueError("it does not say the loss, what was read, or where")
        return self


class _Place(Strict):
    prefix: str
    entry: Entry


class VersionFields(Strict):
    """The manifest of a posterior version."""

    format_version: Positive
    plan: str
    version: Name
    n_data: Positive | Annotated[Finite, Field(gt=0)]
    loss: Finite | None = None
    environment: Environment | None = None
    windows: list[Term] | None = None
    basis: Sha256 | None = None
    factors: dict[str, _Place]


class PartFields(Owned):
    """The manifest of one part's sum."""

    plan: str
    of: Sha256
    prefix: str
    arrays: Annotated[dict[Literal["sum"], Entry], Field(min_length=1)]
    environment: Environment


class BasisFields(Owned):
    """The manifest of the basis of a second pass."""

    plan: str
    of: Sha256
    factors: Annotated[dict[str, _Place], Field(min_length=1)]
    environment: Environment


class HyperFields(Strict):
    """Prior precision and noise of an epoch, as `trained.hyper_of` describes them."""

    prior_precision: list[Finite]
    values: Positive
    sigma_noise: Finite | None


class EpochFields(Owned):
    """The manifest of an epoch of a training."""

    plan: str
    number: Positive
    loss: Finite
    margliks: list[Finite]
    state: Sha256
    best: Sha256 | None
    best_epoch: Positive | None
    hyper: HyperFields | None = None  # of trainings of before they were kept
    environment: Environment


class _Read(Strict):
    """What a window's partials were made of, and where, as `run.readings` describes it."""

    environments: list[Environment | None]
    made: list[Number]
    data_sha256: list[Sha256 | None]

    @model_validator(mode="after")
    def _fits_together(self) -> _Read:
        if len(self.made) != len(self.data_sha256) or max(self.made, default=-1) >= len(self.environments):
            raise ValueError("digests and environments do not belong together")
        return self


class WindowFields(Strict):
    """`window.json`."""

    format_version: Positive
    plan: str
    n_data: Positive | Annotated[Finite, Field(gt=0)]
    loss: Finite
    environment: Environment
    parts: dict[Annotated[str, Field(pattern=r"^[0-9]{5,}$")], _Place]
    read: _Read | None = None
    examples: _Examples | None = None
    dropped: bool = False


class LeaseFields(Strict):
    """The sign of life of a job."""

    format_version: Positive
    node: str
    hours: Annotated[Finite, Field(ge=0)]
