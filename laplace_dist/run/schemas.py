"""Which fields every JSON object of a checkpoint has: what is sealed correctly may still come from elsewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from laplace_dist.plan.sketch import Sketch

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


class _Term(Strict):
    window: Name
    weight: Annotated[Finite, Field(gt=0, le=1)]
    sum: Sha256


class VersionFields(Strict):
    """The manifest of a posterior version."""

    format_version: Positive
    plan: str
    version: Name
    n_data: Positive | Annotated[Finite, Field(gt=0)]
    loss: Finite | None = None
    environment: Environment | None = None
    windows: list[_Term] | None = None
    basis: Sha256 | None = None
    factors: dict[str, _Place]


class _Owned(Strict):
    """An object that carries its own key, so that none can take another's place."""

    format_version: Positive
    key: str


class PartFields(_Owned):
    """The manifest of one part's sum."""

    plan: str
    of: Sha256
    prefix: str
    arrays: Annotated[dict[Literal["sum"], Entry], Field(min_length=1)]
    environment: Environment


class BasisFields(_Owned):
    """The manifest of the basis of a second pass."""

    plan: str
    of: Sha256
    factors: Annotated[dict[str, _Place], Field(min_length=1)]
    environment: Environment


class EpochFields(_Owned):
    """The manifest of an epoch of a training."""

    plan: str
    number: Positive
    loss: Finite
    margliks: list[Finite]
    state: Sha256
    best: Sha256 | None
    best_epoch: Positive | None
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


TuningKey = Annotated[str, Field(pattern=r"^tuning/[^/]+\.json$")]
EvaluationKey = Annotated[str, Field(pattern=r"^evaluation/[^/]+\.json$")]


class _Promotion(Strict):
    """One entry of the history: what was current, by what and without which windows, and whether it is gone."""

    version: Name
    tuning: TuningKey | None
    why: str
    evaluation: EvaluationKey | None = None
    left_out: list[Name] = []
    collected: bool = False
    window: Name | None = None


class CurrentFields(Strict):
    """`CURRENT.json`."""

    format_version: Positive
    version: Name
    tuning: TuningKey | None
    history: list[_Promotion] | None = None
    collection: Name | None = None


class _Side(Strict):
    version: Name
    tuning: TuningKey | None
    evaluation: EvaluationKey


class _Compared(Strict):
    value: Finite
    low: Finite
    high: Finite
    margin: Annotated[Finite, Field(ge=0)]


class _Gate(Strict):
    gate: str
    value: Finite
    met: bool


class _PassedOver(Strict):
    """A window that a rule has not counted, and why."""

    window: Name
    why: Literal["unfinished", "undecided", "left out"]


class RecalibrationFields(Strict):
    """What a recalibration has found, and whether it promoted the candidate; `pending` while it is about to."""

    format_version: Positive
    plan: str
    window: Name
    windows: list[_Term]
    passed_over: list[_PassedOver] = []
    candidate: _Side
    current: _Side
    settings: dict[str, Any]
    differences: dict[Literal["nll", "ece"], _Compared]
    metrics: dict[Literal["map", "current", "candidate"], dict[str, Finite]]
    gates: list[_Gate] = []
    drift: dict[str, Any] | None = None
    promoted: bool
    pending: bool = False
    why: str
    environment: Environment


class _Stream(Strict):
    edges: list[Finite]
    counts: list[Number]
    looks: Number
    log_capital: Finite | None


class _Look(Strict):
    name: Name
    evaluation: EvaluationKey
    record: dict[str, Any]


class DriftFields(Strict):
    """What is kept between recalibrations of the watch for drift: how the reference lay, and what was seen since."""

    format_version: Positive
    plan: str
    number: Positive
    version: Name
    tuning: TuningKey | None
    evaluation: EvaluationKey
    streams: dict[str, _Stream]
    distance: dict[str, list[list[Finite]]] | None
    noticed: dict[str, str]
    seen: list[str]
    last: _Look | None


class RecalibrationLeaseFields(Strict):
    """Which job recalibrates: the one whose sign of life is this."""

    format_version: Positive
    job: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    node: str


class _SearchRound(Strict):
    """One pass over validation data: the mean loss of every value, by temperature within prior precision.

    Of a regression the priors are in units of the noise's precision, and the noises are the best ones that go with them.
    """

    priors: list[Finite]
    temperatures: list[Finite]
    losses: list[Finite | None]
    noises: list[Finite] = []
    map: Finite | None
    terms: Positive
    coarse: bool


class _Interval(Strict):
    value: Finite
    low: Finite
    high: Finite


class TuningSearch(Strict):
    """How a prior precision or a temperature was found on validation data, and how the result compares with the MAP."""

    rounds: list[_SearchRound]
    limit: Literal["MAP", "prior", "edge"] | None
    helps: bool
    compared: dict[Literal["nll", "ece"], _Interval]
    map_noise: Annotated[Finite, Field(gt=0)] | None = None
    said: list[str]


class DecompositionFields(_Owned):
    """The manifest of the eigendecomposition of one factor of a posterior version."""

    plan: str
    factor: str
    prefix: str
    arrays: dict[Literal["values", "vectors"], Entry]
    environment: Environment


class TuningFields(_Owned):
    """The manifest of a tuning."""

    plan: str | None = None
    settings: dict[str, Any]
    shards: list[Name]
    prefix: str
    arrays: dict[Literal["prior_precision"], Entry]
    sigma_noise: Annotated[Finite, Field(gt=0)] | None
    logit_temperature: Annotated[Finite, Field(gt=0)] | None = None
    search: TuningSearch | None = None
    log_marginal_likelihood: Finite
    environment: Environment | None = None

    @model_validator(mode="after")
    def _has_the_prior(self) -> TuningFields:
        if not self.arrays:
            raise ValueError("no prior precision")
        return self


class TuningShardFields(_Owned):
    """One validation shard's scores."""

    plan: str | None = None
    environment: Environment | None = None
    scores: str
    prefix: str | None = None
    arrays: dict[Literal["examples"], Entry] = {}


class EvaluationFields(_Owned):
    """The metrics of an evaluation."""

    plan: str | None = None
    environment: Environment | None = None
    settings: dict[str, Any]
    shards: dict[str, list[Name]]
    metrics: dict[Literal["map", "laplace"], dict[str, Finite]]


class EvaluationShardFields(_Owned):
    """The manifest of one shard's scores."""

    plan: str | None = None
    environment: Environment | None = None
    prefix: str
    arrays: dict[str, Entry]
    groups: list[str] | None = None
