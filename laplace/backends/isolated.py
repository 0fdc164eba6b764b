"""A twin of the user's model that other packages may hook and mark as they like."""

from __future__ import annotations

import copy

from torch import nn


def isolated_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares the storage of the weights, but no module, parameter object, hook or flag.

    Activations that work in place are told not to: the hooks of other packages do not survive them.

    Raises:
        ValueError: If the module cannot be copied.
    """
    memo: dict = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    try:
        twin = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The model cannot be copied ({error}), but this backend changes the modules it works on. Use the native backend."
        ) from error
    for part in twin.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False
    return twin.eval()
