"""Random small models on a GPU, against the dense float64 reference on the CPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from core.not_yet import missing
from core.random_models import plan
from core.verdicts import examine

MODELS, PARTS = 810, 30


@pytest.mark.parametrize("number", range(PARTS))
def test_random_models(number):
    torch.set_num_threads(1)
    plans = [p for p in map(plan, range(number, MODELS, PARTS)) if not missing(p.names)]
    verdicts = [(p, examine(p, "cuda")) for p in plans]
    wrong = [f"{p}\n    {v}" for p, v in verdicts if not v.good and v.kind != "left out"]
    kinds = Counter(v.kind for _, v in verdicts)
    assert not wrong, f"{len(wrong)} of {len(plans)} models:\n" + "\n".join(wrong)
    assert kinds["right"] > len(plans) / 2, kinds
