"""Writing a report: as the last task of a job, on a worker, or in the process of who asks for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from laplace_dist.run.layout import NUMBERS, REPORT
from laplace_dist.run.ownership import confirm, read_plan
from laplace_dist.stages.context import Context
from laplace_dist.storage.store import Store


def write_report(store: Store, evaluation: str | None = None) -> str:
    """Write the page and its numbers, over those that are there; returns where the page is.

    Args:
        store: The checkpoint.
        evaluation: Key of the evaluation to show; the latest of the current posterior if not given.

    Raises:
        SettingsError: There is no run.
        CheckpointError: Something that the report shows is truncated or altered.
    """
    from laplace_dist.report.html.facts import (
        facts,  # with scikit-learn and matplotlib, which no other part of a job needs
    )
    from laplace_dist.report.html.page import page

    found = facts(store, evaluation)
    text = page(found)
    confirm(store, read_plan(store))
    store.replace(NUMBERS, json.dumps(found, indent=1, allow_nan=False).encode())
    store.replace(REPORT, text.encode())
    return f"{store.url.rstrip('/')}/{REPORT}"


@dataclass(frozen=True)
class WriteReport:
    """Gather the numbers of a run and write its report.

    Attributes:
        plan: Digest of the plan.
        evaluation: Key of the evaluation to show, or None for the latest.
    """

    plan: str
    evaluation: str | None = None
    what = "report"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        write_report(context.store, self.evaluation)
        return {}
