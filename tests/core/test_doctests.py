"""Every public class that a user makes or subclasses, and every function of the transforms, has an example that runs."""

from __future__ import annotations

import doctest

import pytest
import torch

from tests.core.public import CLASSES, FUNCTIONS

BASES = {  # which are no use by themselves, or stand beside a class of the same behaviour
    "BaseLaplace", "ParametricLaplace", "LLLaplace", "SubnetLaplace", "SubnetMask", "HessianInterface", "CurvlinopsInterface",
    "AsdlInterface", "AsdlEF", "AsdlHessian", "AsdfghjklInterface", "AsdfghjklGGN", "AsdfghjklEF", "AsdfghjklHessian", "BackPackInterface",
}  # fmt: skip
EXAMPLES = {
    **{name: value for name, value in CLASSES.items() if name not in BASES},
    **{name: value for name, value in FUNCTIONS.items() if name.startswith("transforms.")},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name):
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name].__doc__, {}, name, None, None)
    assert example.examples, f"{name} has no example"
    said = []
    with torch.random.fork_rng(devices=[]):
        failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)
