"""The probe: a few inputs of the training split with the model's outputs on them, kept to recognise the model's code.

Weights have a digest, but code has none that means anything: an edited activation keeps every name and shape. Whoever has
a model that claims to be the run's, a worker, a resumed or follow-on job, or somebody who loads the posterior, runs it on
the probe's inputs and compares.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from laplace.capture.evaluation import eval_mode
from laplace.data.nested import flat, is_flat, nested
from laplace.linalg.precision import spacing_of_products, without_autocast
from laplace.noise import fixed_directions
from laplace_dist.data.device import to_device
from laplace_dist.errors import CheckpointError, SettingsError

EXAMPLES = 4
_LAW = "law/"  # before the names of what the likelihood makes of them
LARGEST = 4 * 2**20  # bytes of inputs, if more than one example has them
MOST = 1 << 20  # outputs that are kept; of more, as those of a language model, every so many
TOLERANCE = {
    "float32": 1e-3,
    "float64": 1e-3,
}  # relative, for other devices and libraries; an edited layer makes of order 1
COARSE = 5e-2  # of half precision, and of float32 products in TF32


def make_probe(
    model: nn.Module,
    batch: Callable[[int], Any],
    length: int,
    law: Callable[[int, Tensor], Mapping[str, Tensor]] = lambda count, outputs: {},
) -> bytes:
    """Return the probe of a model as a safetensors file.

    Args:
        model: In eval mode.
        batch: Returns the first so many examples' inputs as the model takes them.
        length: Number of examples that there are.
        law: Returns what the likelihood makes of the first so many examples, whose outputs it is given; numbers of the same
            shape in their place, where not all of them are kept.

    Raises:
        SettingsError: The model gives other outputs when it is run again.
        TypeError: The inputs hold something that cannot be stored.
    """
    x = batch(1)
    one = sum(tensor.nbytes for tensor in _flatten(x)[0].values())
    count = max(1, min(EXAMPLES, length, LARGEST // max(one, 1), MOST // max(_run(model, x).numel(), 1)))
    x = batch(count)
    tensors, form = _flatten(nested(x) if is_flat(x) else x)
    outputs = _run(model, x)
    if not torch.equal(outputs, _run(model, x)):
        raise SettingsError(
            "--model: its outputs differ between two runs on the same inputs, so that its curvature is another one each "
            "time. Switch off what is random in eval mode (functional dropout without training=self.training, noise)."
        )
    header = {"form": json.dumps(form)}
    kept = {"outputs": _sample(outputs)}
    if outputs.numel() > MOST:
        header["shape"] = json.dumps(list(outputs.shape))
        outputs = _stand_in(outputs.shape)
    kept |= {f"{_LAW}{name}": value for name, value in law(count, outputs).items()}
    tensors |= {name: value.cpu().contiguous() for name, value in kept.items()}
    return safetensors.torch.save(tensors, metadata=header)


def probe_digest(content: bytes) -> str:
    """Return the sha256 of a probe."""
    return hashlib.sha256(content).hexdigest()


def check_probe(
    content: bytes,
    digest: str,
    model: nn.Module,
    label: str,
    who: str,
    counts: Callable[[Tensor], Tensor | None] = lambda y: None,
) -> None:
    """Refuse a model whose outputs on the probe's inputs are not those of the run's model.

    Outputs at positions that are no terms of the loss are not compared: of padding, each implementation of attention makes
    something else.

    Args:
        content: The probe.
        digest: Its sha256, as the plan has it.
        model: In eval mode, with the run's weights.
        label: What to call the probe in messages.
        who: Whose model it is, in a person's words.
        counts: Returns which positions count, from targets; None where all do.

    Raises:
        CheckpointError: The probe is truncated or altered.
        SettingsError: The model is another one.
    """
    probe = open_probe(content, digest, label)
    try:
        found = _run(model, to_device(probe.inputs, next(model.parameters()).device))
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise SettingsError(_refusal(who, f"it fails on the run's inputs ({type(error).__name__}: {error})")) from error
    if found.shape != probe.shape:
        raise SettingsError(_refusal(who, f"outputs of shape {tuple(found.shape)}, the run's {tuple(probe.shape)}"))
    compared = _compared(probe, counts)
    found, wanted = _sample(found)[compared], probe.outputs[compared]
    error = float((found.double() - wanted.double()).norm())
    scale = max(float(wanted.double().norm()), torch.finfo(torch.float32).tiny)
    if not error <= _tolerance(found) * scale:
        raise SettingsError(
            _refusal(who, f"its outputs on the same inputs differ by {error / scale:.1e} of their size")
        )


def _refusal(who: str, what: str) -> str:
    return (
        f"--model: {who} is not the model of the run: {what}, with the same weights. Its code, what it was "
        "built with (such as attn_implementation), or a library that it uses, was changed since the run began, or is of "
        "another version on that node. Restore it, or begin another run."
    )


def _tolerance(outputs: Tensor) -> float:
    name = str(outputs.dtype).removeprefix("torch.")
    return COARSE if spacing_of_products(outputs.device) else TOLERANCE.get(name, COARSE)


@torch.no_grad()
@without_autocast()  # a job's --precision is no part of what the model is
def _run(model: nn.Module, x: Any) -> Tensor:
    with eval_mode(model):
        return model(x).detach().cpu().nan_to_num()  # NaN is another check's business, and equals itself here


@dataclass(frozen=True)
class Probe:
    """What a probe holds.

    Attributes:
        inputs: As the model takes them.
        outputs: All of them, or a sample.
        shape: That of all of them.
        law: What the likelihood makes of :attr:`judged`; nothing in older runs.
    """

    inputs: Any
    outputs: Tensor
    shape: torch.Size
    law: dict[str, Tensor]

    @property
    def judged(self) -> Tensor:
        """The outputs, or numbers of their shape where they are not all kept."""
        return self.outputs if self.outputs.shape == self.shape else _stand_in(self.shape)


def _sample(outputs: Tensor) -> Tensor:
    """At most `MOST` outputs: all of them, or one of every so many, in turn of other positions and classes."""
    if outputs.numel() <= MOST:
        return outputs
    step = -(-outputs.numel() // MOST)
    while math.gcd(step, outputs.shape[-1]) > 1:
        step += 1
    return outputs.flatten()[::step].clone()


def _compared(probe: Probe, counts: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Which of the kept outputs are compared: those that are terms of the loss, where targets say so and any is."""
    counted = counts(probe.law["targets"]) if "targets" in probe.law else None
    if counted is None or not bool(counted.any()):
        return torch.ones_like(probe.outputs, dtype=torch.bool)
    every = torch.zeros(probe.shape, dtype=torch.bool)
    every[: len(counted)][counted] = True
    return _sample(every)


