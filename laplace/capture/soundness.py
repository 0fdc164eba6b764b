"""Whether a model is what curvature is defined for: a function of each example by itself, with one tensor of outputs.

A model that is random in evaluation mode has the curvature of one draw, and one whose examples depend on one another has
none of its own for any of them. Neither shows in the numbers, so a few examples are asked before the first fit.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.admission import named
from laplace.capture.calls import is_batched
from laplace.capture.forward import run, tensor_output
from laplace.data.batches import is_divisible, length_of, part_of
from laplace.data.mistakes import check_outputs
from laplace.linalg.matmul import faster_products
from laplace.linalg.precision import is_autocast_enabled, spacing_of_products, without_autocast
from laplace.noise import fixed_directions

_SINGLES = 4  # examples that are run by themselves, beside the others together
_DRAWS = 16  # runs of a model that draws random numbers, of which two may be alike where few values are left to chance

_WAY_OUT = (
    "Use a layer that sees one example at a time (of batch norms, track_running_stats=True), or let it do so where "
    "self.training is False."
)

Record = list[tuple[str, Any, Any]]  # every call of a module in the order in which they end: its name, input and output


def check_inputs(x: Any) -> None:
    """Refuse inputs in which examples cannot be told from inputs; a list of strings has one for each example.

    Raises:
        TypeError: If they are a tuple or list of anything else.
    """
    if isinstance(x, (tuple, list)) and not all(isinstance(item, str) for item in x):
        raise TypeError(
            f"A batch's inputs are a {type(x).__name__}. Models take one tensor or one dictionary of inputs: let the data "
            "loader give a dictionary of the tensors and their targets, and wrap the model in a module that unpacks it."
        )


@torch.no_grad()
def check_function(model: nn.Module, x: Any) -> set[str]:
    """Run a few examples twice, and by themselves, and compare what every module gives.

    Args:
        model: The network in evaluation mode.
        x: At least two examples.

    Returns:
        Names of the modules of which these examples prove nothing: they did not run, or gave the same for all examples.

    Raises:
        TypeError: If the output is no tensor.
        ValueError: If the model cannot run, is random, or makes examples depend on one another; names the module.
    """
    with faster_products(model.parameters()):
        f = run(model, x)
    if isinstance(f, Tensor) and f.ndim:
        check_outputs(x, f)
    f = tensor_output(f)
    if _all_equal(x) and _runs(model, x + fixed_directions(x)):
        x = x + fixed_directions(x)  # blank examples show neither noise nor what they do to one another
    exact = is_autocast_enabled() and _runs_without_autocast(model, x)
    with without_autocast() if exact else nullcontext():
        return _checked(model, x, len(f))


def _checked(model: nn.Module, x: Any, outputs: int) -> set[str]:
    before = _states_of_generators()
    batch = _recorded(model, x)
    draws = any(not torch.equal(*pair) for pair in zip(before, _states_of_generators(), strict=True))
    for _ in range(_DRAWS if draws else 1):
        _check(batch, _recorded(model, x), None, model)
    if not is_divisible(x):
        return set()
    n = min(length_of(x), outputs)
    for i in sorted({*range(min(n, _SINGLES - 1)), n - 1}):
        _check_apart(model, x, batch, slice(i, i + 1), "one example by itself")
    if n > _SINGLES:
        _check_apart(model, x, batch, slice(_SINGLES - 1, n - 1), "some examples by themselves")
    return {name for name, _ in model.named_modules()} - {name for name, _, f in batch if differing(f) is not None}


def _check_apart(model: nn.Module, x: Any, batch: Record, rows: slice, what: str) -> None:
    """Compare some examples of a batch with what they are without the others."""
    found = _recorded(model, part_of(x, rows), what, f". Every example needs outputs of its own. {_WAY_OUT}")
    _check(batch, found, rows, model)


def differing(values: Tensor | None) -> int | None:
    """The first row that is not like row 0; None if there is none."""
    if values is None or not values.ndim:
        return None
    found = (values != values[:1]).flatten(1).any(1).nonzero() if values.ndim > 1 else (values != values[0]).nonzero()
    return int(found[0]) if len(found) else None


@without_autocast()
def _runs_without_autocast(model: nn.Module, x: Any) -> bool:
    """Whether the model is not bound to the few digits of autocast, among which weak coupling is lost."""
    return _runs(model, x)


def _states_of_generators() -> list[Tensor]:
    """Those that torch draws from where it is not told another."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _all_equal(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and bool((x == x[:1]).all())


