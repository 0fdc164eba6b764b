"""Every key of a checkpoint with its schema and its remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from laplace_dist.plan.digests import digest
from laplace_dist.run.fields import Strict
from laplace_dist.run.outcome_schemas import (
    CurrentFields,
    DecompositionFields,
    DriftFields,
    EvaluationFields,
    EvaluationShardFields,
    RecalibrationFields,
    RecalibrationLeaseFields,
    TuningFields,
    TuningShardFields,
)
from laplace_dist.run.shown_fields import SpectraFields, StatusFields
from laplace_dist.run.sum_schemas import (
    BasisFields,
    EpochFields,
    LeaseFields,
    PartFields,
    PartialFields,
    PlanFields,
    VersionFields,
    WeightsIndexFields,
    WindowFields,
)

PLAN, WEIGHTS, CONFIG, CURRENT = "plan.json", "weights.safetensors", "config.yaml", "CURRENT.json"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"  # of a large model, in the place of the one file
WEIGHTS_SHARD = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
# The folders of a checkpoint.
PARTIALS, PARTS, POSTERIORS, DECOMPOSITIONS, BASIS = "partials", "parts", "posteriors", "decompositions", "basis"
TUNINGS, EVALUATIONS, RECALIBRATIONS, REPORTS = "tuning", "evaluation", "recalibration", "report"
WINDOWS = "windows"  # after the first
PASSES = "passes"  # a window's second pass, which is laid out like a window too
TRAINING = "training"  # what a training by empirical Bayes commits
JOBS, STATUS = "jobs", "status"  # who is at work, and the records of jobs
PROBE = re.compile(r"probe-[0-9a-f]{16}\.safetensors")
METRICS = f"{EVALUATIONS}/metrics.json"
COVERAGE = "coverage.tsv"  # every parameter and what was decided for it
REPORT, NUMBERS = "report.html", f"{REPORTS}/numbers.json"  # the page, and the numbers in it
RECALIBRATION_LEASE = f"{RECALIBRATIONS}/lease.json"
DRIFT = f"{RECALIBRATIONS}/drift.json"
LOSS = "loss"  # in 0.1 an array beside the factors
WINDOW = "window.json"
WINDOW_NAME = (
    r"[\w-][\w.-]*"  # of windows after the first, each of which lies in a folder of its own, laid out like the first
)

TRAINED = f"{TRAINING}/weights.safetensors"  # of its best posterior
CLEARED = (
    *(CURRENT, f"{TRAINING}/", f"{RECALIBRATIONS}/", f"{EVALUATIONS}/", f"{TUNINGS}/", f"{DECOMPOSITIONS}/"),
    *(f"{POSTERIORS}/", f"{WINDOWS}/", f"{PASSES}/", f"{BASIS}/", WINDOW, f"{PARTS}/", f"{PARTIALS}/"),
    *(REPORT, f"{REPORTS}/", COVERAGE, f"{STATUS}/", f"{JOBS}/"),
)  # in the order in which a run is deleted
# What is laid out like a checkpoint of its own: windows after the first, and the second pass of any window.
WITHIN = re.compile(rf"((?:{WINDOWS}/[^/]+/)?{PASSES}/[^/]+|{WINDOWS}/(?:[^/]+)(?!/{PASSES}/))/")


def probe_key(digest: str) -> str:
    """Return the key of the probe with this sha256; it is named by its content, so that two drivers cannot mix theirs."""
    return f"probe-{digest[:16]}.safetensors"


def weights_shard_key(digest: str) -> str:
    """Return the key of the shard of weights with this sha256."""
    return f"weights-{digest[:16]}.safetensors"


def partial_key(unit_id: str) -> str:
    """Return the key of a partial's manifest: of a segment, or `<segment>-g<number>` of one module group of it."""
    return f"{PARTIALS}/{unit_id}.json"


def recalibration_key(window: str) -> str:
    """Return the key of what the recalibration with a window has found."""
    return f"{RECALIBRATIONS}/{window}/decision.json"


def part_key(part: str) -> str:
    """Return the key of the manifest of a part's sum."""
    return f"{PARTS}/{part}.json"


def lease_key(job: str) -> str:
    """Return the key of the object that says that a job is at work."""
    return f"{JOBS}/{job}.json"


