"""What a report is of: whether the page that is there is still the one that would be made now."""

from __future__ import annotations

import hashlib
import json

from laplace_dist.errors import MissingObjectError
from laplace_dist.run.layout import CURRENT, METRICS, NUMBERS, RECALIBRATIONS, REPORT, TRAINING
from laplace_dist.storage.store import Store


def subject(store: Store) -> str:
    """Return a digest of what a report is of: what is current, the latest metrics and epoch, what recalibrations have found."""
    found = hashlib.sha256()
    for key in (CURRENT, METRICS):
        found.update(store.read(key) if store.exists(key) else b"-")
    times = store.modified(RECALIBRATIONS)
    found.update(
        repr([(key, time.isoformat()) for key, time in times.items() if key.endswith("/decision.json")]).encode()
    )
    for key in store.list(f"{TRAINING}/epochs", recursive=False)[-1:]:  # of a training, which has nothing of the above
        found.update(store.read(key))
    return found.hexdigest()


def is_up_to_date(store: Store, evaluation: str | None = None) -> bool:
    """Say whether the page that is there shows what the run has come to.

    Args:
        store: The checkpoint.
        evaluation: Key of the evaluation that it should show, if not just the latest.
    """
    try:
        found = json.loads(store.read(NUMBERS))
    except (MissingObjectError, ValueError):
        return False
    if not isinstance(found, dict) or found.get("subject") != subject(store) or not store.exists(REPORT):
        return False
    return evaluation is None or (found.get("evaluation") or {}).get("key") == evaluation
