"""What the driver finds out with its first batch, before any worker is started: does the data suit model and likelihood?

A worker would find the same, once per segment and try, at the end of a long traceback. Of the training split the first batch is
read and joined whole, of every other split that will be used the first example; the model sees two examples, since its outputs
for more have the same shape.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace.data.batches import length_of, part_of
from laplace.data.mistakes import UNSHIFTED, are_unshifted, warn_of_unshifted
from laplace.data.nested import flat, is_flat
from laplace.errors import CallError
from laplace_dist.config.compatibility import check_storage_options, ood
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.data.collate import Collate
from laplace_dist.data.device import to_device
from laplace_dist.data.loader import read_batch, read_example
from laplace_dist.data.processes import check_sendable
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import ExampleError, SettingsError, listed

FEW = 2
_OF_TYPES = re.compile(r"dtype|scalar type|Input type|same type|not implemented for|cast")


def check(config: Config, model: nn.Module, splits: Mapping[str, Any]) -> dict[str, Tensor]:
    """Refuse data that the model or the likelihood cannot take, in one line that says what to change.

    Returns the outputs for a few examples of each split.

    Args:
        config: The job's settings.
        model: The network in eval mode.
        splits: The data sets that will be used by name, `train` among them.

    Raises:
        SettingsError: Naming what does not fit, and the way out.
    """
    check_storage_options(config)
    collate, found = Collate.of(config), {}
    unused = {*ood(config), config.unlabelled}  # of which no target is looked at
    for name, dataset in splits.items():
        try:
            if config.loader_workers:
                check_sendable(dataset)
            _say_absent(name, dataset)
            if collate.path is None:
                _check_example(read_example(dataset, 0))
            x, y = read_batch(dataset, 0, min(config.batch_size if name == "train" else 1, len(dataset)), collate)
            f = found[name] = _outputs(model, x, y)
            if name not in unused:
                _check_targets(config.likelihood, f, y)
                _check_shift(config, x, y)
        except (ExampleError, SettingsError) as error:
            any_ = ", whose targets are not used: any will do, such as 0" if name in unused else ""
            where = "" if name == "train" else f" (split {name!r}{any_})"
            raise SettingsError(f"{error}{where}") from (error.__cause__ or error)
    return found


def _say_absent(split: str, dataset: Any) -> None:
    if isinstance(dataset, ZarrSplit) and (what := dataset.absent):
        logging.getLogger("laplace_dist").info(
            f"data: split {split!r}: {what}. That is right where these examples hold nothing else, and what an incomplete copy "
            "looks like"
        )


# ------------------------------------------------------------------ one example


def _check_example(example: Any) -> None:
    """Refuse what torch would join into something else than a batch."""
    for name, leaf in _named(example):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise SettingsError(
                f"--data: {name} of example 0 lies on torch's meta device, which has no values; give real ones"
            )
        if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
            raise SettingsError(
                f"--data: {name} of example 0 is a sparse tensor ({leaf.layout}); give dense ones, such as {name}.to_dense()"
            )
        if isinstance(leaf, list) and leaf and all(isinstance(item, bool | int | float) for item in leaf):
            raise SettingsError(
                f"--data: {name} of example 0 is a list of numbers, which torch joins place by place and not example by "
                "example; make it a tensor in the data set (of Hugging Face's: with_format('torch')) or with --collate"
            )


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of an example with names for people; a list of numbers is a leaf."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}[{key!r}]" if name else repr(key))
    elif isinstance(value, tuple) or (
        isinstance(value, list) and any(isinstance(v, Tensor | tuple | list) for v in value)
    ):
        labels = [f"{name}[{i}]" if name else f"input {i}" for i in range(len(value))]
        if not name and len(value) > 1:
            labels = [*(["x"] if len(value) == 2 else labels[:-1]), "y"]
        for label, item in zip(labels, value, strict=True):
            yield from _named(item, label)
    else:
        yield name or "the whole", value


# ------------------------------------------------------------------ the model


@torch.no_grad()
def _outputs(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    """Return the model's outputs for a few examples of a batch."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise SettingsError("--model: it has no parameters, so there is nothing to be uncertain about")
    if parameter.is_meta:
        raise SettingsError(
            "--model: its weights lie on torch's meta device, which has no values; build it with real ones"
        )
    _check_lengths(x, y)
    few = to_device(part_of(x, slice(0, FEW)), parameter.device)
    try:
        f = model(few)
    except CallError as error:
        raise SettingsError(
            f"--model: {error} What examples hold is the data set's, or --collate's, to say; of data in files, --data-args "
            "chooses the columns."
        ) from error
    except Exception as error:  # the user's own code, as where an example is read
        raise SettingsError(_why(error, few, parameter.dtype)) from error
    if not isinstance(f, Tensor):
        raise SettingsError(
            f"--model: it returns a {type(f).__name__} without logits; expected one tensor, of logits or means"
        )
    if f.ndim < 2 or len(f) != min(FEW, len(y)):
        raise SettingsError(
            f"--model: it returns {tuple(f.shape)} for {min(FEW, len(y))} examples; expected (batch, …, outputs)"
        )
    if not bool(f.isfinite().all()):
        _check_weights(model)
    return f


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that are no numbers, of a model whose outputs are none."""
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if wrong:
        raise SettingsError(
            f"--model: its outputs are NaN or Inf, and so are weights in {listed(wrong)}; give --weights of a training that "
            "has not diverged"
        )


def _check_lengths(x: Any, y: Tensor) -> None:
    sized = not isinstance(x, Mapping) or any(isinstance(value, Tensor) and value.ndim for value in x.values())
    if not sized or not hasattr(x, "__len__"):
        raise SettingsError(f"--data: the inputs of a batch are {_shown(x)}; expected tensors with a place per example")
    if y.ndim == 0 or length_of(x) != len(y):
        targets = len(y) if y.ndim else "one number and no"
        raise SettingsError(
            f"--data: a batch has {length_of(x)} inputs ({_shown(x)}) and {targets} targets; give one target per example"
        )


def _why(error: Exception, x: Any, dtype: torch.dtype) -> str:
    """Return why a model cannot take its first examples, and what to change."""
    text = str(error).strip()
    said = f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
    odd = sorted({str(t.dtype) for _, t in _tensors(x) if t.dtype != dtype and (t.is_floating_point() or _raw(t))})
    if odd and _OF_TYPES.search(text):
        return (
            f"--data: the inputs are {listed(odd)}, but the model's weights are {dtype} ({said}). Convert them in the data set "
            f"or with --collate, such as x.to({dtype})"
        )
    if isinstance(x, Mapping) and not is_flat(x) and isinstance(error, TypeError | AttributeError):
        return (
            f"--model: its forward does not take the mapping of {listed(list(map(str, x)))} that --data gives ({said}). Name "
            "these as arguments of forward, let it take one mapping, or give examples that are pairs (x, y)"
        )
    return (
        f"--model: its forward fails on the first examples, which are {_shown(x)} ({said}). Change the one or the other"
    )


def _raw(t: Tensor) -> bool:
    """Say whether a tensor is as images are stored, and not indices."""
    return t.dtype in (torch.uint8, torch.int8, torch.bool, torch.uint16, torch.int16)


def _tensors(x: Any) -> Iterator[tuple[str, Tensor]]:
    named = flat(x).items() if isinstance(x, Mapping) else [("x", x)]
    yield from ((str(name), value) for name, value in named if isinstance(value, Tensor))


def _shown(x: Any) -> str:
    shapes = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in _tensors(x)]
    return listed(shapes) if shapes else f"a {type(x).__name__}"


# ------------------------------------------------------------------ the targets


def _check_targets(likelihood: str, f: Tensor, y: Tensor) -> None:
    """Refuse targets that do not fit the outputs, of which there are fewer rows."""
    f = f[:1].expand(len(y), *f.shape[1:])
    try:
        likelihood_of(likelihood).check_shapes(f, y.to(f.device))
    except ValueError as error:
        raise SettingsError(f"--data: {error}{_way_out(f, y)}") from error


def _check_shift(config: Config, x: Any, y: Tensor) -> None:
    """Refuse labels of a causal language model that are its input words; of a model of the user's own say so."""
    if config.task != "causal-lm":
        warn_of_unshifted(x, y)
    elif are_unshifted(x, y):
        raise SettingsError(f"--data: {UNSHIFTED}. The data set, or --collate, is the place for it")


def _way_out(f: Tensor, y: Tensor) -> str:
    if (*y.shape, 1) == tuple(f.shape):
        return " Give each example a target of shape (1,), as y.unsqueeze(-1)."
    if y.ndim == f.ndim and y.shape[-1] == 1 and f.shape[-1] > 1:
        return " Take the last dimension away, as y.squeeze(-1)."
    return ""
