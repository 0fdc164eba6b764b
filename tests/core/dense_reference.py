"""What is right of a random model: dense float64 Jacobians, one example at a time.

The reference is :mod:`tests.core.naive` for any inputs and outputs. It knows a model as a function and its parameters; of
modules it asks one thing, for Kronecker factors: what went into a linear layer or convolution, and the gradient of what
came out. Factors exist where these give the layer's Jacobian on every example.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import naive
from .random_features import Block
from .random_laws import LAWS
from .random_models import Case, Plan, part

PRIOR, NOISE = 0.7, 0.8
FACTORED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def outputs(model: nn.Module, x: Any) -> torch.Tensor:
    """The first tensor that a model returns, as it was written: compiled graphs show their layers to no hook."""
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        f = model(x)
    return f["logits"] if isinstance(f, dict) else f[0] if isinstance(f, tuple) else f


class Reference:
    """Dense curvature of one case in float64.

    Attributes:
        names: Parameters with a distribution, in order.
        f: Outputs ``(batch, …)``.
        js: Jacobians ``(batch, outputs, parameters)``.
        hessians: Hessians of the examples' losses in the flattened outputs.
        factors: For every parameter, ``[B, A]``, ``[B]``, or None where there are none by definition.
    """

    def __init__(self, plan: Plan, case: Case):
        self.plan, self.model = plan, case.model.double().eval()
        make_exact(self.model)
        self.likelihood = "regression" if plan.likelihood == "regression" else "classification"
        self.likelihood = LAWS[plan.likelihood].naive if plan.likelihood in LAWS else self.likelihood
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        inside = f"{case.head}."
        self.names = [n for n in trainable if plan.subset != "last_layer" or n.startswith(inside)]
        self.params = [trainable[n] for n in self.names]
        self.x = [doubled(part(case.x, slice(i, i + 1))) for i in range(len(case.y))]
        self.y = case.y.double() if self.likelihood == "regression" or case.y.is_floating_point() else case.y
        self.calls = {n: m for n, m in self.model.named_modules() if isinstance(m, (*FACTORED, *TRANSPOSED))}
        self.calls = self.calls if plan.structure == "kron" else {}
        self._sums: dict[str, list[Any]] = {}
        self._broken: set[str] = set()
        self._moved: set[str] = set()  # weights of products of which an example has a gradient
        self.unseen: set[str] = set()  # weights that are multiplied where no reference looks
        found = [self._example(x, y) for x, y in zip(self.x, self.y, strict=True)]
        self.f, self.js = torch.stack([f for f, _ in found]), torch.stack([j for _, j in found])
        self.hessians = [
            naive.output_hessian(f if f.ndim else f[None], self.likelihood, y)
            for f, y in zip(self.f, self.y, strict=True)
        ]
        terms = zip(self.f, self.y, strict=True)
        self.loss = float(sum(naive.example_loss(f, y, self.likelihood) for f, y in terms))
        self.ggn = sum(j.T @ h @ j for j, h in zip(self.js, self.hessians, strict=True))
        self.theta = torch.cat([p.detach().flatten() for p in self.params])

    def _example(self, x: Any, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls: dict[str, list] = {}
        handles = []
        for name, module in self.calls.items():

            def hook(m, args, kwargs, z, name=name):
                a = args[0] if args else kwargs["input"]
                calls.setdefault(name, []).append((a.detach().clone(), torch.zeros_like(z, requires_grad=True)))
                return z + calls[name][-1][1]

            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        with _Multiplied(dict(zip(self.names, self.params, strict=True)) if self.calls else {}) as products:
            f = outputs(self.model, cloned(x))[0]
        for handle in handles:
            handle.remove()
        calls |= products.calls
        self.unseen |= products.unseen
        probes = [probe for made in calls.values() for _, probe in made]
        rows, slopes = [], []
        for value in f.flatten():
            grads = torch.autograd.grad(value, self.params + probes, retain_graph=True, allow_unused=True)
            flat = [flattened(g, p) for g, p in zip(grads, self.params, strict=False)]
            rows.append(torch.cat(flat).detach())
            slopes.append(grads[len(self.params) :])
        js = torch.stack(rows)
        if calls:
            self._add_calls(f.detach(), y, js, calls, slopes)
        return f.detach(), js

    def _add_calls(self, f, y, js, calls, slopes) -> None:
        hessian = naive.output_hessian(f if f.ndim else f[None], self.likelihood, y)
        start = 0
        for name, made in calls.items():
            inputs, gradients = [], []
            for number, (a, _) in enumerate(made):
                g = [row[start + number] for row in slopes]
                if all(value is None for value in g):
                    continue  # a call that reaches no output
                zero = torch.zeros_like(made[number][1])
                module = self.calls.get(name, _LINEAR)
                gradients.append(torch.stack([_positions(module, zero if v is None else v) for v in g]))
                inputs.append(_rows(module, a))
            start += len(made)
            if inputs:
                self._add_factors(name, inputs, torch.cat(gradients, 1), hessian, js)

    def _add_factors(self, name, inputs, g, hessian, js) -> None:
        """Add one example's factors, or note that they are not the layer's."""
        spans, stop = {}, 0
        for parameter, p in zip(self.names, self.params, strict=True):
            spans[parameter], stop = slice(stop, stop + p.numel()), stop + p.numel()
        if name not in self.calls:  # a weight by itself
            a = torch.cat(inputs)
            rows = g.sum(1) if self._is_bias(name) else torch.einsum("cro,ri->coi", g, a).flatten(1)
            self._check(name, rows, js, spans, f"{name} by products")
        else:
            self._check(f"{name}.bias", g.sum(1), js, spans)
        left, right = torch.einsum("cro,cd,drp->op", g, hessian, g).contiguous(), 0.0
        if any(a is None for a in inputs):
            self._broken.add(f"{name}.weight")
        else:
            a = torch.cat(inputs)
            if name in self.calls:
                self._check(f"{name}.weight", torch.einsum("cro,ri->coi", g, a).flatten(1), js, spans)
            right = (a.T @ a / len(a)).contiguous()
        known = self._sums.setdefault(name, [0.0, 0.0, 0])
        self._sums[name] = [known[0] + left, known[1] + right, known[2] + 1]

    def _check(self, parameter, rows, js, spans, called="") -> None:
        if parameter in spans:
            truth = js[:, spans[parameter]]
            if called and truth.norm() > 0:
                self._moved.add(parameter)
            if rows.shape != truth.shape or (rows - truth).norm() > 1e-9 * (rows.norm() + truth.norm()):
                self._broken.add(called or parameter)

    def _is_bias(self, parameter: str) -> bool:
        return self.params[self.names.index(parameter)].ndim == 1

    def factors(self, parameter: str) -> list[torch.Tensor] | None:
        """``[B, A]`` or ``[B]`` of one parameter, None where it has none."""
        name, _, kind = parameter.rpartition(".")
        if parameter in self._sums and f"{parameter} by products" not in self._broken:
            left, right, n = self._sums[parameter]
            if n == len(self.x) and parameter in self._moved and (parameter in self._broken or name not in self._sums):
                return [left] if self._is_bias(parameter) else [left, right / n]
        if parameter in self._broken or name not in self._sums or kind not in ("weight", "bias"):
            return None
        left, right, n = self._sums[name]
        return [left, right / n] if kind == "weight" and n == len(self.x) else [left] if kind == "bias" else None

    def log_evidence(self, curvature: torch.Tensor, chosen: torch.Tensor, temper: float) -> float:
        """Laplace's approximation at the prior precision ``PRIOR``."""
        precision = temper * curvature + PRIOR * torch.eye(len(curvature), dtype=torch.float64)
        ratio = torch.linalg.slogdet(precision)[1] - len(curvature) * math.log(PRIOR)
        fit = -temper * self.loss
        if self.likelihood == "regression":
            fit = fit - self.f.numel() * 0.5 * math.log(NOISE**2 * 2 * math.pi)
        return float(fit - 0.5 * (ratio + PRIOR * self.theta[chosen].square().sum()))


