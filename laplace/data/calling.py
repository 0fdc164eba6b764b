"""How a batch of inputs reaches a model: as one argument, as its keyword arguments, or as several arguments in order.

Everything here calls ``model(x)`` with one batch and takes the tensor that it answers. Hugging Face's models want keyword
arguments and answer with a ``ModelOutput``; networks with two inputs want two arguments. :func:`adapted` makes the one of the
other.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace.data.nested import is_flat, nested
from laplace.data.unread import check_read
from laplace.errors import CallError

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


class _Spread:
    """The hook that turns one batch into what ``forward`` takes.

    Args:
        key_y: Key of the targets in dict-like batches.
    """

    def __init__(self, key_y: str) -> None:
        self.key_y = key_y
        self._read: set[frozenset[str]] = set()  # keys of batches of which the model reads all

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if len(args) != 1 or kwargs or not isinstance(args[0], Mapping):
            return None
        forward = _base(module).forward
        args, kwargs = arguments(forward, args[0], self.key_y)
        keys = frozenset(kwargs)
        if keys and keys not in self._read and not module.training:  # in training, a pass more would draw numbers
            check_read(module.forward, forward, kwargs)
            self._read.add(keys)
        return args, kwargs


def adapted(model: nn.Module, key_y: str = "labels") -> nn.Module:
    """Return a model that takes one batch of inputs and answers with one tensor, as the core library has it.

    It is another object around the given one's own parameters, buffers and submodules, under the same names; the given one is
    left as it was.

    Args:
        model: The network; one that is adapted already is returned itself.
        key_y: Key of the targets in dict-like batches, which are not handed to a ``forward`` that can do without.
    """
    if isinstance(model, torch.jit.ScriptModule) or any(
        isinstance(h, _Spread) for h in model._forward_pre_hooks.values()
    ):
        return model
    twin = copy.copy(model)
    for name in _HOOKS:
        twin.__dict__[name] = copy.copy(model.__dict__[name])
    twin.register_forward_pre_hook(_Spread(key_y), with_kwargs=True)
    twin.register_forward_hook(_logits)
    return twin


def called_by_batch(model: nn.Module, key_y: str = "labels") -> nn.Module:
    """Return a model of transformers, with peft's adapters or without, :func:`adapted`; any other one as it is."""
    packages = {cls.__module__.partition(".")[0] for cls in type(_base(model)).__mro__}
    return adapted(model, key_y) if "transformers" in packages else model


def _base(model: nn.Module) -> nn.Module:
    """The model whose ``forward`` says what is taken: peft's own hands everything on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logits(module: nn.Module, args: tuple, output: Any) -> Tensor | None:
    """The hook that takes the logits out of a ``ModelOutput``, or of a mapping."""
    if isinstance(output, Tensor):
        return None
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def arguments(forward: Callable, x: Mapping, key_y: str) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments by which a model's ``forward`` is called with a dict-like batch.

    A mapping goes as keyword arguments where ``forward`` takes all of its keys, with or without the targets', else as one
    argument. What was a list of several inputs goes as so many arguments where ``forward`` takes that many, else as one list.

    Raises:
        CallError: ``forward`` takes some of the keys by name, but not all: neither way could be meant. If it takes any key,
            see :mod:`laplace.data.unread`.
    """
    signature = inspect.signature(forward)
    whole = nested(x) if is_flat(x) else x
    if isinstance(whole, list):
        return (tuple(whole) if _takes(signature, whole, {}) else (whole,)), {}
    named = {key: value for key, value in whole.items() if key != key_y}
    for keywords in (named, dict(whole)):
        if keywords and all(isinstance(key, str) for key in keywords) and _takes(signature, (), keywords):
            return (), keywords
    known = [key for key in named if key in signature.parameters]
    if known:
        raise CallError(_mismatch(signature, known, list(map(str, named))))
    return (whole,), {}


def _takes(signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _mismatch(signature: inspect.Signature, known: list[str], keys: list[str]) -> str:
    extra = [key for key in keys if key not in known]
    needed = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in keys
    ]
    said = f"; it does not take {', '.join(extra)}" if extra else ""
    said += f"; it needs {', '.join(needed)} too" if needed else ""
    return (
        f"The model's forward takes {', '.join(known)} of the batch by name{said}. Leave out of the examples what it does not "
        "take, and give what it needs; or let forward take one mapping."
    )
