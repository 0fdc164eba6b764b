"""Verify: the checks of a verification as tasks, which write nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laplace_dist.plan.plan import Plan
from laplace_dist.run.checks import Check, Place
from laplace_dist.stages.context import Context


@dataclass(frozen=True)
class CarryOutCheck:
    """Carry out one check.

    Attributes:
        plan: Digest of the plan.
        number: Of the check among those of its kind.
        check: The check.
    """

    plan: str
    number: int
    check: Check

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"check of {self.check.what}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has the check's `number` and its `findings`."""
        place = Place(context.store, context.plan, context.unchecked_training_data)
        return {"number": self.number, "findings": place.find(self.check)}


def tasks(plan: Plan, checks: Sequence[Check]) -> list[CarryOutCheck]:
    """Return a task for every check."""
    return [CarryOutCheck(plan.digest, number, check) for number, check in enumerate(checks)]