def status_key(job: str) -> str:
    """Return the key of the record of a job, which sorts by when it began."""
    return f"{STATUS}/{job}.json"


def spectra_key(version: str) -> str:
    """Return the key of the spectra of a posterior version's factors, which a report shows."""
    return f"{REPORTS}/spectra-{version}.json"


def epoch_key(number: int) -> str:
    """Return the key of the manifest of an epoch of a training."""
    return f"{TRAINING}/epochs/{number:06d}.json"


def training_file_key(digest: str) -> str:
    """Return the key of a file of a training, which is named by its sha256."""
    return f"{TRAINING}/files/{digest}.safetensors"


def basis_key(name: str) -> str:
    """Return the key of the manifest of the basis that the second pass of this name is in."""
    return f"{BASIS}/{name}.json"


def version_key(version: str) -> str:
    """Return the key of a posterior version's manifest."""
    return f"{POSTERIORS}/{version}.json"


def decomposition_key(version: str, factor: str) -> str:
    """Return the key of the manifest of a factor's eigendecomposition; the factor is given by its number in the plan."""
    return f"{DECOMPOSITIONS}/{version}/{factor}.json"


def tuning_key(version: str, chosen: Mapping[str, Any]) -> str:
    """Return the key of the manifest of a tuning."""
    return f"{TUNINGS}/{version}-{digest(chosen)}.json"


def tuning_shard_key(key: str, shard: str) -> str:
    """Return the key of one shard's scores; of a search in rounds the shard's id has `r<round>-` before it."""
    return f"{key.removesuffix('.json')}/{shard}.json"


def evaluation_key(version: str, chosen: Mapping[str, Any]) -> str:
    """Return the key of the metrics of an evaluation."""
    return f"{EVALUATIONS}/{version}-{digest(chosen)}.json"


def evaluation_shard_key(key: str, split: str, shard: str) -> str:
    """Return the key of one shard's manifest."""
    return f"{key.removesuffix('.json')}/{split}-{shard}.json"


def attempt_prefix(key: str, attempt: str) -> str:
    """Return the prefix under which one attempt at a manifest with this key writes its arrays."""
    return f"{key.removesuffix('.json')}/{attempt}"


MANIFEST = re.compile(
    r"(?:partials|parts|basis|posteriors|tuning|evaluation)/[^/]+\.json|window\.json"
    r"|(?:tuning|evaluation|decompositions)/[^/]+/[^/]+\.json"
)
# Attempt directories, and the temporary files of a crashed commit: only these are ever collected.
# Scores of a tuning's round lie under its key and their shard's, the prior precision that was chosen under the key alone.
ATTEMPT = re.compile(
    r"(tuning/[^/]+/r\d+-[^/]+/[^/]+|(?:partials|parts|basis|posteriors|tuning)/[^/]+/[^/]+"
    r"|(?:evaluation|decompositions)/[^/]+/[^/]+/[^/]+)/.+"
)

_DIGEST = r"[0-9a-f]{16}"
_PARTIAL = r"partials/\d{6,}(-g\d+)?(\.json|/.+)"
_OF_A_WINDOW = rf"plan\.json|window\.json|config\.yaml|{_PARTIAL}|parts/\d{{5,}}(\.json|/.+)|probe-[0-9a-f]{{32}}"
_OWNED = re.compile(
    rf"CURRENT\.json|recalibration/(lease|drift|{WINDOW_NAME}/decision)\.json|config\.yaml|{PROBE.pattern}"
    rf"|weights\.safetensors(\.index\.json)?|{WEIGHTS_SHARD.pattern}|evaluation/metrics\.json|report\.html"
    rf"|report/(numbers|spectra-{_DIGEST})\.json|coverage\.tsv|status/[0-9]{{8}}T[0-9]{{6}}-[0-9a-f]{{8}}\.json"
    rf"|jobs/[0-9a-f]{{32}}\.json"
    rf"|({WINDOWS}/{WINDOW_NAME}/)?({PASSES}/\w+/)?({_OF_A_WINDOW})|basis/\w+(\.json|/.+)"
    rf"|{TRAINING}/(weights\.safetensors|epochs/\d{{6,}}\.json|files/[0-9a-f]{{64}}\.safetensors)"
    rf"|posteriors/{_DIGEST}(\.json|/.+)|decompositions/{_DIGEST}/\d{{5,}}(\.json|/.+)"
    rf"|(tuning|evaluation)/{_DIGEST}-{_DIGEST}(\.json|/.+)"
)


