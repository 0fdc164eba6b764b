"""Watch for drift: the current posterior on fresh data against the evaluation by which it was accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from laplace.drift import exchangeability
from laplace.drift.changes import changes
from laplace.drift.confidence import estimates
from laplace.drift.features import Distance, fit_distance
from laplace.drift.labels import estimated_proportions, proportions
from laplace.drift.spectra import relative_distance, spectrum
from laplace_dist.errors import listed
from laplace_dist.run import versions
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.combination import terms_of
from laplace_dist.run.evaluations import MONITOR, joined_scores
from laplace_dist.stages.context import Context

FALSE_ALARMS = 0.05  # probability of any false alarm over a whole schedule, whatever its length
LARGEST = 1024  # dimensions of a factor whose spectrum is compared; its cost grows with their cube
_WITH_LABELS = ("nll", "labels")  # of these streams; the others can be watched on examples without labels too

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class MeasureDrift:
    """Look at the fresh examples, and estimate what has changed.

    Attributes:
        plan: Digest of the plan.
        state: As `run.monitoring` keeps it; without streams it is the beginning of one.
        fresh: Key of the current posterior's evaluation on the fresh data.
        unlabelled: Name of a split without labels that stands for them where labels do not matter, or None.
        draws: Of the bootstrap.
        level: One-sided level of each end of an interval.
        seed: Of what is drawn.
    """

    plan: str
    state: dict[str, Any]
    fresh: str
    unlabelled: str | None
    draws: int
    level: float
    seed: int
    what = "comparison of fresh data with those of the last promotion"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has the record, and what is to be kept for the next look."""
        before = open_json(context.store.read(self.state["evaluation"]), self.state["evaluation"])
        now = open_json(context.store.read(self.fresh), self.fresh)
        split = self.unlabelled if self.unlabelled in now["shards"] else "test"
        reference = _scores(context, self.state["evaluation"], before, "test")
        labelled = _scores(context, self.fresh, now, "test")
        latest = labelled if split == "test" else _scores(context, self.fresh, now, split)
        digests = {name: now["settings"]["data"][name]["sha256"] for name in {"test", split}}
        seen = {*self.state["seen"], before["settings"]["data"]["test"]["sha256"]}
        streams, distance = self._begun(reference, before["settings"]["data"]["test"]["length"])
        looked, passed_over = {}, {}
        for name, stream in streams.items():
            source, scores = ("test", labelled) if name in _WITH_LABELS else (split, latest)
            values = _values(name, scores, distance, now["settings"]["data"][source]["length"])
            if digests[source] in seen:
                passed_over[name] = f"the examples of {source} are no new ones"
            elif values is None or not len(values) or not bool(torch.isfinite(values).all()):
                passed_over[name] = f"the examples of {source} have no such number each, or one that is not finite"
            else:
                looked[name] = exchangeability.look(stream, values, self.seed)
        streams |= looked
        seen |= {digests["test" if name in _WITH_LABELS else split] for name in looked}
        record = {
            "false_alarms": FALSE_ALARMS,
            "reference": {name: self.state[name] for name in ("number", "version", "tuning", "evaluation")},
            "examples": {"reference": len(reference["nll"]), "test": len(labelled["nll"]), "latest": split},
            "streams": {name: self._shown(stream, len(streams), name in looked) for name, stream in streams.items()},
            "passed_over": passed_over,
        }
        if looked:
            record |= self._changes(reference, labelled, latest)
        kept = {name: stream.to_plain() for name, stream in streams.items()}
        plain = None if distance is None else distance.to_plain()
        return {"record": record, "streams": kept, "distance": plain, "seen": sorted(seen)}

    def _begun(self, reference: Scores, examples: int) -> tuple[dict[str, exchangeability.Stream], Distance | None]:
        """Return the streams with the distance of features: those that are kept, or from the reference."""
        if self.state["streams"]:
            kept = self.state["distance"]
            found = {name: exchangeability.Stream.from_plain(s) for name, s in self.state["streams"].items()}
            return found, None if kept is None else Distance.from_plain(kept)
        features, distance = reference.get("features"), None
        if features is not None and bool(torch.isfinite(features).all()):
            predicted = reference.get("predicted")
            one_each = predicted is not None and len(predicted) == len(features)
            distance = fit_distance(features[::2], predicted[::2] if one_each else None)
        values = {name: _values(name, reference, distance, examples) for name in ("entropy", "features", *_WITH_LABELS)}
        usable = {n: v for n, v in values.items() if v is not None and len(v) > 1 and bool(torch.isfinite(v).all())}
        return {name: exchangeability.begin(value) for name, value in usable.items()}, distance

    def _shown(self, stream: exchangeability.Stream, streams: int, looked: bool) -> dict[str, Any]:
        alpha = exchangeability.share(FALSE_ALARMS, self.state["number"], streams)
        limit = exchangeability.threshold(alpha)
        evidence = stream.log_evidence
        return {
            "looks": stream.looks,
            "log_evidence": evidence,
            "log_threshold": limit,
            "alarm": looked and evidence >= limit,
        }

    def _changes(self, reference: Scores, labelled: Scores, latest: Scores) -> dict[str, Any]:
        found = changes(reference, labelled, draws=self.draws, level=self.level, seed=self.seed)
        record: dict[str, Any] = {"changes": {name: asdict(change) for name, change in found.items()}}
        if "label" in reference and "label" in labelled and "predicted" in latest:
            top = max(float(scores[n].max()) for scores in (reference, labelled) for n in ("label", "predicted"))
            classes = 1 + int(max(top, float(latest["predicted"].max())))
            record["labels"] = {"before": proportions(reference["label"], classes).tolist()}
            record["labels"]["now"] = proportions(labelled["label"], classes).tolist()
            if latest is not labelled:
                shares = estimated_proportions(reference["label"], reference["predicted"], latest["predicted"], classes)
                record["labels"]["estimated_without_labels"] = shares.tolist()
        if {"confidence", "entropy"} <= reference.keys():
            of = {"test": labelled} if latest is labelled else {"test": labelled, self.unlabelled: latest}
            record["estimated_without_labels"] = {name: estimates(reference, scores) for name, scores in of.items()}
        return record