def _stand_in(shape: torch.Size) -> Tensor:
    """Numbers in place of outputs: random ones, which rise from output to output so that targets are not as good as chance."""
    return fixed_directions(torch.empty(shape)) + torch.linspace(-3, 3, shape[-1])


def open_probe(content: bytes, digest: str, label: str) -> Probe:
    """Return what a probe holds.

    Raises:
        CheckpointError: It is truncated or altered.
    """
    bad = f"{label} is truncated or altered. Restore it from a copy, or start again with --fresh."
    if probe_digest(content) != digest:
        raise CheckpointError(bad)
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        form = json.loads(header["__metadata__"]["form"])
        law = {name.removeprefix(_LAW): value for name, value in tensors.items() if name.startswith(_LAW)}
        outputs = tensors["outputs"]
        shape = (
            torch.Size(json.loads(header["__metadata__"]["shape"]))
            if "shape" in header["__metadata__"]
            else outputs.shape
        )
        return Probe(flat(_rebuilt(form, tensors)), outputs, shape, law)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(bad) from error


def _flatten(x: Any) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of nested inputs by name, and the nesting with the names in their places."""
    tensors: dict[str, Tensor] = {}

    def form(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"x{len(tensors)}"
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"mapping": {str(key): form(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [form(item) for item in value]}
        if isinstance(value, bool | int | float | str | None):
            return {"value": value}
        raise TypeError(f"a {type(value).__name__}")

    return tensors, form(x)


def _rebuilt(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    (kind, value), *_ = form.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: _rebuilt(item, tensors) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_rebuilt(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    return value
