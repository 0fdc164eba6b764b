"""The state in which every part of the library evaluates a model, and from which it comes back unchanged."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laplace.capture.caches import keeps, renew, without_kept_weights
from laplace.capture.calls import is_batched, nodes
from laplace.capture.feature_extractor import FeatureExtractor
from laplace.capture.turns import turn
from laplace.linalg.precision import without_kept_casts
from laplace.linalg.process_settings import WhileAny

# Models in a block of eval_mode by identity, and those of their modules that keep tensors between passes.
_evaluated: ContextVar[dict[int, list[nn.Module]]] = ContextVar("_evaluated", default={})  # noqa: B039 - never changed
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate the model inside the block and leave every module as it was found.

    Modules are in evaluation mode, embeddings give the dense gradient of their output and not one scaled by frequency,
    recurrent layers run as the products that they are made of, which are seen and have a gradient on every device, and
    attention as in training, since torch's faster way without gradients has zeros at padded positions. The model is handed
    copies of its inputs: a forward pass that changes its input in place changes no data and no later pass. Nor does
    ``torch.nn.utils.parametrize.cached()`` around it keep weights from one pass to the next.
    Inside of ``torch.inference_mode()``, tensors are ordinary ones without gradient. What was compiled runs as it was written:
    hooks see none of the layers of a compiled graph. Autocast keeps no converted weights.
    Gradients of normalisations come in order. A block inside of another one of the same model costs next to nothing: who makes
    many passes opens one around them. Other threads wait for their turn.
    """
    around = _evaluated.get()
    if id(model) in around:
        renew(around[id(model)])
        yield
        return
    with turn(model), _evaluating(model, around):
        yield


@contextmanager
def _evaluating(model: nn.Module, around: dict[int, list[nn.Module]]) -> Iterator[None]:
    modules = list(model.modules())
    keepers = [module for module in modules if keeps(module)]
    training = [module for module in modules if module.training]
    scaled = [module for module in modules if getattr(module, "scale_grad_by_freq", False)]
    sparse = [module for module in modules if isinstance(module, _TABLES) and module.sparse]
    own = model.model if isinstance(model, FeatureExtractor) else model
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(_eager)
        stack.enter_context(without_kept_casts())
        if any(isinstance(module, nn.RNNBase) for module in modules):
            stack.enter_context(_unfused_layers)
        if any(parametrize.is_parametrized(module) for module in modules):
            stack.enter_context(_own_weights)
        if any(isinstance(module, _ATTENTION) for module in modules):
            stack.enter_context(_trained_attention)
        handles = [own.register_forward_pre_hook(_with_own_inputs, prepend=True, with_kwargs=True)]
        handles.append(own.register_forward_hook(_in_order))
        entered = _evaluated.set({**around, id(model): keepers})
        try:
            model.eval()
            renew(keepers)
            _set(scaled, "scale_grad_by_freq", False)
            _set(sparse, "sparse", False)
            yield
        finally:
            _evaluated.reset(entered)
            for handle in handles:
                handle.remove()
            renew(keepers)
            _set(training, "training", True)
            _set(scaled, "scale_grad_by_freq", True)
            _set(sparse, "sparse", True)


@contextmanager
def _unfused() -> Iterator[None]:
    """Without libraries whose recurrent layers are single operations, of which cuDNN's have no gradient when evaluated."""
    libraries = torch.backends.cudnn, torch.backends.mkldnn
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_eager, _unfused_layers = WhileAny(lambda: torch.compiler.set_stance("force_eager")), WhileAny(_unfused)
_trained_attention, _own_weights = WhileAny(_without_fast_path), WhileAny(without_kept_weights)


def _set(modules: list[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        setattr(module, name, value)


def _in_order(module: nn.Module, args: tuple, output: Any) -> None:
    """Hand the backward passes of normalisations in a model their gradients in memory as they are in order.

    What is one example to it, as all examples together are to an instance norm, torch 2.14 takes in another order where the
    gradient is transposed, as before a flattened sequence, and gives a wrong one without a word. By node and not by module,
    since functions normalise as well.
    """
    if not isinstance(output, Tensor) or is_batched(output):
        return
    for node in nodes(output):
        if "BatchNorm" in type(node).__name__ and node._input_metadata[0].shape[0] == 1:
            node.register_prehook(_contiguous)


def _contiguous(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else gradient.contiguous() for gradient in gradients)


def _with_own_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tuple(_copied(arg) for arg in args), {name: _copied(arg) for name, arg in kwargs.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, part in value.items():
            result[key] = _copied(part)
        return result
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value