# What lies directly under a checkpoint and is a folder of the run's.
FOLDERS = tuple(
    f"{name}/"
    for name in (
        *("recalibration", "windows", "passes", "basis", "partials", "parts", "posteriors", "decompositions"),
        *("tuning", "evaluation", "report", "status", "training", "jobs"),
    )
)


def owned(key: str) -> bool:
    """Say whether an object with this key is the run's own; whatever else lies beside it is the user's."""
    return bool(_OWNED.fullmatch(key))


_KINDS: dict[str, type[Strict]] = {
    r"plan\.json": PlanFields,
    r"weights\.safetensors\.index\.json": WeightsIndexFields,
    r"CURRENT\.json": CurrentFields,
    r"jobs/[^/]+\.json": LeaseFields,
    r"status/[^/]+\.json": StatusFields,
    r"report/spectra-[^/]+\.json": SpectraFields,
    r"recalibration/lease\.json": RecalibrationLeaseFields,
    r"recalibration/drift\.json": DriftFields,
    r"recalibration/[^/]+/decision\.json": RecalibrationFields,
    r"partials/[^/]+\.json": PartialFields,
    r"parts/[^/]+\.json": PartFields,
    r"window\.json": WindowFields,
    r"basis/[^/]+\.json": BasisFields,
    r"training/epochs/[^/]+\.json": EpochFields,
    r"posteriors/[^/]+\.json": VersionFields,
    r"decompositions/[^/]+/[^/]+\.json": DecompositionFields,
    r"tuning/[^/]+\.json": TuningFields,
    r"tuning/[^/]+/[^/]+\.json": TuningShardFields,
    r"evaluation/[^/]+\.json": EvaluationFields,
    r"evaluation/[^/]+/[^/]+\.json": EvaluationShardFields,
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
    if own.startswith(f"{PARTIALS}/"):
        return None  # compared with the attempt's id by `partial_manifests.parse_manifest`
    parts = [(f"{PARTS}/{name}", place) for name, place in values.get("parts", {}).items()]
    for owner, place in [(own, values), *((own, place) for place in values.get("factors", {}).values()), *parts]:
        prefix = place.get("prefix")
        if prefix is not None and not re.fullmatch(rf"{re.escape(owner)}/[^/]+", prefix):
            return f"its prefix {prefix!r} is not its own"
    return None


def remedy(key: str) -> str:
    """Say what to do about a bad object."""
    parts = key.split("/")
    does = {
        "partials": "it recomputes that segment",
        "parts": "it sums that part anew",
        "posteriors": "it takes the factors from the window's sum anew",
    }
    if parts[0] in does and len(parts) > 1:
        manifest = f"{parts[0]}/{parts[1].removesuffix('.json')}.json" + (
            f" and {WINDOW}" if parts[0] == "parts" else ""
        )
        return f"Restore it from a copy, or delete {manifest} and run the same command again: {does[parts[0]]}."
    if parts[0] == "decompositions" and len(parts) > 2:
        manifest = "/".join(parts[:2] + [f"{parts[2].removesuffix('.json')}.json"])
        return f"Restore it from a copy, or delete {manifest} and run the same command again: it decomposes that factor anew."
    if parts[0] in ("tuning", "evaluation") and len(parts) > 1:
        return f"Restore it from a copy, or delete everything under {parts[0]}/ and run the same command again."
    if parts[0] in ("report", "status", COVERAGE):
        return "Delete it: nothing depends on it, and jobs/report.py makes what belongs to the report anew."
    if parts[0] == TRAINING:
        return "Restore it from a copy, or start again with --fresh."
    if parts[0] == "basis":
        return "Restore it from a copy, or start again with --fresh: the sums of the second pass are in it."
    if key == DRIFT:
        return "Restore it from a copy, or delete it: the watch for drift then begins anew."
    if key == WINDOW:
        return "Restore it from a copy, or delete it and run the same command again: it puts the parts together anew."
    return "Restore it from a copy, or start again with --fresh."
