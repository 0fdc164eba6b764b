"""Which parameter's curvature comes from where, decided once and checked against automatic differentiation.

A parameter is *covered* when it belongs to one module of a known kind and reaches the output through that module's calls
alone. Tied weights, re-parametrised weights and weights used outside their module fail that test; they, and layers of other
kinds, fall back to per-example automatic differentiation. Nothing is skipped in silence: :class:`CoverageReport` says what
was decided for every parameter and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from laplace.capture.calls import that_reach
from laplace.capture.capture import Capture
from laplace.capture.products import product_of
from laplace.capture.rules import covers, has_output_factor, is_convolution, is_transposed
from laplace.capture.uses import Uses
from laplace.capture.verdicts import PROBES, gradients_of, verdicts

_AUTOGRAD = "per-example autograd: "
UNSHOWN = "no gradient in the first batch"
_MISUSED = "used outside its module's calls, changed by them, or batch not in the first dimension"


class Source(NamedTuple):
    """Where a parameter's curvature comes from.

    Attributes:
        layer: Name of the module whose capture gives it, or None.
        reason: In words.
        kind: ``'outer'``, ``'transposed'`` or ``'rows'``; see :mod:`laplace.capture.rules`.
        alive: Whether an example has shown it, by a gradient that is not zero; what was not asked counts.
    """

    layer: str | None
    reason: str
    kind: str = "outer"
    alive: bool = True


def find_layers(model: nn.Module, names: Sequence[str], x: Any, by_products: bool = True) -> dict[str, Source]:
    """Decide for each parameter which module covers it.

    Args:
        model: The network in evaluation mode.
        names: Parameters with ``requires_grad``, in order.
        x: One batch, used to compare captured gradients with automatic differentiation.
        by_products: Whether products of a weight in the model's graph are a source, if no module is.

    Returns:
        The source of every parameter's curvature by name.
    """
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module_name, key))
    known = dict(model.named_parameters())
    found: dict[str, Source] = {}
    for name in names:
        places = owners[id(known[name])]
        module = model.get_submodule(places[0][0])
        if len(places) > 1:
            found[name] = Source(None, f"{_AUTOGRAD}{_tied(model, places)}")
        elif (weight := product_of(model, name)) is not None:
            found[name] = Source(weight, f"products in {type(module).__name__}")
        elif not covers(module, places[0][1]):
            found[name] = Source(None, f"{_AUTOGRAD}{_described(module, places[0][1])}")
        else:
            found[name] = Source(places[0][0], _described(module, places[0][1]), _kind(module, places[0][1]))
    found = _verified(model, found, x)
    products = {}
    for name, source in found.items():
        if by_products and source.layer is None and known[name].ndim in (1, 2, 3, 4, 5):
            places = owners[id(known[name])]
            what = _tied(model, places) if len(places) > 1 else type(model.get_submodule(places[0][0])).__name__
            products[name] = Source(name, f"{'sums' if known[name].ndim == 1 else 'products'} in {what}")
    for name, source in _verified(model, products, x).items():
        if source.layer is not None:
            found[name] = source
        elif not source.alive:
            found[name] = found[name]._replace(reason=f"{found[name].reason}, {UNSHOWN}", alive=False)
    return _with_uses(model, found, x) if by_products else found


def _with_uses(model: nn.Module, found: dict[str, Source], x: Any) -> dict[str, Source]:
    """Say of which parameters without a layer the rows follow from their uses in the graph, see :mod:`laplace.capture.uses`."""
    known = dict(model.named_parameters())
    others = {name: known[name] for name, source in found.items() if source.layer is None}
    if not others:
        return found
    with torch.enable_grad():
        uses = Uses(model(x), others, torch.float32).by_name
    said = {name: source.reason.replace(_AUTOGRAD, "its uses in the graph: ") for name, source in found.items()}
    return {name: s._replace(reason=said[name]) if name in uses else s for name, s in found.items()}


def _kind(module: nn.Module, key: str) -> str:
    return "transposed" if is_transposed(module) else "outer" if has_output_factor(module, key) else "rows"


def _described(module: nn.Module, key: str) -> str:
    """The kind of a module; of the weight of a convolution in groups also why it has no factors."""
    grouped = is_convolution(module) and key == "weight" and module.groups > 1
    return type(module).__name__ + (f" in {module.groups} groups, which have no factors in common" if grouped else "")


def _tied(model: nn.Module, places: Sequence[tuple[str, str]]) -> str:
    modules = [model.get_submodule(name) for name, _ in places]
    tables = sum(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in modules)
    mixed = " looked up and multiplied, which have no factors in common" if 0 < tables < len(modules) else ""
    return f"tied weight ({', '.join('.'.join(place) for place in places)}){mixed}"


def _verified(model: nn.Module, found: dict[str, Source], x: Any, alone: bool = False) -> dict[str, Source]:
    """Take out parameters whose captured gradient is not their gradient.

    A direction is zero but for one example, and only that example's row of the capture may answer for it. So a layer that
    sees the batch in another dimension than the first fails as well. An example without gradient, as a blank image, proves
    nothing; where all are such, the layer is asked by itself.

    Args:
        model: The network.
        found: Sources by parameter.
        x: One batch.
        alone: Whether the model is the layer by itself.
    """
    layers = list(dict.fromkeys(source.layer for source in found.values() if source.layer is not None))
    if not layers:
        return found
    names = [name for name, source in found.items() if source.layer is not None]
    known = dict(model.named_parameters())
    capture = Capture(model, x, layers, dtype=torch.float64)
    if not capture._output.requires_grad:
        raise ValueError("The model's output does not depend on any of its parameters with requires_grad=True.")
    passed = _passed_by(capture, found, {name: known[name] for name in names})
    if passed:
        aside = Source(None, f"{_AUTOGRAD}its gradient does not come through the output of its module")
        return _verified(model, {n: aside if s.layer in passed else s for n, s in found.items()}, x, alone)
    capture.check_called()
    asked = verdicts(capture, {name: found[name].layer for name in names}, {name: known[name] for name in names})
    picked = capture.folded if capture.picks_by_mask else set()
    result = dict(found)
    for name in names:
        layer = found[name].layer
        if name in capture.misused or layer in capture.misused:
            result[name] = Source(None, f"{_AUTOGRAD}{_MISUSED}")
        elif layer not in capture.called:
            result[name] = Source(None, f"{_AUTOGRAD}its module did not run")
        elif layer in picked:
            result[name] = Source(None, f"{_AUTOGRAD}its module is given rows that are picked by their values")
        elif False in asked[name] or (True not in asked[name] and (alone or not _is_plain(capture, name, layer))):
            result[name] = Source(None, f"{_AUTOGRAD}{_MISUSED}")
        elif is_transposed(capture.modules[layer]):
            result[name] = found[name]._replace(kind="transposed")
        result[name] = result[name]._replace(alive=layer not in capture.called or bool(set(asked[name]) - {None}))
    return result


def _passed_by(capture: Capture, found: dict[str, Source], params: dict[str, nn.Parameter]) -> set[str]:
    """Layers of whose weights the output depends, and not by what the layer gives.

    Models that differentiate in their forward pass, as energies for forces, are such; or the layer runs detached, and its
    weight is used elsewhere.
    """
    reached = {call.layer for call in that_reach(capture._output, capture._calls)}
    lost = {
        name: p
        for name, p in params.items()
        if found[name].layer in (capture.called | capture._without_gradient) - reached
    }
    if not lost:
        return set()
    gradients = gradients_of(capture, lost, torch.ones_like(capture._output))
    return {found[name].layer for name, g in zip(lost, gradients, strict=True) if g is not None}


def _is_plain(capture: Capture, name: str, layer: str) -> bool:
    """Whether a layer by itself, on other inputs of its own shape, has the captured gradient."""
    value = capture.first_value(layer)[:PROBES]
    value = torch.randn_like(value) if value.is_floating_point() else value
    local = name[len(layer) + 1 :] if layer else name
    module = capture.modules[layer]
    if not isinstance(module, nn.Module):
        return False
    try:
        return (
            _verified(module, {local: Source("", "", _kind(module, local))}, value, alone=True)[local].layer is not None
        )
    except (RuntimeError, ValueError, IndexError):
        return False
