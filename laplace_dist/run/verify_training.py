"""The part of a verification that is about a training by empirical Bayes: its epochs, and the files that the last one names."""

from __future__ import annotations

from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, training
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.findings import Checker
from laplace_dist.run.weights import is_sealed


def check_training(checker: Checker, plan: Plan) -> None:
    """Check every epoch's manifest, that none is missing between others, and the files of the last one.

    Args:
        checker: Of the verification.
        plan: Of the run.
    """
    keys = sorted(key for key in checker.keys if key.startswith(f"{layout.TRAINING}/epochs/"))
    for key in keys:
        found = checker.attempt(key, lambda key=key: open_json(checker.store.read(key), key))
        if found is not None:
            checker.found.came_from(found)
    if not keys or any(key in keys for key, _ in checker.found.problems):
        return
    history = checker.attempt(keys[-1], lambda: training.epochs(checker.store, plan)) or []
    for digest in {history[-1].state, history[-1].best} - {None} if history else ():
        key = layout.training_file_key(digest)
        checker.attempt(key, lambda digest=digest: training.read_file(checker.store, digest))
    key = layout.TRAINED
    if key in checker.keys and not is_sealed(checker.store.read(key)):
        checker.found.problem(key, f"{key} is truncated or altered. Run the job again: it writes it anew.")
