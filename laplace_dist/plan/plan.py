"""The plan of a run, a pure function of lengths, settings and digests: which segments there are, and what they mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from laplace_dist.plan.digests import canonical
from laplace_dist.plan.groups import Group, plan_groups, units
from laplace_dist.plan.identity import different_examples
from laplace_dist.plan.parts import PART_ENTRIES, Part, Place, places, plan_parts
from laplace_dist.plan.segments import Segment, default_segment_size, plan_segments, whole_batches

FORMAT_VERSION = 2  # 1 is that of 0.1: its plans have no probe, its manifests no digest of the data and no environment


_OPTIONAL = ("run", "window", "further", "basis", "module_groups", "halved_from")


@dataclass(frozen=True)
class Plan:
    """What decides every bit of a run's result.

    Attributes:
        segments: In the order in which their partials are summed.
        settings: Those that change bits, by field name.
        data: Fingerprint of the training split: see `identity.fingerprint`.
        weights: Digest of the model's parameters and buffers.
        model: `path` and `args` of the callable that builds the model.
        spec: The factors: `name -> {"shape": [...], "symmetric": bool}` under `factors`, beside what else the core
            library's specification says of itself.
        probe: Sha256 of the model's inputs and outputs in `probe-….safetensors`; None where the inputs cannot be stored.
        part_entries: Size of a part, the unit of reduction.
        run: Id of the run, drawn when a job begins one: a run that was deleted and begun again with the same settings is
            another one, so that what workers of the first still write is not taken for the second one's. May be None.
        window: `name` and `number` of the window of data that the plan is of; the first window's number is 0. May be None.
        further: `name` and `spec` of the second pass over the data, of structures that take two; `spec` is then that of the
            first pass. May be None.
        basis: Of the plan of a second pass, its `name` and the `sha256` of the basis that its sums are in. May be None.
        module_groups: Number of passes over the data, each of which adds up a group of the factors; None is one. It changes
            how partials are stored and no bit of what they sum up to.
        halved_from: The batch size that was asked for, where no worker had the memory for it; the settings have the one that
            the run has. None where they have what was asked for.
    """

    segments: tuple[Segment, ...]
    settings: dict[str, Any]
    data: dict[str, Any]
    weights: str
    model: dict[str, Any]
    spec: dict[str, Any]
    format_version: int = FORMAT_VERSION
    probe: str | None = None
    part_entries: int = PART_ENTRIES
    run: str | None = None
    window: dict[str, Any] | None = None
    further: dict[str, Any] | None = None
    basis: dict[str, Any] | None = None
    module_groups: int | None = None
    halved_from: int | None = None

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of everything in the plan."""
        return hashlib.sha256(canonical(self.to_values())).hexdigest()

    @cached_property
    def content(self) -> str:
        """Return the sha256 of all that decides the result, which two runs may have in common."""
        return replace(self, run=None, window=None, module_groups=None, halved_from=None).digest

    @property
    def posterior_spec(self) -> dict[str, Any]:
        """The specification of the sums that a posterior is made of: those of the last pass."""
        return self.spec if self.further is None else self.further["spec"]

    @property
    def window_name(self) -> str:
        """Name of the window; that of a run of 0.1 is `0`."""
        return "0" if self.window is None else self.window["name"]

    @property
    def window_number(self) -> int:
        """Place of the window in the order in which windows were begun."""
        return 0 if self.window is None else self.window["number"]

    @property
    def run_id(self) -> str:
        """What the plans of the run's other windows name the run by."""
        return self.run or self.digest[:32]

    @cached_property
    def places(self) -> list[Place]:
        """Return where the factors lie in the vector that the parts are cut from."""
        return places(self.spec)

    @cached_property
    def parts(self) -> list[Part]:
        """Return the units of reduction."""
        return plan_parts(self.spec, self.part_entries)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Return the module groups."""
        return plan_groups(self.spec, self.module_groups or 1)

    @cached_property
    def units(self) -> tuple[Segment, ...]:
        """Return the units of work, in the order in which they are begun: one group of one segment's sums each."""
        return units(self.segments, len(self.groups))

    @cached_property
    def units_by_id(self) -> dict[str, Segment]:
        """Return the units of work by their ids."""
        return {unit.id: unit for unit in self.units}

    @property
    def n_examples(self) -> int:
        """Return the number of examples that the segments cover."""
        return self.segments[-1].stop

    @property
    def n_data(self) -> float:
        """Return the number of examples that the sums are of: the sum of their weights, where they have any."""
        return self.n_examples if (weights := self.data.get("weights")) is None else weights["sum"]

    def to_values(self) -> dict[str, Any]:
        """Return the plan as plain values, those that its format has."""
        absent = {name for name in _OPTIONAL if getattr(self, name) is None}
        if self.format_version == 1:
            absent |= {"probe", "part_entries"}
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in absent}
        return {
            **values,
            "segments": [dict(vars(segment)) for segment in self.segments],
        }  # asdict takes seconds for 100,000

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_values` gave these values."""
        return cls(**{**values, "segments": tuple(Segment(**segment) for segment in values["segments"])})


def build_plan(
    settings: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    weights: str,
    model: Mapping[str, Any],
    spec: Mapping,
    probe: str | None = None,
    run: str | None = None,
    window: Mapping[str, Any] | None = None,
    further: Mapping[str, Any] | None = None,
    module_groups: int = 1,
    halved_from: int | None = None,
) -> Plan:
    """Return the plan for these settings and digests; a segment size that is not given gets its default.

    Args:
        settings: `Config.bits()`.
        data: `fingerprint(dataset)` of the training split, with `example_weights.facts` as its `weights` if it has any.
        weights: `weights_digest(model)`.
        model: `{"path": config.model, "args": config.model_args}`.
        spec: Plain dictionary of the core library's specification of the sums.
        probe: Sha256 of `probe.safetensors`.
        run: Id of the run that it begins, or that it is another window of.
        window: `name` and `number` of the window.
        further: `name` and `spec` of the second pass.
        module_groups: Number of module groups.
        halved_from: The batch size that was asked for, where it was halved.

    Raises:
        SettingsError: The data set is empty or a size is below 1.
    """
    settings = dict(settings)
    length, batch_size, size = data["length"], settings["batch_size"], settings["segment_size"]
    segments = plan_segments(length, default_segment_size(length, batch_size) if size is None else size, batch_size)
    settings["segment_size"] = min(whole_batches(size, batch_size), length) if size else segments[0].stop
    plain = json.loads(canonical({"data": data, "model": model, "spec": spec, "further": further}))
    own = {
        "weights": weights,
        "probe": probe,
        "part_entries": PART_ENTRIES,
        "run": run,
        "window": window and dict(window),
        "module_groups": None if module_groups == 1 else module_groups,
        "halved_from": halved_from,
    }
    return Plan(segments=tuple(segments), settings=settings, **own, **plain)


def differences(stored: Plan, wanted: Plan) -> list[str]:
    """Name every field in which two plans differ, with both values: `field: stored ..., now ...`.

    Of a plan of an older format only what it has is compared.
    """
    found = []
    stored, wanted = _with_samples(stored), _with_samples(wanted)
    names = stored.settings.keys() if stored.format_version < wanted.format_version else wanted.settings.keys()
    for name in sorted(stored.settings.keys() | names):
        flag = "device" if name == "device_type" else name.replace("_", "-")
        _compare(found, f"--{flag}", stored.settings.get(name), wanted.settings.get(name))
    _compare(found, "--model", stored.model.get("path"), wanted.model.get("path"))
    _compare(found, "--model-args", stored.model.get("args"), wanted.model.get("args"))
    lengths = stored.data["length"], wanted.data["length"]
    if lengths[0] != lengths[1]:
        found.append(f"--data: the train split's length changed: stored {lengths[0]} examples, now {lengths[1]}")
    else:
        _compare_data(found, stored.data, wanted.data)
    _compare_example_weights(found, stored.data.get("weights") or {}, wanted.data.get("weights") or {})
    _compare(found, "--weights (values, as sha256)", stored.weights, wanted.weights)
    if not found:
        if not same_sums(stored.spec, wanted.spec):
            _compare(
                found, "factors of the curvature", canonical(stored.spec).decode(), canonical(wanted.spec).decode()
            )
        if not _same_pass(stored.further, wanted.further):
            _compare(found, "second pass", stored.further, wanted.further)
        _compare(found, "segments", len(stored.segments), len(wanted.segments))
    return found


def same_sums(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Say whether two specifications are of the same sums, whatever words the core library has for the reasons."""
    return _without_reasons(one) == _without_reasons(two)


def _without_reasons(spec: Mapping[str, Any]) -> dict[str, Any]:
    blocks = [{name: value for name, value in block.items() if name != "reason"} for block in spec.get("blocks", ())]
    return {**spec, "blocks": blocks}


def _same_pass(one: Mapping[str, Any] | None, two: Mapping[str, Any] | None) -> bool:
    if one is None or two is None:
        return one is two
    return one["name"] == two["name"] and same_sums(one["spec"], two["spec"])


def _with_samples(plan: Plan) -> Plan:
    """Return a plan that says how many labels are drawn; plans that do not are of runs that drew one."""
    if plan.settings.get("estimator") != "mc":
        return plan
    return replace(plan, settings={"mc_samples": 1, **plan.settings})


def _compare_data(found: list[str], stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the contents of two data sets of one length."""
    if stored["sha256"] != wanted["sha256"]:
        which = different_examples(stored, wanted)
        say = f"--data (contents, as sha256): stored {stored['sha256']!r}, now {wanted['sha256']!r}"
        found.append(f"{say}; {which}" if which else say)


def _compare_example_weights(found: list[str], stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the weights of the examples of two data sets; an empty mapping is that there are none."""
    _compare(found, "--example-weights", stored.get("name"), wanted.get("name"))
    if stored and wanted:
        _compare(found, "--example-weights (values, as sha256)", stored["sha256"], wanted["sha256"])


def _compare(found: list[str], field: str, stored: Any, wanted: Any) -> None:
    if stored != wanted:
        found.append(f"{field}: stored {stored!r}, now {wanted!r}")
