"""Everyday mistakes with data: each gets one sentence that says what was given and what to give instead."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from laplace.errors import MissingKeyError

_FURTHER = (
    " Give further inputs, such as masks, in a dictionary with the first ones and the targets (collate_fn of a DataLoader), "
    "and wrap the model in a module that unpacks it; weights of single examples have no place in the likelihood."
)

UNSHIFTED = (
    "The labels are the input words themselves, and nothing here moves them by one, as the loss of Hugging Face's models does: "
    "a position's label is the next word, labels[:, :-1] = input_ids[:, 1:]; the last position has none, and "
    "WeightedCategorical(ignore_index=-100) as the likelihood leaves it out"
)


def check_loader(loader: Any) -> None:
    """Refuse what is no loader of batches.

    Raises:
        ValueError: If it is a data set, a tensor, one batch, or nothing that can be passed through.
    """
    kind = type(loader).__name__
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(f"{kind} is a data set, which gives single examples; give DataLoader(data_set, batch_size=…).")
    pair = type(loader) in (tuple, list) and len(loader) == 2 and all(isinstance(part, Tensor) for part in loader)
    if isinstance(loader, Tensor) or pair:
        raise ValueError(f"A {kind} of tensors is no loader of batches; give [(x, y)] for one batch, or a DataLoader.")
    if not isinstance(loader, Iterable):
        raise ValueError(f"{kind} is no loader of batches; give a DataLoader, or a list of (inputs, targets).")


def inputs_and_targets(batch: Any, dict_key_y: str, number: int) -> tuple[Any, Tensor]:
    """The two parts of a batch; dict-like batches are themselves the inputs.

    Args:
        batch: What a loader gave.
        dict_key_y: Key of the targets in dict-like batches.
        number: Its place in the loader, for errors.

    Raises:
        MissingKeyError: If a dict-like batch does not have the key.
        ValueError: If it is no pair, or its parts are not batches of tensors.
    """
    if isinstance(batch, MutableMapping):
        if dict_key_y not in batch:
            raise MissingKeyError(f"Dict-like batches need the key {dict_key_y!r} (dict_key_y), got {sorted(batch)}.")
        x, y = batch, batch[dict_key_y]
    elif isinstance(batch, Sequence) and len(batch) == 2:
        x, y = batch
    else:
        length = f" of {len(batch)} parts" if isinstance(batch, Sequence) else ""
        further = len(batch) > 2 if isinstance(batch, Sequence) else False
        raise ValueError(
            f"Batch {number} is {type(batch).__name__}{length}; a batch is (inputs, targets), or dict-like with the key "
            f"{dict_key_y!r} (dict_key_y)." + (_FURTHER if further else "")
        )
    check_inputs(x, f"batch {number}")
    if not isinstance(y, Tensor):
        raise ValueError(
            f"The targets of batch {number} are {type(y).__name__}, not a tensor; give torch.as_tensor(targets), or let a "
            "DataLoader collate them."
        )
    if y.ndim == 0:
        raise ValueError(
            f"The targets of batch {number} are a tensor without dimensions: a single example, not a batch. Give "
            "DataLoader(data_set, batch_size=…), or x[None] and y[None]."
        )
    if len(y) == 0:
        raise ValueError(f"Batch {number} holds no example; leave empty batches out.")
    return x, y


def are_unshifted(x: Any, y: Tensor) -> bool:
    """Whether the labels of a batch of texts, but for those that are left out, are its ``input_ids`` as they are."""
    words = x.get("input_ids") if isinstance(x, Mapping) else None
    if not isinstance(words, Tensor) or words.shape != y.shape or y.ndim < 2 or y.is_floating_point():
        return False
    kept = (y >= 0) & (y.shape[1] > 1)
    return bool(kept.any() and (words.to(y.device) == y)[kept].all())


def warn_of_unshifted(x: Any, y: Tensor) -> None:
    """Say so where :func:`are_unshifted`: a model that copies its input may mean it."""
    if are_unshifted(x, y):
        warnings.warn(f"{UNSHIFTED}.", stacklevel=4)


def check_inputs(x: Any, where: str, ndim: int | None = None) -> None:
    """Refuse inputs that are no batch of tensors.

    Args:
        x: Inputs.
        where: What they belong to, for errors.
        ndim: Number of dimensions that they should have, if that is known.

    Raises:
        ValueError: If they are arrays of numpy, hold no example, or have another number of dimensions.
    """
    if type(x).__module__ == "numpy":
        raise ValueError(f"The inputs of {where} are {type(x).__name__}, not a tensor; give torch.as_tensor(x).")
    if not isinstance(x, Tensor):
        return
    if x.ndim == 0 or (ndim is not None and x.ndim == ndim - 1):
        raise ValueError(
            f"The inputs of {where} have shape {tuple(x.shape)}: the batch dimension is missing. Give x[None] for a single "
            "example."
        )
    if len(x) == 0:
        raise ValueError(
            f"The inputs of {where} have shape {tuple(x.shape)}, which is no example; leave empty batches out."
        )


def check_outputs(x: Any, f: Any) -> None:
    """Refuse outputs that do not have as many rows as there are inputs.

    Raises:
        ValueError: If the model does not keep the batch dimension first.
    """
    if isinstance(x, Tensor) and isinstance(f, Tensor) and (f.ndim == 0 or len(f) != len(x)):
        raise ValueError(
            f"Inputs of shape {tuple(x.shape)} give outputs of shape {tuple(f.shape)}: the first dimension of both must be the "
            "batch. Give x[None] for a single example, and a model that keeps the batch first."
        )
