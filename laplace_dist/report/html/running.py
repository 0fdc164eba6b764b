"""How the run went: its jobs, their stages, the workers over time, what was done again, what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laplace_dist.plan.plan import Plan
from laplace_dist.run import journal
from laplace_dist.run.versions import read_version
from laplace_dist.storage.store import Store

SHOWN = 12  # jobs, the newest


def running(store: Store, plan: Plan, version: str | None) -> dict[str, Any]:
    """Return the records of the newest jobs, and the sizes of what they have left.

    Args:
        store: The checkpoint.
        plan: Of the run.
        version: The posterior version, whose stored bytes are counted.
    """
    jobs = [_job(record) for record in journal.records(store, plan, SHOWN)]
    return {"jobs": jobs, "stored": _stored(store, plan, version)}


def _job(record: Mapping[str, Any]) -> dict[str, Any]:
    stages = [{**stage, "rate": _rate(stage)} for stage in record["stages"] if stage["stage"] != "report"]
    totals = {name: sum(stage[name] for stage in stages) for name in ("retries", "lost", "bytes")}
    names = ("job", "window", "node", "begun", "state", "why", "seconds")
    return {**{name: record[name] for name in names}, **totals, "stages": stages, "workers": record["workers"]}


def _rate(stage: Mapping[str, Any]) -> float | None:
    return stage["examples"] / stage["seconds"] if stage["examples"] and stage["seconds"] else None


def _stored(store: Store, plan: Plan, version: str | None) -> dict[str, int]:
    if version is None:
        return {}
    manifest = read_version(store, plan, version)
    factors = sum(place["entry"]["stored_bytes"] for place in manifest["factors"].values())
    return {"factors": len(manifest["factors"]), "bytes": factors}
