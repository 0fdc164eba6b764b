r"""Leading eigenpairs of curvature over a data set, from products with vectors: no matrix of parameters by parameters.

One product with a block of vectors is one pass over the data; :mod:`laplace.linalg.lowrank` searches in the space of these.
Products of Gauss-Newton type are :math:`\sum_n J_n^\top \Lambda_n J_n u` with :math:`\Lambda_n = \sum_k v_k v_k^\top` the
estimator's own; those of the Hessian differentiate the gradient along :math:`u`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace.capture.evaluation import eval_mode
from laplace.capture.fallback import input_tensors, rebuild_inputs
from laplace.capture.forward import failures_named
from laplace.capture.stateless import with_tensors
from laplace.data.batches import batches
from laplace.linalg.lowrank import block_lanczos
from laplace.linalg.precision import widened, without_autocast
from laplace.structures import passes


def eigenpairs(backend: Any, data_loader: Iterable, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positive eigenvalues among the ``rank`` largest of the curvature summed over a data loader.

    Args:
        backend: Has ``curvature_product(x, y, vectors, offset)`` and ``check_batch(x)``.
        data_loader: Batches; passed through several times, so it has to give the same data again.
        rank: How many eigenpairs at most.

    Returns:
        Eigenvectors ``(parameters, k)``, eigenvalues ``(k,)`` in falling order, and the summed loss.

    Raises:
        ValueError: If the loader is empty, can be passed through only once or changes between passes, or if no eigenvalue is
            positive.
    """
    passes.refuse_iterator(data_loader, "Low-rank curvature")
    if backend.subnetwork_indices is not None:
        raise ValueError("Low-rank curvature is over all weights; for a subnetwork use 'full' or 'diag'.")
    size = sum(p.numel() for p in backend.params)
    seen: list[_Summary] = []

    def product(vectors: Tensor) -> Tensor:
        summary, total = _pass(backend, data_loader, vectors, first=not seen)
        seen.append(summary)
        _check_same(seen[0], summary, ordered=backend.stochastic)
        return total

    device, dtype = backend.params[0].device, backend.sums_dtype
    with passes.one_seed(backend):
        vectors, values = block_lanczos(product, size, rank, dtype, device)
    if len(values) == 0:
        raise ValueError(
            "The curvature has no positive eigenvalue at these weights, so there is no low-rank posterior. Train the model, "
            "or use a GGN backend."
        )
    vectors, values = vectors.to(backend.sums_dtype), values.to(backend.sums_dtype)
    return vectors, values, torch.tensor(seen[0].loss, dtype=torch.float64, device=device)


