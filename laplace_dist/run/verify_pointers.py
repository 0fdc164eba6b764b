"""The part of a verification that is about what says which version, tuning and metrics are in force."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from laplace_dist.errors import CheckpointError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, versions
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.combination import alone
from laplace_dist.run.findings import Checker
from laplace_dist.run.pointer import read_current
from laplace_dist.run.verify_sums import SumsCheck


def check_pointers(checker: Checker, plan: Plan, whole: Sequence[str], sums: SumsCheck) -> None:
    """Check that what is in force is there and says what it was made of, and note what is committed and not yet in force.

    Args:
        checker: Of the verification.
        plan: Of the run.
        whole: Names of the posterior versions whose arrays are whole.
        sums: What was found of the sums of the first window.
    """
    if whole or layout.CURRENT in checker.keys:
        _check_partials(checker, plan, sums)
    if layout.CURRENT in checker.keys:
        _check_current(checker, plan, sums)
    elif whole and not checker.store.exists(layout.CURRENT):  # which a job that runs beside this may have just written
        _no_current(checker)
    if layout.METRICS in checker.keys:
        checker.attempt(layout.METRICS, lambda: _check_metrics(checker))
    elif any(re.fullmatch(rf"{layout.EVALUATIONS}/[^/]+\.json", key) for key in checker.keys):
        text = f"{layout.METRICS} is missing: the evaluation is committed and not yet shown. Run its job again."
        checker.found.notes.append((layout.METRICS, text))
    _note_unmerged(checker)


def _check_partials(checker: Checker, plan: Plan, sums: SumsCheck) -> None:
    """Look that no partial is missing of a run with a posterior, unless they were dropped."""
    for key in [layout.partial_key(unit.id) for unit in plan.units]:
        if not sums.dropped and checker.missing(key):
            text = (
                f"{key} is missing, though the run has a posterior. Run the fit job again: it recomputes that segment."
            )
            checker.found.problem(key, text)


def _check_current(checker: Checker, plan: Plan, sums: SumsCheck) -> None:
    """Check the pointer, that what it names is there, and after a fit that its version is the window's sum."""
    current = checker.attempt(layout.CURRENT, lambda: read_current(checker.store))
    if current is None:
        return
    for key in (f"{layout.POSTERIORS}/{current['version']}.json", current["tuning"]):
        if key is not None and checker.missing(key):
            checker.found.problem(key, f"{key} is missing, and {layout.CURRENT} names it. Run the fit job again.")
    if sums.window is None or current.get("history") or plan.further is not None:
        return
    wanted = versions.version_of(alone(checker.store, plan, sums.window))
    if wanted != current["version"]:
        text = f"it names version {current['version']}, but the window's sum makes {wanted}"
        checker.found.problem(layout.CURRENT, f"{layout.CURRENT}: {text}. Run the fit job again.")


def _no_current(checker: Checker) -> None:
    """Say that a run with a posterior has no pointer: a problem once the posterior was used."""
    if any(key.startswith((f"{layout.TUNINGS}/", f"{layout.EVALUATIONS}/")) for key in checker.keys):
        text = f"{layout.CURRENT} is missing, though its posterior was used. Run the fit job again: it writes it anew."
        checker.found.problem(layout.CURRENT, text)
    else:
        text = f"{layout.CURRENT} is missing: the posterior is committed and not yet in force. Run the fit job again."
        checker.found.notes.append((layout.CURRENT, text))


def _check_metrics(checker: Checker) -> None:
    """Check that `evaluation/metrics.json`, which carries no digest, repeats a sealed evaluation."""
    store = checker.store
    shown = json.loads(store.read(layout.METRICS))
    version = shown.pop("version")
    tuning = shown.pop("tuning")
    pattern = re.compile(rf"{layout.EVALUATIONS}/{re.escape(str(version))}-[^/]+\.json")
    for key in filter(pattern.fullmatch, store.list(layout.EVALUATIONS, recursive=False)):
        sealed = checker.attempt(key, lambda k=key: open_json(store.read(k), k))
        if sealed and sealed["metrics"] == shown and sealed["settings"]["tuning"] == tuning:
            return
    raise CheckpointError(
        f"{layout.METRICS} repeats no evaluation of this run: it was altered. Run the evaluate job again."
    )


def _note_unmerged(checker: Checker) -> None:
    """Note shards of tuning and evaluation that no manifest was made of: a crash before, or a deletion after."""
    shards = [re.fullmatch(r"((?:tuning|evaluation)/[^/]+)/[^/]+\.json", key) for key in checker.keys]
    for stem in sorted({match[1] for match in shards if match}):
        if (key := f"{stem}.json") not in checker.keys:
            text = f"{key} is missing: its shards are committed and not yet merged. Run its job again."
            checker.found.notes.append((key, text))
