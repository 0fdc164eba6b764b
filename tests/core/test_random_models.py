"""Random small models: the numbers of a dense float64 reference, or a refusal in words that name something.

One model again: ``python benchmarks/random_models.py --seed 123``; thousands: the same without ``--seed``. What the library
does not get right yet is in :mod:`tests.core.not_yet`.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from laplace import likelihoods
from laplace.likelihoods import BaseLikelihood, Categorical, Gaussian, GaussianPerOutput, Preference
from laplace.utils.enums import Likelihood

from .dense_reference import Reference
from .not_yet import CHECKS, NOT_YET, missing
from .random_laws import LAWS
from .random_models import FEATURES, LIKELIHOODS, NAMES, Plan, plan
from .verdicts import Verdict, examine, judge

MODELS, PARTS = 810, 30  # as many as draw every kind three times
PLANS = list(itertools.islice((p for p in map(plan, itertools.count()) if not missing(p.names)), MODELS))


@pytest.mark.parametrize("number", range(PARTS))
def test_random_models(number):
    plans = PLANS[number * MODELS // PARTS : (number + 1) * MODELS // PARTS]
    wrong = [f"{p}\n    {v}" for p, v in ((p, examine(p)) for p in plans) if not allowed(v)]
    assert not wrong, f"{len(wrong)} of {len(plans)} models:\n" + "\n".join(wrong)


def allowed(verdict: Verdict) -> bool:
    return verdict.good or (verdict.kind == "silent" and "warns of diagonal blocks" in NOT_YET)


def test_all_that_is_not_excluded_is_drawn_several_times():
    drawn = Counter(name for p in PLANS for name in p.names)
    assert not {name: drawn[name] for name in NAMES if name not in NOT_YET and drawn[name] < 3}


def test_no_more_is_excluded_than_the_generator_knows():
    names = {name for key in NOT_YET if key not in CHECKS for name in key.split(" × ")}
    assert names <= NAMES and len(FEATURES) == len(set(FEATURES))


def test_all_likelihoods_of_the_library_are_drawn():
    assert set(LIKELIHOODS) == {member.value for member in Likelihood}
    kinds = {type(law.ours) for law in LAWS.values()} | {Categorical, Gaussian, Preference, BaseLikelihood}
    kinds |= {GaussianPerOutput}  # a Gaussian on scaled targets, compared with that in `test_noise_per_output`
    assert kinds == {value for value in vars(likelihoods).values() if isinstance(value, type)}


def test_most_models_are_compared_and_few_refused():
    """A library that refused everything would pass; so would a reference that judged everything right."""
    assert sum(p.outcome == "right" for p in PLANS) > 0.7 * MODELS


def test_a_seed_gives_one_model():
    for p in PLANS[:50]:
        one, two = p.build(), plan(p.seed).build()
        states = zip(one.model.state_dict().items(), two.model.state_dict().items(), strict=True)
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in states)
        assert torch.equal(one.y, two.y)


def test_the_reference_notices_a_relative_error_of_a_billionth():
    """Curvature that is off by 1e-8 of itself is beyond the tolerance of float64."""
    p = next(p for p in PLANS if p.precision == "float64" and p.outcome == "right" and p.structure == "full")
    reference = Reference(p, p.build())
    assert p.tolerance < 1e-8 and float(reference.ggn.norm()) > 1e-3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("prior_precision must be positive and finite, but holds 0."), "raw error"),  # not of the library
        (RuntimeError("vmap: It looks like you're calling .item() on a Tensor"), "raw error"),
        (AttributeError("'dict' object has no attribute 'detach'"), "raw error"),
    ],
)
def test_errors_of_others_are_no_refusals(error, kind):
    p: Plan = PLANS[0]
    with pytest.raises(type(error)) as caught:
        raise error
    assert judge(p, p.build(), caught.value).kind == kind
