"""All numbers of a report, gathered from a checkpoint: plain values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from laplace_dist import __version__
from laplace_dist.errors import MissingObjectError, SettingsError, listed
from laplace_dist.plan.plan import Plan
from laplace_dist.report.html.calibration import calibration
from laplace_dist.report.html.columns import Evaluated, evaluated, latest
from laplace_dist.report.html.fitted import fitted
from laplace_dist.report.html.history import decisions, history
from laplace_dist.report.html.metrics import table
from laplace_dist.report.html.regression import regression
from laplace_dist.report.html.running import running
from laplace_dist.report.html.slices import slices
from laplace_dist.report.html.subject import subject
from laplace_dist.report.html.training import of_training
from laplace_dist.report.html.tuned import tuned
from laplace_dist.run.evaluations import committed_evaluations
from laplace_dist.run.ownership import read_plan, refuse_no_run
from laplace_dist.run.pointer import read_current
from laplace_dist.run.spectra import spectra
from laplace_dist.run.training import is_training
from laplace_dist.storage.store import Store

SEED = 0  # of the bootstrap
SECTIONS = ("metrics", "calibration", "regression", "slices")


def facts(store: Store, evaluation: str | None = None) -> dict[str, Any]:
    """Return the numbers of a report, by section; what a run does not have is None, and a note says why where that matters.

    Args:
        store: The checkpoint.
        evaluation: Key of the evaluation to show; the latest of the current posterior if not given.

    Raises:
        SettingsError: There is no run, or no such evaluation of it.
        CheckpointError: Something that the report shows is truncated or altered.
    """
    refuse_no_run(store)
    plan = read_plan(store)
    made = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "laplace_dist": __version__, "seed": SEED}
    if not is_training(plan):
        _refuse_unknown(store, evaluation)
        return plain({"made": made, "subject": subject(store), **_of_fit(store, plan, evaluation)})
    if evaluation is not None:
        raise SettingsError(
            f"--evaluation: got {evaluation!r}, but the run at {store.url!r} is a training, which has no "
            "evaluations. Leave it out."
        )
    return plain({"made": made, "subject": subject(store), **of_training(store, plan)})


def _refuse_unknown(store: Store, evaluation: str | None) -> None:
    there = committed_evaluations(store)
    if evaluation is not None and evaluation not in there:
        raise SettingsError(
            f"--evaluation: got {evaluation!r}, and {store.url!r} has no such evaluation; it has {listed(there)}. Give one of "
            "these, or leave it out for the latest."
        )


def _of_fit(store: Store, plan: Plan, evaluation: str | None) -> dict[str, Any]:
    current, notes = _current(store)
    found = decisions(store, plan)
    version, tuning = current.get("version"), current.get("tuning")
    key = evaluation if evaluation is not None else latest(store, plan, current, found) if current else None
    shown = _evaluated(store, plan, key, found, notes)
    return {
        "fitted": fitted(store, plan, version),
        "evaluation": None if shown is None else {"key": shown.key, "settings": shown.settings},
        **dict.fromkeys(SECTIONS),
        **({} if shown is None else _sections(shown)),
        "tuned": _tuned(store, tuning, notes),
        "spectra": [] if version is None else spectra(store, plan, version),
        "history": history(store, plan, current, found),
        "running": running(store, plan, version),
        "notes": notes,
    }


def _sections(shown: Evaluated) -> dict[str, Any]:
    return {
        "metrics": table(shown, SEED),
        "calibration": calibration(shown.columns),
        "regression": regression(shown.columns),
        "slices": slices(shown, SEED),
    }


def _current(store: Store) -> tuple[Mapping[str, Any], list[str]]:
    try:
        return read_current(store), []
    except MissingObjectError:
        return {}, ["The run has no posterior yet: run its fit job to the end."]


def _evaluated(
    store: Store, plan: Plan, key: str | None, found: list[dict[str, Any]], notes: list[str]
) -> Evaluated | None:
    """Return the evaluation with its columns; the other side of the recalibration that it belongs to is one of them."""
    if key is None and notes:  # without a posterior there is nothing to evaluate
        return None
    if key is None:
        notes.append("No evaluation of the current posterior is there: run jobs/evaluate.py.")
        return None
    other = None
    for decision in found:
        sides = {"previous": decision["current"]["evaluation"], "candidate": decision["candidate"]["evaluation"]}
        if key in sides.values() and len(set(sides.values())) == 2:
            other = next((name, beside) for name, beside in sides.items() if beside != key)
    shown = evaluated(store, plan, key, other)
    notes += shown.notes
    return shown


def _tuned(store: Store, key: str | None, notes: list[str]) -> dict[str, Any] | None:
    try:
        return tuned(store, key)
    except MissingObjectError:
        notes.append("The tuning of the current posterior is not there: run jobs/tune.py.")
        return None


def plain(values: Any) -> Any:
    """Return values that JSON can hold; numbers that are not finite become None."""
    if isinstance(values, Mapping):
        return {str(name): plain(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values
