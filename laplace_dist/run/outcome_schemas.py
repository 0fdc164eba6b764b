"""Which fields the tunings, evaluations, recalibrations and the pointer of a checkpoint have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from laplace_dist.run.fields import Entry, Environment, Finite, Name, Number, Owned, Positive, Strict, Term

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
    windows: list[Term]
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


class DecompositionFields(Owned):
    """The manifest of the eigendecomposition of one factor of a posterior version."""

    plan: str
    factor: str
    prefix: str
    arrays: dict[Literal["values", "vectors"], Entry]
    environment: Environment


class TuningFields(Owned):
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


class TuningShardFields(Owned):
    """One validation shard's scores."""

    plan: str | None = None
    environment: Environment | None = None
    scores: str
    prefix: str | None = None
    arrays: dict[Literal["examples"], Entry] = {}


class EvaluationFields(Owned):
    """The metrics of an evaluation."""

    plan: str | None = None
    environment: Environment | None = None
    settings: dict[str, Any]
    shards: dict[str, list[Name]]
    metrics: dict[Literal["map", "laplace"], dict[str, Finite]]


class EvaluationShardFields(Owned):
    """The manifest of one shard's scores."""

    plan: str | None = None
    environment: Environment | None = None
    prefix: str
    arrays: dict[str, Entry]
    groups: list[str] | None = None
