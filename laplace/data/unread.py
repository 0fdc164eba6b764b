"""Keys of a batch that a model takes without a word and does nothing with.

A ``forward`` with ``**kwargs``, as Hugging Face's models have it, takes a misspelt key as well as any other, and computes
something else. So the first batch is run once more, to see which of the keys that ``forward`` does not name are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from laplace.errors import CallError


class _Reads(TorchFunctionMode):
    """Remembers every tensor that an operation is given inside the block, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.tensors.update(map(id, _tensors((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def check_read(call: Callable[..., Any], forward: Callable, batch: Mapping[str, Any]) -> None:
    """Refuse a batch with tensors under keys that nothing in the model reads, and without which it answers the same.

    Either alone is no proof: a mask in which nothing is hidden changes no answer, and torch does not show what
    compiled code reads.

    Args:
        call: The model, called by keywords.
        forward: What has the signature of the call.
        batch: The keywords.

    Raises:
        CallError: Names the keys.
    """
    parameters = inspect.signature(forward).parameters
    asked = [key for key in batch if key not in parameters and _tensors(batch[key])]
    if not asked:
        return
    with _Reads() as reads:
        answer = call(**batch)
    unread = [key for key in asked if reads.tensors.isdisjoint(map(id, _tensors(batch[key])))]
    if unread and _answers(call, {key: value for key, value in batch.items() if key not in unread}, answer):
        free = [
            name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and name not in (*batch, "self")
        ]
        raise CallError(
            f"The model's forward takes {', '.join(map(repr, unread))} of the batch as further keywords (**kwargs), and does "
            "nothing with them. Leave them out of the examples"
            + (f", or call them what it reads; it knows {', '.join(free)} too." if free else ".")
        )


def _answers(call: Callable[..., Any], batch: Mapping[str, Any], answer: Any) -> bool:
    """Whether the model gives the same for a smaller batch."""
    try:
        other = call(**batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    ours, theirs = _tensors(answer), _tensors(other)
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in mappings, lists and tuples."""
    if isinstance(value, Mapping):  # of any class, such as ModelOutput
        value = list(value.values())
    leaves = optree.tree_leaves(value)
    found = [inner for leaf in leaves if isinstance(leaf, Mapping) for inner in _tensors(leaf)]
    return found + [leaf for leaf in leaves if isinstance(leaf, Tensor)]
