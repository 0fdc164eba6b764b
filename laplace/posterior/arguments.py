"""Arguments of the posteriors' constructors: by position in their documented order, and by name through all base classes.

A posterior is put together from a structure and a subset of weights, each of which takes arguments of its own and passes on the
rest by name. The documented order of them all belongs to the whole, as ``order``.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from laplace.linalg.inference import outside_inference_mode

ORDER = (
    "model",
    "likelihood",
    "sigma_noise",
    "prior_precision",
    "prior_mean",
    "temperature",
    "enable_backprop",
    "dict_key_x",
    "dict_key_y",
    "backend",
    "backend_kwargs",
    "asdl_fisher_kwargs",
)


def before(order: tuple[str, ...], place: str, *names: str) -> tuple[str, ...]:
    """The order with further names in front of one of its own."""
    index = order.index(place)
    return (*order[:index], *names, *order[index:])


def by_name(init: Callable[..., None]) -> Callable[..., None]:
    """Turn positional arguments into named ones, in the order of the class that is being made."""

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        order = type(self).order
        if len(args) > len(order):
            raise TypeError(f"{type(self).__name__} takes {len(order)} positional arguments, but got {len(args)}.")
        named = dict(zip(order, args, strict=False))
        twice = sorted(set(named) & set(kwargs))
        if twice:
            raise TypeError(f"{type(self).__name__} got {twice} by position and by name.")
        with outside_inference_mode():
            init(self, **named, **kwargs)

    return wrapper


def signature(cls: type) -> inspect.Signature:
    """The arguments of a class from those of all its base classes, for :func:`inspect.signature` and :func:`help`."""
    known: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        for parameter in inspect.signature(init).parameters.values() if hasattr(init, "__wrapped__") else ():
            if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
                known.setdefault(parameter.name, parameter)
    by_position = [known[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in cls.order]
    others = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in known.items() if name not in cls.order]
    return inspect.Signature(by_position + others)


def check_model(model: Any) -> nn.Module:
    """Refuse what is no network.

    Raises:
        ValueError: If it is a path, a state dict or something else; says how to get the network.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"model={os.fspath(model)!r} is a path. Load the network first: torch.load(path, weights_only=False) of a file "
            "that you trust and that holds a whole model, or model.load_state_dict(torch.load(path)) of its weights."
        )
    if isinstance(model, Mapping):
        raise ValueError(
            "model is a state dict, not a network: build the network and call its load_state_dict with it."
        )
    raise ValueError(f"model is {type(model).__name__}, but has to be a torch.nn.Module.")
