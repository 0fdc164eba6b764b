"""A model of a test's own making, as a plan that the dense reference can examine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .dense_reference import doubled
from .random_models import RIGHT, Case, Plan


@dataclass(frozen=True)
class OwnPlan(Plan):
    """A plan whose case a function makes.

    Attributes:
        made: Makes model and data; called more than once, each time from the same seed.
        expected: What the library has to do.
    """

    made: Callable[[], Case] | None = None
    expected: str = RIGHT

    @property
    def outcome(self) -> str:
        return self.expected

    def build(self) -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            case = self.made()
        if self.precision == "float64":
            case.model, case.x = case.model.double(), doubled(case.x)
        return case


def planned(
    made: Callable[[], Case],
    structure: str,
    precision: str = "float64",
    subset: str = "all",
    likelihood: str = "classification",
    context: str = "",
    expected: str = RIGHT,
) -> OwnPlan:
    """The plan; batches are of two."""
    nothing = {"layers": (), "activations": (), "wrapped": "", "wrapped_head": False, "outer": "", "inputs": ""}
    choices = {"output": "vector output", "likelihood": likelihood, "structure": structure, "subset": subset}
    return OwnPlan(
        1, **nothing, context=context, **choices, precision=precision, batch_size=2, made=made, expected=expected
    )
