"""The example of every public class runs, and every public class that a user makes or subclasses has one."""

from __future__ import annotations

import doctest
import enum
import importlib
import inspect

import pytest
import torch

MODULES = ("laplace", "laplace.utils", "laplace.curvature", "laplace.likelihoods")
BASES = {  # which are no use by themselves, or stand beside a class of the same behaviour
    "BaseLaplace", "ParametricLaplace", "LLLaplace", "SubnetLaplace", "SubnetMask", "HessianInterface", "CurvlinopsInterface",
    "AsdlInterface", "AsdlEF", "AsdlHessian", "AsdfghjklInterface", "AsdfghjklGGN", "AsdfghjklEF", "AsdfghjklHessian", "BackPackInterface",
}  # fmt: skip


def public_classes():
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", dir(module)):
            value = getattr(module, key)
            ours = inspect.isclass(value) and value.__module__.startswith("laplace.")
            if ours and not issubclass(value, (enum.Enum, Exception)) and key not in BASES:
                found[key] = value
    return found


CLASSES = public_classes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_the_example_of_a_class_runs(name):
    example = doctest.DocTestParser().get_doctest(CLASSES[name].__doc__, {}, name, None, None)
    assert example.examples, f"{name} has no example"
    said = []
    with torch.random.fork_rng(devices=[]):
        failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)