@dataclass(frozen=True)
class CompareSpectra:
    """Compare the factors of the new window, per example, with those of the current posterior.

    Attributes:
        plan: Digest of the plan.
        version: The current posterior.
        n_data: Number of examples, weighted, that it is of.
    """

    plan: str
    version: str
    n_data: float
    what = "comparison of spectra"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has the relative distance of every factor, and the names of those that are too large."""
        store, plan, window = context.store, context.plan, context.window
        terms = terms_of([(window, 1.0)])
        current = versions.read_version(store, plan, self.version)
        found, large = {}, []
        for name, factor in plan.posterior_spec["factors"].items():
            if factor["symmetric"] and factor["shape"][-1] > LARGEST:
                large.append(name)
                continue
            old = versions.read_factor(store, current, name)
            new = torch.from_numpy(versions.factors_of(terms, [name])[name])
            one = spectrum(new, window.plan.n_data, symmetric=factor["symmetric"])
            distance = relative_distance(one, spectrum(old, self.n_data, symmetric=factor["symmetric"]))
            found[name] = distance if isfinite(distance) else None
        return {"spectra": {"relative_distance": found, "too_large": large}}


def looked(state: Mapping[str, Any], name: str, fresh: str, receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state after a look, with its record; what was noticed once stays so until there is another reference.

    Args:
        state: Before it.
        name: Of the recalibration.
        fresh: Key of the evaluation that was looked at.
        receipts: Of the tasks above.
    """
    found = {name: value for receipt in receipts for name, value in receipt.items()}
    alarms = {stream: name for stream, shown in found["record"]["streams"].items() if shown["alarm"]}
    noticed = {**alarms, **state["noticed"]}
    record = {**found["record"], "spectra": found.get("spectra"), "noticed": noticed}
    new = {key: found[key] for key in ("streams", "distance", "seen")}
    return {**state, **new, "noticed": noticed, "last": {"name": name, "evaluation": fresh, "record": record}}


def said(record: Mapping[str, Any], name: str) -> list[str]:
    """Return in a person's words what a look has noticed first, and what it could not look at.

    Args:
        record: Of the look.
        name: Of its recalibration.
    """
    new = [stream for stream, at in record["noticed"].items() if at == name]
    lines = [f"drift: {stream} is not what it was when the current posterior was accepted" for stream in new]
    reasons: dict[str, list[str]] = {}
    for stream, why in record.get("passed_over", {}).items():
        reasons.setdefault(why, []).append(stream)
    return [*lines, *(f"drift: not looked at {listed(streams)}: {why}" for why, streams in reasons.items())]


def _scores(context: Context, key: str, evaluation: Mapping[str, Any], split: str) -> dict[str, Tensor]:
    ids = evaluation["shards"][split]
    return {
        name: values
        for method in ("laplace", MONITOR)
        for name, values in joined_scores(context.store, key, split, ids, method).items()
    }


def _values(name: str, scores: Scores, distance: Distance | None, examples: int) -> Tensor | None:
    """Return the scores of a stream, one per example, since only examples are exchangeable; None where there are none."""
    values = scores.get({"labels": "label", "nll": "loss"}.get(name, name))
    if values is None or len(values) != examples or (name == "features" and distance is None):
        return None
    return distance(values) if name == "features" else values
