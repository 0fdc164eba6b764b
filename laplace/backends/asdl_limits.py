"""What ASDL 0.1a4 computes otherwise than it is meant, or not at all: refused, with advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import OutOfMemoryError, Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


def owners_of(module: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, and under which attribute.

    Raises:
        ValueError: If ASDL computes no gradients for one of them.
    """
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, parameter in named.items():
        owners[name] = [
            (m, k) for m in module.modules() for k, p in m.named_parameters(recurse=False) if p is parameter
        ]
        for owner, attribute in owners[name]:
            kind = type(owner).__name__
            known = isinstance(owner, (nn.Linear, nn.Conv2d, *_NORMS)) and attribute in ("weight", "bias")
            if not known or (isinstance(owner, _NORMS) and (owner.weight is None or owner.bias is None)):
                raise ValueError(
                    f"ASDL has no per-example gradients for {name!r} ({kind}). Use the native backend, or set "
                    "requires_grad=False on it."
                )
            if isinstance(owner, nn.Conv2d):
                check_layer(name, owner)
    return owners


@contextmanager
def hooks_of(module: nn.Module) -> Iterator[None]:
    """Turn what ASDL's hooks stumble over into advice: they take layers that are given a tensor, by position, and give one.

    Raises:
        ValueError: If they fail.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"ASDL's hooks fail in {type(module).__name__} ({error}): they take layers that are called with one tensor, by "
            "position, and return one. Use the native backend."
        ) from error


def check_own(module: nn.Module) -> None:
    """Refuse a model which ASDL takes for a layer without trainable parameters, and does not begin with."""
    own = [getattr(module, name, None) for name in ("weight", "bias")]
    own = [value for value in own if isinstance(value, Tensor)]
    if own and not any(value.requires_grad for value in own):
        raise ValueError(
            f"ASDL takes a model for a layer that has a 'weight' or 'bias' of its own, and needs a gradient of it, but that of "
            f"{type(module).__name__} has requires_grad=False. Use the native backend, or give it another name."
        )


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuse layers whose input ASDL would take apart in another way than the layer does."""
    if isinstance(layer, nn.Linear):
        return
    if not isinstance(layer, nn.Conv2d):
        raise ValueError(
            f"ASDL has no Kronecker factors for {name!r} ({type(layer).__name__}). Use the native backend."
        )
    plain = layer.padding != "same" and layer.padding_mode == "zeros" and layer.groups == 1 and layer.dilation == (1, 1)
    if not plain:
        raise ValueError(
            f"ASDL takes convolutions without groups and dilation, padded with a number of zeros, but {name!r} is {layer}. "
            "Use the native backend."
        )