def _runs(model: nn.Module, x: Any) -> bool:
    try:
        model(x)
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def _check(batch: Record, other: Record, rows: slice | None, model: nn.Module) -> None:
    """Refuse the innermost module that gives two outputs for one input: in two runs, or in a batch and apart.

    Args:
        batch: All calls of modules in a batch.
        other: Those of a second run, or of some examples without the others.
        rows: Which these are; None for a second run.
        model: The network.
    """
    tolerance = _tolerance(batch, 1e4) if rows is not None else _tolerance(batch, 4)
    for (name, a, f), (same, b, g) in zip(batch, other, strict=False):
        if name != same or a is None or f is None or g is None:
            continue
        if rows is not None:
            if g.shape[:1] != (rows.stop - rows.start,):
                continue  # what is given for these examples is no row of a batch, as encodings of positions are none
            a, f = _rows(a, rows), _rows(f, rows)
        if a is not None and f is not None and not _same(f, g, tolerance, a) and _same(a, b, tolerance):
            raise (_random if rows is None else _coupled)(named(name, model))
    if rows is None and not _same(batch[-1][2], other[-1][2], tolerance):
        raise _random(named("", model))
    if rows is not None and not _same(_rows(batch[-1][2], rows), other[-1][2], tolerance):
        raise _coupled(named("", model))


def _random(module: str) -> ValueError:
    return ValueError(
        f"The model is random in evaluation mode: {module} gives two outputs for one input, so that curvature would be of "
        "one draw. Switch the noise off where self.training is False, as F.dropout(x, p, self.training) does."
    )


def _coupled(module: str) -> ValueError:
    return ValueError(
        f"In {module}, the output of an example depends on the others of its batch, as with batch statistics or attention "
        f"over the batch, so that no example has curvature of its own. {_WAY_OUT}"
    )


def _recorded(model: nn.Module, x: Any, of: str = "the first batch", advice: str = "") -> Record:
    """Every call of a module in the order in which they end, in a forward pass as of :func:`laplace.capture.forward.run`."""
    found: Record = []
    handles = [
        module.register_forward_hook(
            lambda m, args, output, name=name: found.append((name, _first(args), _first(output)))
        )
        for name, module in model.named_modules()
    ]
    try:
        with faster_products(model.parameters()):
            run(model, x, of, advice)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first(value: Any) -> Tensor | None:
    value = value[0] if isinstance(value, tuple) and value else value
    ours = isinstance(value, Tensor) and not value.is_nested and not is_batched(value)
    return value.clone() if ours else None


def _rows(value: Tensor | None, rows: slice) -> Tensor | None:
    return value[rows] if value is not None and value.ndim and rows.stop <= len(value) else None


def _tolerance(record: Record, times: float) -> float:
    """Relative difference that rounding may make: that of the coarsest numbers, as autocast and TF32 have them."""
    values = [f for _, _, f in record if f is not None and f.is_floating_point()]
    spacing = max((torch.finfo(f.dtype).eps for f in values), default=0.0)
    for device in {f.device for f in values}:
        spacing = max(spacing, spacing_of_products(device))
    return min(max(times * spacing, 1e-6), 0.1)


def _same(one: Tensor | None, two: Tensor | None, tolerance: float, beside: Tensor | None = None) -> bool:
    """Whether two values are equal, up to a difference relative to the largest of them, or of what is beside them."""
    if one is None or two is None:
        return one is two
    if one.shape != two.shape:
        return False
    if not one.numel() or not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, two)
    if one.dtype == two.dtype and torch.equal(one, two):
        return True
    kind = torch.complex128 if one.is_complex() else torch.float64
    difference, scale = float((one.to(kind) - two.to(kind)).abs().amax()), None
    for value in (one, two, beside):
        if value is not None and value.numel():
            scale = _largest(value) if scale is None else max(scale, _largest(value))
            if not math.isfinite(scale) or difference <= tolerance * scale:
                return True  # what is not finite is refused with the examples' numbers
    return False


def _largest(value: Tensor) -> float:
    """The largest absolute value; torch has none of booleans and of unsigned integers."""
    numbers = value if value.is_floating_point() or value.is_complex() else value.double()
    return float(numbers.abs().amax())
