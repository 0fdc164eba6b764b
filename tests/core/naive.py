"""Curvature written down from its definitions, in float64, one example and one output at a time; slow on purpose.

Nothing here uses the library: Jacobian rows come from one call of ``torch.autograd.grad`` each, layer inputs and output
gradients from hooks on one example, patches of convolutions from slicing.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def example_jacobian(model, x):
    """Jacobian of one example's flattened outputs ``(outputs, parameters)`` over parameters with ``requires_grad``."""
    params = [p for p in model.parameters() if p.requires_grad]
    f = model(x[None])[0].flatten()
    rows = []
    for value in f:
        grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        flat = [torch.zeros(p.numel()).to(p) if g is None else g.flatten() for g, p in zip(grads, params, strict=True)]
        rows.append(torch.cat(flat))
    return torch.stack(rows)


def jacobians(model, xs):
    """``(batch, outputs, parameters)``."""
    return torch.stack([example_jacobian(model, x) for x in xs])


def output_hessian(f, likelihood, y=None):
    """Hessian of one example's negative log likelihood in its outputs ``(..., outputs)``, flattened to a square.

    A likelihood without a name is an object with ``hessian(f, y)`` and ``loss(f, y)`` for one example with one position.
    """
    if not isinstance(likelihood, str):
        return likelihood.hessian(f, y)
    if likelihood == "regression":
        return torch.eye(f.numel(), dtype=f.dtype)
    blocks = []
    for logits in f.reshape(-1, f.shape[-1]):
        p = logits.exp() / logits.exp().sum()
        blocks.append(torch.diag(p) - torch.outer(p, p))
    return torch.block_diag(*blocks)


def example_loss(f, y, likelihood):
    """Negative log likelihood of one example, summed over its positions, without the Gaussian's constant."""
    if not isinstance(likelihood, str):
        return likelihood.loss(f, y)
    if likelihood == "regression":
        return 0.5 * ((f - y) ** 2).sum()
    total = 0.0
    for logits, label in zip(f.reshape(-1, f.shape[-1]), y.reshape(-1), strict=True):
        total = total - (logits[label] - torch.log(torch.exp(logits).sum()))
    return total


def loss(model, xs, ys, likelihood):
    """Summed over examples."""
    return sum(example_loss(model(x[None])[0], y, likelihood) for x, y in zip(xs, ys, strict=True)).detach()


def example_gradient(model, x, y, likelihood):
    """Gradient of one example's loss over parameters with ``requires_grad``."""
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(example_loss(model(x[None])[0], y, likelihood), params, allow_unused=True)
    flat = [torch.zeros(p.numel()).to(p) if g is None else g.flatten() for g, p in zip(grads, params, strict=True)]
    return torch.cat(flat)


def full(model, xs, ys, likelihood, estimator):
    """Dense exact GGN (``'ggn'``) or empirical Fisher (``'ef'``)."""
    total = 0.0
    for x, y in zip(xs, ys, strict=True):
        if estimator == "ef":
            g = example_gradient(model, x, y, likelihood)
            total = total + torch.outer(g, g)
        else:
            j = example_jacobian(model, x)
            total = total + j.T @ output_hessian(model(x[None])[0].detach(), likelihood, y) @ j
    return total


def patches(module, x):
    """Rows that multiply the flattened weight for one example: ``(positions, in)``."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals]
    elif module.padding == "valid":
        sides = [(0, 0), (0, 0)]
    else:
        sides = [(p, p) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, (*sides[1], *sides[0]), mode=mode)[0]
    rows = []
    for top in range(0, x.shape[1] - dilation[0] * (kernel[0] - 1), stride[0]):
        for left in range(0, x.shape[2] - dilation[1] * (kernel[1] - 1), stride[1]):
            bottom, right = top + dilation[0] * (kernel[0] - 1) + 1, left + dilation[1] * (kernel[1] - 1) + 1
            rows.append(x[:, top : bottom : dilation[0], left : right : dilation[1]].flatten())
    return torch.stack(rows)


def layer_records(model, modules, x, y, likelihood):
    """For modules that share a weight: inputs of all calls ``(positions, in)``, ``df/dz (outputs, positions, out)`` and ``dloss/dz`` for one example."""
    inputs, probes = [], []

    def hook(m, args, output):
        inputs.append(patches(m, args[0].detach().clone()))
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    handles = [module.register_forward_hook(hook) for module in modules]
    f = model(x[None])[0]
    for handle in handles:
        handle.remove()

    def by_position(grads):
        if isinstance(modules[0], nn.Conv2d):
            return torch.cat([g[0].flatten(1).T for g in grads])
        return torch.cat([g[0].reshape(-1, g.shape[-1]) for g in grads])

    outputs = [by_position(torch.autograd.grad(v, probes, retain_graph=True)) for v in f.flatten()]
    gradient = by_position(torch.autograd.grad(example_loss(f, y, likelihood), probes))
    return torch.cat(inputs), torch.stack(outputs), gradient, f.detach()


def layer_factors(model, modules, xs, ys, likelihood, estimator):
    """KFAC-expand factors of one weight, of one module or several: summed output factor, input factor averaged over examples."""
    left, right = 0.0, 0.0
    for x, y in zip(xs, ys, strict=True):
        a, g, gradient, f = layer_records(model, modules, x, y, likelihood)
        hessian = output_hessian(f, likelihood, y)
        for r in range(len(a)):
            right = right + torch.outer(a[r], a[r]) / len(a)
            if estimator == "ef":
                left = left + torch.outer(gradient[r], gradient[r])
            else:
                left = left + g[:, r].T @ hessian @ g[:, r]
    return left, right / len(xs)


def kron(model, xs, ys, likelihood, estimator, fallback=()):
    """For every parameter its Kronecker factors: ``[B, A]`` or ``[B]``; a vector for the names in ``fallback``."""
    diagonal = full(model, xs, ys, likelihood, estimator).diagonal()
    factors, start = [], 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        stop = start + p.numel()
        if name in fallback:
            factors.append([diagonal[start:stop]])
        else:
            key = name.rpartition(".")[2]
            modules = [m for m in model.modules() if getattr(m, key, None) is p]
            b, a = layer_factors(model, modules, xs, ys, likelihood, estimator)
            factors.append([b, a] if p.ndim > 1 else [b])
        start = stop
    return factors


def kron_matrix(factors):
    """Dense block-diagonal matrix of the factors."""
    blocks = [[torch.diag(f) if f.ndim == 1 else f for f in fs] for fs in factors]
    return torch.block_diag(*[torch.kron(*fs) if len(fs) == 2 else fs[0] for fs in blocks])


def glm_covariance(js, precision):
    """``J P^-1 J^T`` by a dense inverse, ``(batch, outputs, outputs)``."""
    inverse = torch.linalg.inv(precision)
    return torch.stack([j @ inverse @ j.T for j in js])


def relative_error(value, truth):
    """Frobenius norm of the difference over that of the truth."""
    assert value.shape == truth.shape, (value.shape, truth.shape)
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300))
