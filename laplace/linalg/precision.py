"""The precision of the library's own algebra: float64 wherever a tensor lives, and no rounding by autocast or TF32.

Products of float32 matrices are not always of float32. ``torch.autocast`` makes others of them, and so do torch's switches of
TF32 and bfloat16 products, which round what is multiplied to 10 or 7 bits. Models run as their users have set these; what is
contracted from what was captured does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from laplace.linalg.process_settings import Block, WhileAny

_SPACING = {"tf32": 2.0**-10, "bf16": 2.0**-7}
_OF_DEVICE = {"cuda": ("cuda.matmul", "cudnn.conv", "cudnn.rnn"), "cpu": ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")}
KINDS = (*_OF_DEVICE["cuda"], *_OF_DEVICE["cpu"])  # of products, as torch.backends calls them
_CONTRACTED = {"cuda": ("cuda.matmul", "cudnn.conv"), "cpu": ("mkldnn.matmul", "mkldnn.conv")}


def double(values: Tensor) -> Tensor:
    """The tensor in float64: on its own device, or on the host where that has none, as Apple's MPS."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def widened(values: Tensor) -> Tensor:
    """The tensor in float32 at least: of outputs with two digits, logarithms and scores would have no more."""
    return values.float() if torch.finfo(values.dtype).bits < 32 else values


class without_autocast(Block):  # noqa: N801 - used as a function
    """Switch autocast off inside the block, or the function that this decorates: it would round sums to 8 bits."""

    def __enter__(self) -> None:
        """Switch it off where it is on."""
        self._inside = [torch.autocast(device, enabled=False) for device in _with_autocast()]
        for block in self._inside:
            block.__enter__()

    def __exit__(self, *error: Any) -> None:
        """Switch it on again."""
        for block in reversed(self._inside):
            block.__exit__(*error)


def is_autocast_enabled() -> bool:
    """Whether autocast is on, on any device."""
    return bool(_with_autocast())


def _with_autocast() -> list[str]:
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


@contextmanager
def without_kept_casts() -> Iterator[None]:
    """Let autocast convert weights anew at every use inside the block, or the function that this decorates.

    In a block of the user's around a whole fit or training, even one that switches it off, it would keep what it has converted:
    of weights as they were before a step, and without a gradient where a pass without gradients was the first.
    """
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class in_full_precision(without_autocast):  # noqa: N801 - used as a function
    """Switch autocast off inside the block, or the function that this decorates, and products of rounded numbers.

    Other threads stay in full precision as long as they need it.
    """

    def __enter__(self) -> None:
        """Switch off what is on."""
        _unrounded.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Switch it on again."""
        super().__exit__(*error)
        _unrounded.__exit__(*error)


class _WithoutRounding(Block):
    def __enter__(self) -> None:
        kinds = _CONTRACTED["cpu"] + (_CONTRACTED["cuda"] if torch.cuda.is_initialized() else ())
        self._rounded = {kind: found for kind, found in float32_products(kinds).items() if found in _SPACING}
        _set(dict.fromkeys(self._rounded, "ieee"))

    def __exit__(self, *error: Any) -> None:
        _set(self._rounded)


_unrounded = WhileAny(_WithoutRounding)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Compute all products of float32 tensors inside the block in ``'ieee'`` or ``'tf32'``."""
    before = float32_products()
    use_products_in(precision)
    try:
        yield
    finally:
        _set_as_before_2_9(before)
        _set(before)


def use_products_in(precision: str) -> None:
    """The same from now on."""
    wanted = dict.fromkeys(KINDS, precision)
    _set_as_before_2_9(wanted)
    _set(wanted)


def float32_products(kinds: Iterable[str] = KINDS) -> dict[str, str]:
    """Return in what products of float32 tensors are computed.

    Args:
        kinds: Of products, by library.

    Returns:
        ``'ieee'`` or ``'none'`` for float32 itself, ``'tf32'`` or ``'bf16'``, by kind.
    """
    if _is_set_by_kind():
        return {kind: _place(kind).fp32_precision for kind in kinds}
    cudnn = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    found = {
        **dict.fromkeys(KINDS, "ieee"),
        "cuda.matmul": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "cudnn.conv": cudnn,
        "cudnn.rnn": cudnn,
        "mkldnn.matmul": "bf16" if torch.get_float32_matmul_precision() == "medium" else "ieee",
    }
    return {kind: found[kind] for kind in kinds}


def matmul_precision(products: Mapping[str, str]) -> str:
    """The word of ``torch.get_float32_matmul_precision`` for what :func:`float32_products` has found."""
    if products["mkldnn.matmul"] == "bf16":
        return "medium"
    return "high" if products["cuda.matmul"] in _SPACING else "highest"


def spacing_of_products(device: torch.device) -> float:
    """Spacing of the numbers near 1 to which products of float32 tensors on a device round what they multiply, if they do."""
    precisions = float32_products(_OF_DEVICE.get(device.type, ()))
    return max((_SPACING.get(precision, 0.0) for precision in precisions.values()), default=0.0)


def coarsest(*tensors: Tensor) -> float:
    """Spacing near 1 of the coarsest numbers that tensors come from: by their types, and by products where they are."""
    spacings = [torch.finfo(kind).eps for kind in {t.dtype for t in tensors}]
    return max(*spacings, *(spacing_of_products(device) for device in {t.device for t in tensors}))


@lru_cache
def _is_set_by_kind() -> bool:
    """Whether this torch knows kinds of products, as it does from 2.9 on; they then are what counts.

    The older switches refuse to be read where they differ from the kinds, so that both are set.
    """
    return hasattr(torch.backends.cudnn, "conv")


def _set(wanted: Mapping[str, str]) -> None:
    if _is_set_by_kind():
        for kind, precision in wanted.items():
            _place(kind).fp32_precision = precision
    elif "cuda.matmul" in wanted:
        torch.backends.cuda.matmul.allow_tf32 = wanted["cuda.matmul"] == "tf32"


def _set_as_before_2_9(wanted: Mapping[str, str]) -> None:
    torch.set_float32_matmul_precision(matmul_precision(wanted))
    torch.backends.cudnn.allow_tf32 = wanted["cudnn.conv"] == "tf32"


@lru_cache
def _place(kind: str) -> Any:
    """What of torch.backends holds the precision of a kind of products."""
    return attrgetter(kind)(torch.backends)