def gauss_newton_product(backend: Any, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Summed loss of one batch, and its GGN or Fisher, along the backend's ``directions``, times ``vectors``."""
    with _outputs(backend, x) as (f, parameters):
        backend.likelihood_object.check(f.detach(), y, offset)
        half = torch.zeros_like(f, requires_grad=True)
        pulled = torch.autograd.grad(f, parameters, half, create_graph=True, allow_unused=True)
        precise = f.detach().to(backend.sums_dtype)
        images = [_derivative(pulled, [half], parameters, u)[0].to(precise.dtype) for u in vectors.T]
        weighted = [torch.zeros_like(image) for image in images]
        for v in backend.directions(precise, y, offset):
            for image, total in zip(images, weighted, strict=True):
                total += v * (v * image).flatten(1).sum(1).reshape(-1, *[1] * (v.ndim - 1))
        columns = []
        for total in weighted:
            grads = torch.autograd.grad(f, parameters, total.to(f.dtype), retain_graph=True, allow_unused=True)
            columns.append(_flat(grads, parameters))
    return backend.likelihood_object.loss(precise, y), torch.stack(columns, 1).to(vectors.dtype)


def hessian_product(backend: Any, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Summed loss of one batch, and its Hessian times ``vectors``."""
    with _outputs(backend, x) as (f, parameters):
        backend.likelihood_object.check(f.detach(), y, offset)
        loss = backend.likelihood_object.loss(f, y)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        columns = [_flat(_derivative(gradients, parameters, parameters, u), parameters) for u in vectors.T]
    return loss.detach(), torch.stack(columns, 1).to(vectors.dtype)


@contextmanager
def _outputs(backend: Any, x: Any) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Outputs of the model (of the last layer, where that is all) and the parameters they depend on, as new leaves."""
    named = backend.named_params
    autocast = torch.is_autocast_enabled(backend.params[0].device.type)
    with eval_mode(backend.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), without_autocast():
        module, prefix = backend.model, ""
        if backend.last_layer:
            with torch.no_grad():
                _, x = backend.model.forward_with_features(x)
            module, prefix = backend.model.last_layer, f"{backend.model.last_layer_name}."
        leaves = {name.removeprefix(prefix): widened(p.detach()).requires_grad_() for name, p in named.items()}
        try:
            yield _run(module, leaves, x, autocast), list(leaves.values())
        except RuntimeError as error:
            if "not implemented" not in str(error):  # torch's words for a gradient without a derivative
                raise
            raise ValueError(
                "hessian_structure='lowrank' differentiates gradients once more, which an operation of the model "
                f"({type(module).__name__}) has no formula for: {error} Use 'kron', 'diag' or 'full'."
            ) from error


def _run(module: nn.Module, leaves: dict[str, Tensor], x: Any, autocast: bool) -> Tensor:
    """A forward pass with leaves in place of parameters; all in float32 at least, since products of few digits add up to none.

    Raises:
        ValueError: If a model of fewer digits cannot be run in float32.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    narrow = {name: widened(t.detach()) for name, t in own.items() if t.is_floating_point() and widened(t) is not t}
    if not narrow and not autocast:
        return with_tensors(module, leaves, x)
    if isinstance(x, (Tensor, Mapping)):
        x = rebuild_inputs(x, input_tensors(x), lambda t: widened(t) if t.is_floating_point() else t)
    try:
        return with_tensors(module, {**narrow, **leaves}, x)
    except RuntimeError as error:
        raise ValueError(
            "hessian_structure='lowrank' and Hessians need products in float32 at least, but this model of fewer digits "
            f"({type(module).__name__}) does not run with weights and inputs in float32: {error} Fit model.float()."
        ) from error


def _derivative(outputs: Iterable, inputs: list[Tensor], parameters: list[Tensor], vector: Tensor) -> list[Tensor]:
    """Gradient in ``inputs`` of the inner product of ``outputs`` (one per parameter) with a parameter vector."""
    parts = vector.split([p.numel() for p in parameters])
    pairs = [
        (g, part.view_as(p).to(g.dtype))
        for g, part, p in zip(outputs, parts, parameters, strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(i) for i in inputs]
    grads = torch.autograd.grad(
        [g for g, _ in pairs], inputs, [v for _, v in pairs], retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]


def _flat(grads: Iterable, parameters: list[Tensor]) -> Tensor:
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
    return torch.cat([part.flatten() for part in parts]).detach()


@dataclass(frozen=True)
class _Summary:
    """What one pass over the data has seen; ``order`` weighs losses by their place."""

    loss: float
    order: float
    n: int


def _pass(backend: Any, data_loader: Iterable, vectors: Tensor, first: bool) -> tuple[_Summary, Tensor]:
    """One pass over the data: its summary and the summed product; the first one asks what a batch may show."""
    loss, order, total, n = 0.0, 0.0, torch.zeros_like(vectors), 0
    for x, y in batches(data_loader, backend.params[0].device, backend.dict_key_y):
        if first:
            backend.check_batch(x)
        with eval_mode(backend.model), failures_named(backend.model, x, "this batch"):
            batch_loss, product = backend.curvature_product(x, y, vectors, n)
        loss, order, n = loss + float(batch_loss), order + n * float(batch_loss), n + len(y)
        total += product
    if n == 0:
        raise ValueError("The data loader is empty, so there is nothing to fit.")
    if not bool(torch.isfinite(total).all()):
        raise ValueError("A product with the curvature is NaN or Inf. Look at the model's weights and the data.")
    return _Summary(loss, order, n), total


def _check_same(first: _Summary, now: _Summary, ordered: bool) -> None:
    passes.check_same((first.n, first.loss), (now.n, now.loss), "Low-rank curvature")
    if ordered and abs(now.order - first.order) > 1e-3 * abs(first.order):
        raise ValueError(
            "The order of the data changes between passes, and the draws of a sampled Fisher belong to the places of the "
            "examples. Use a loader with shuffle=False, or the exact GGN."
        )
