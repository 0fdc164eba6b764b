"""A forward pass with other tensors in place of a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> Any:
    """What the model answers where parameters and buffers of these names are other tensors; tied ones are replaced everywhere.

    torch refuses to do so with ``nn.DataParallel``, whose copies on other devices would not know: there its module is called.
    """
    if isinstance(model, nn.DataParallel):
        tensors, model = {name.removeprefix("module."): t for name, t in tensors.items()}, model.module
    return torch.func.functional_call(model, _in_every_module(model, tensors), (x,), tie_weights=False)


def _in_every_module(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of all modules that hold what they replace, one name for each module.

    Under the two names of a module that is registered twice, torch would replace its parameters twice, and then put back what
    it had found the second time.
    """
    known: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    known.update(model.named_buffers(remove_duplicate=False))
    unknown = {name: tensor for name, tensor in tensors.items() if name not in known}  # of which torch says so
    replaced = {id(known[name]): tensor for name, tensor in tensors.items() if name in known}
    places = {
        f"{prefix}.{key}".removeprefix("."): replaced[id(value)]
        for prefix, module in model.named_modules()
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if id(value) in replaced
    }
    return {**places, **unknown}
