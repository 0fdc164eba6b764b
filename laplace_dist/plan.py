"""The plan of a run, a pure function of lengths, settings and digests: which segments there are, and what they mean."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.schemas import problem

FORMAT_VERSION = 1


@dataclass(frozen=True, order=True)
class Segment:
    """A contiguous range of examples, `start <= i < stop`: the unit of work and of loss."""

    id: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What decides every bit of a run's result.

    Attributes:
        segments: In the order in which their partials are summed.
        settings: Those that change bits, by field name.
        data: Fingerprint of the training split: `length` and `sha256`.
        weights: Digest of the model's parameters and buffers.
        model: `path` and `args` of the callable that builds the model.
        spec: The factors: `name -> {"shape": [...], "symmetric": bool}` under `factors`, beside what else the core
            library's specification says of itself.
    """

    segments: tuple[Segment, ...]
    settings: dict[str, Any]
    data: dict[str, Any]
    weights: str
    model: dict[str, Any]
    spec: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of everything in the plan."""
        return hashlib.sha256(_canonical(asdict(self))).hexdigest()

    @property
    def n_examples(self) -> int:
        """Return the number of examples that the segments cover."""
        return self.segments[-1].stop

    def to_json(self) -> bytes:
        """Return the plan as sealed JSON."""
        return seal_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, key: str = "plan.json") -> Plan:
        """Read a plan back.

        Args:
            data: What `to_json` returned.
            key: Name of the object, for messages.

        Raises:
            SettingsError: It was written by a newer version.
            CheckpointError: It was truncated or altered.
        """
        values = open_json(data, key)
        values["segments"] = tuple(Segment(**segment) for segment in values["segments"])
        return cls(**values)


def build_plan(
    settings: Mapping[str, Any], *, data: Mapping[str, Any], weights: str, model: Mapping[str, Any], spec: Mapping
) -> Plan:
    """Return the plan for these settings and digests; a segment size that is not given gets its default.

    Args:
        settings: `Config.bits()`.
        data: `fingerprint(dataset)` of the training split.
        weights: `weights_digest(model)`.
        model: `{"path": config.model, "args": config.model_args}`.
        spec: Plain dictionary of the core library's specification of the sums.

    Raises:
        SettingsError: The data set is empty or a size is below 1.
    """
    settings = dict(settings)
    length, batch_size, size = data["length"], settings["batch_size"], settings["segment_size"]
    segments = plan_segments(length, default_segment_size(length, batch_size) if size is None else size, batch_size)
    settings["segment_size"] = min(_whole_batches(size, batch_size), length) if size else segments[0].stop
    plain = json.loads(_canonical({"data": data, "model": model, "spec": spec}))
    return Plan(segments=tuple(segments), settings=settings, weights=weights, **plain)


def plan_segments(n: int, segment_size: int, batch_size: int) -> list[Segment]:
    """Cut `range(n)` into segments of equal size, the last one possibly shorter.

    Args:
        n: Number of examples.
        segment_size: Examples per segment, rounded up to whole batches so that batches do not depend on it.
        batch_size: Examples per batch.

    Raises:
        SettingsError: A number is below 1.
    """
    if n < 1:
        raise SettingsError(f"--data: got an empty data set ({n} examples in the train split); expected at least 1")
    for flag, value in (("--segment-size", segment_size), ("--batch-size", batch_size)):
        if value < 1:
            raise SettingsError(f"{flag}: got {value}; expected at least 1 example")
    step = _whole_batches(segment_size, batch_size)
    return [Segment(f"{i:06d}", start, min(start + step, n)) for i, start in enumerate(range(0, n, step))]


def default_segment_size(n: int, batch_size: int) -> int:
    """Return the segment size, in examples, that is used when none is given.

    A segment ends in a commit: pack, compress, flush, read back. On one core it costs about 25 ns per entry of a d x d
    factor (0.4 s for d = 4096), and a fixed 3 ms per factor. A batch of 256 in an exact GGN fit of 10 classes takes
    some 20 products of 256 x d by d x d for the passes and the Gram matrices, at 50 GFLOP/s about 200 ns per entry, of
    two factors. So a commit to a directory costs about a quarter of a batch; to an object store, with some sixty
    requests, half a batch. 32 batches per segment keep both under 2 % of the time. It is more where a batch is cheap
    beside its factors: one output, small batches, a GPU. Give the segment size there.

    Against that stand the balance between workers and the work lost in a crash, which want many segments. The rule:

    * about 32 batches per segment; fewer, twice the square root of their number, where there are less than 256 batches
      in all and the whole fit is short;
    * more than 32 where there would otherwise be more than 4096 segments;
    * segments of even size whose number is a multiple of 4 where whole batches allow it, so that 2 or 4 workers
      finish together.

    Args:
        n: Number of examples.
        batch_size: Examples per batch.
    """
    batches = max(1, math.ceil(n / batch_size))
    wanted = max(min(32, 2 * (math.isqrt(batches - 1) + 1)), math.ceil(batches / 4096))
    count = 4 * math.ceil(math.ceil(batches / wanted) / 4)
    return math.ceil(batches / count) * batch_size


def differences(stored: Plan, wanted: Plan) -> list[str]:
    """Name every field in which two plans differ, with both values: `field: stored ..., now ...`."""
    found = []
    for name in sorted(stored.settings.keys() | wanted.settings.keys()):
        _compare(found, f"--{name.replace('_', '-')}", stored.settings.get(name), wanted.settings.get(name))
    _compare(found, "--model", stored.model.get("path"), wanted.model.get("path"))
    _compare(found, "--model-args", stored.model.get("args"), wanted.model.get("args"))
    lengths = stored.data["length"], wanted.data["length"]
    if lengths[0] != lengths[1]:
        found.append(f"--data: the train split's length changed: stored {lengths[0]} examples, now {lengths[1]}")
    else:
        _compare(found, "--data (contents, as sha256)", stored.data["sha256"], wanted.data["sha256"])
    _compare(found, "--weights (values, as sha256)", stored.weights, wanted.weights)
    if not found:
        _compare(found, "factors of the curvature", _canonical(stored.spec).decode(), _canonical(wanted.spec).decode())
        _compare(found, "segments", len(stored.segments), len(wanted.segments))
    return found


# ------------------------------------------------------------------ JSON objects


def seal_json(values: Mapping[str, Any]) -> bytes:
    """Return readable JSON that carries the sha256 of its own content under `sha256`."""
    digest = hashlib.sha256(_canonical(values)).hexdigest()
    return json.dumps({**values, "sha256": digest}, indent=1, allow_nan=False).encode()


def open_json(data: bytes, key: str) -> dict[str, Any]:
    """Read what `seal_json` returned, without the digest.

    Raises:
        SettingsError: Its `format_version` is newer than this package's.
        CheckpointError: It was truncated or altered, or has not the fields of its kind; the message names `key`.
    """
    remedy = "Restore it from a copy" + (
        ", or delete it and run the same command again." if "/" in key else ", or start again with --fresh."
    )
    try:
        values = json.loads(data)
        digest = values.pop("sha256")
        content = hashlib.sha256(_canonical(values)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{key} is truncated or altered: it is not a sealed JSON object. {remedy}") from error
    version = values.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise SettingsError(
            f"{key} has format_version {version}; this version of laplace_dist reads up to {FORMAT_VERSION}. "
            "Install the newer version that wrote it, or give another --checkpoint."
        )
    if digest != content:
        raise CheckpointError(f"{key} is truncated or altered: its content does not have the sha256 in it. {remedy}")
    if wrong := problem(key, values):
        raise CheckpointError(f"{key} is altered or of another version: {wrong}. {remedy}")
    return values


def _canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _whole_batches(size: int, batch_size: int) -> int:
    return math.ceil(size / batch_size) * batch_size


def _compare(found: list[str], field: str, stored: Any, wanted: Any) -> None:
    if stored != wanted:
        found.append(f"{field}: stored {stored!r}, now {wanted!r}")