def is_factored(module: nn.Module) -> bool:
    """Whether a module is of a kind that has Kronecker factors."""
    return isinstance(module, FACTORED) and getattr(module, "groups", 1) == 1


def doubled(x: Any) -> Any:
    """Inputs in float64."""
    if isinstance(x, dict):
        return {key: doubled(value) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(doubled(value) for value in x)
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def cloned(x: Any) -> Any:
    return part(x, slice(None))


def flattened(g: torch.Tensor | None, p: torch.Tensor) -> torch.Tensor:
    return torch.zeros(p.numel(), dtype=p.dtype) if g is None else (g.to_dense() if g.is_sparse else g).flatten()


def _positions(module: nn.Module, g: torch.Tensor) -> torch.Tensor:
    """The gradient of what came out of a layer, ``(positions, out)``."""
    return g.reshape(-1, g.shape[-1]) if isinstance(module, nn.Linear) else g.movedim(1, -1).flatten(0, -2)


def _rows(module: nn.Module, a: torch.Tensor) -> torch.Tensor | None:
    """What multiplies the flattened weight, ``(positions, in)``; of a convolution, the derivative of its first channel.

    None where the weight has no factors, or others than these; the bias has some.
    """
    if isinstance(module, nn.Linear):
        return a.reshape(-1, a.shape[-1])
    if "weight" not in dict(module.named_parameters(recurse=False)) or not is_factored(module):
        return None
    with torch.enable_grad():
        weight = module.weight.detach().clone().requires_grad_()
        parameters = {**{n: p.detach() for n, p in module.named_parameters()}, "weight": weight}
        z = torch.func.functional_call(_Bare(module), {f"module.{n}": p for n, p in parameters.items()}, (a,))
        channel = z.movedim(1, -1).flatten(0, -2)[:, 0]
        eye = torch.eye(len(channel), dtype=a.dtype)
        rows = [torch.autograd.grad(channel, weight, e, retain_graph=True)[0][0].flatten() for e in eye]
        return torch.stack(rows).detach()


_LINEAR = nn.Linear(1, 1)


class _Multiplied(TorchFunctionMode):
    """Inputs of the products with parameters by identity, and probes that are added to what comes out; biases as weights."""

    def __init__(self, params: dict[str, torch.Tensor]):
        super().__init__()
        self.names = {id(p): name for name, p in params.items() if p.ndim in (1, 2)}
        self.calls: dict[str, list] = {}
        self.unseen: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [self.names.get(id(value)) for value in args[1:]] if func is F.linear else []
        names = [name for name in found if name is not None]
        if not names:
            return out
        if torch._C._functorch.is_functorch_wrapped_tensor(out):
            self.unseen.update(names)
            return out
        probe = torch.zeros_like(out, requires_grad=True)
        for name in names:
            self.calls.setdefault(name, []).append((args[0].detach().clone(), probe))
        return out + probe


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.forward(x)


def make_exact(model: nn.Module) -> None:
    """Ask features for what plain autograd differentiates."""
    for module in model.modules():
        if isinstance(module, Block):
            module.exact = True
        if isinstance(module, nn.Embedding):
            module.scale_grad_by_freq = False  # of a derivative that is none
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.register_forward_hook(_in_order)


def _in_order(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    """Of a single example, torch gives a wrong gradient where that of the output is transposed in memory."""
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())
