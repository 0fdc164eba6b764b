"""What is public says what it takes and what it refuses: arguments by name, and errors."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from tests.core.public import CLASSES, FUNCTIONS, MODULES

METHODS = {
    f"{cls.__module__}.{cls.__qualname__}.{name}": (cls, name)
    for cls in CLASSES.values()
    for name, value in vars(cls).items()
    if (not name.startswith("_") or name == "__call__")
    and inspect.isfunction(getattr(value, "fget", getattr(value, "__func__", value)))
}


def function_of(value):
    """The function behind a property, a class method or a static method."""
    return getattr(value, "fget", getattr(value, "__func__", value))


def documents(cls, name=None):
    """What a class and those that it inherits from say of themselves, or of a method; of the constructor without a name."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("laplace.")]
    methods = [function_of(vars(base)[name or "__init__"]) for base in ours if (name or "__init__") in vars(base)]
    return "\n".join(method.__doc__ or "" for method in methods), "\n".join(base.__doc__ or "" for base in ours)


def constructor(cls):
    """What takes a class's arguments: of named tuples, that of the fields."""
    return cls.__new__ if issubclass(cls, tuple) else cls.__init__


def arguments(function):
    if not inspect.isfunction(function):
        return []  # a class without arguments
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    return [name for name in own if name not in ("self", "cls", "_cls") and not name.startswith("_")]


def unnamed(function, text):
    """Arguments that a text neither lists nor mentions in code quotes."""
    return [
        name
        for name in arguments(function)
        if not re.search(rf"^\s+{name}(, \w+)*( \(.*\))?:|``[^`]*\b{name}\b[^`]*``", text, re.MULTILINE)
    ]


def raises(function):
    """Whether a body itself raises an error; that a base leaves something to its subclasses is none."""
    source = inspect.getsource(function) if inspect.isfunction(function) else ""
    return re.search(r"^\s+raise (?!NotImplementedError|AttributeError)\w", source, re.MULTILINE)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_names_its_arguments_and_errors(name):
    cls = CLASSES[name]
    of_init, of_class = documents(cls)
    assert cls.__doc__
    assert not unnamed(constructor(cls), of_init + of_class)
    assert "Raises:" in of_init + of_class or not raises(cls.__init__)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_arguments_and_errors(name):
    cls, method = METHODS[name]
    function = function_of(vars(cls)[method])
    own, of_class = documents(cls, method)
    assert own
    assert not unnamed(function, own + of_class)
    assert "Raises:" in own or not raises(function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_names_its_arguments_and_errors(name):
    function = FUNCTIONS[name]
    assert function.__doc__
    assert not unnamed(function, function.__doc__)
    assert "Raises:" in function.__doc__ or not raises(function)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name):
    assert importlib.import_module(name).__doc__
