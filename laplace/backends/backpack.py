"""Curvature by way of BackPACK (https://backpack.pt), for models that are :class:`torch.nn.Sequential`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.backends.optional import import_optional
from laplace.backends.options import honours
from laplace.backends.per_example import Gradients, PerExampleInterface
from laplace.linalg.kronecker import Kron
from laplace.noise import fresh_seed
from laplace.structures.specification import SumsSpec

bp = import_optional("backpack", "backpack-for-pytorch", "backpack")
extensions = import_optional("backpack.extensions", "backpack-for-pytorch", "backpack")


class BackPackInterface(PerExampleInterface):
    """Per-example gradients and Kronecker factors by BackPACK, for :class:`torch.nn.Sequential` models only.

    Jacobians that have to pass gradients to the inputs come from :mod:`torch.func`: the model itself is never extended, so
    the two do not get into each other's way.
    """

    package = "BackPACK"

    def _module(self, x: Any) -> tuple[nn.Module, Any]:
        if not self.last_layer:
            _check_sequential(self.model)
        module, inputs = super()._module(x)
        for part in module.modules():
            if getattr(part, "padding", None) == "valid":
                part.padding = (0,) * len(part.kernel_size)  # BackPACK counts on numbers
        return module, inputs

    @contextmanager
    def _linearised(self, module: nn.Module, x: Any) -> Iterator[tuple[Tensor, Gradients]]:
        bp.extend(module)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        with bp.backpack(extensions.BatchGrad(), retain_graph=True):
            output = module(x)

            def gradients(v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
                for p in named.values():
                    p.grad_batch = None
                with _refusals():
                    sums = torch.autograd.grad(output, named.values(), v, retain_graph=True, allow_unused=True)
                sums = [torch.zeros_like(p) if g is None else g for g, p in zip(sums, named.values(), strict=True)]
                rows = [p.grad_batch for p in named.values()]
                return [
                    g.new_zeros(len(v), *g.shape) if r is None else r for r, g in zip(rows, sums, strict=True)
                ], sums

            yield output, gradients


class BackPackGGN(BackPackInterface, GGNInterface):
    """Exact GGN, or its Monte-Carlo Fisher estimate, by BackPACK.

    With ``stochastic=True``, the draws behind Kronecker factors are BackPACK's own: they belong to the batch, through the
    seed and the index of its first example, not to the example.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import BackPackGGN
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "diag", backend=BackPackGGN)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def initialize(self, x: Any, structure: str) -> SumsSpec:
        """Decide from one batch which parameter's curvature comes from where.

        Raises:
            ValueError: If Kronecker factors are asked for and BackPACK does not know the likelihood.
        """
        if structure == "kron":
            self._require_torch_loss(self.package)
        return super().initialize(x, structure)

    @honours("mc_samples")
    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Kronecker factors of one batch (KFLR, or KFAC if stochastic), their input side divided by ``N``.

        Raises:
            ValueError: If a layer is not one that BackPACK has these factors for.
        """
        self._initialize_kron(x, self.package)
        module, inputs = self._module(x)
        loss_module = bp.extend(type(self.lossfunc)(reduction="sum"))
        bp.extend(module)
        name = "kfac" if self.stochastic else "kflr"
        extension = extensions.KFAC(self.num_samples) if self.stochastic else extensions.KFLR()
        with _refusals(), bp.backpack(extension, extension_hook=_refuse_sharing), self._own_generator():
            output = module(inputs)
            f = output.detach()
            self.likelihood_object.check(f, y, self._offset)
            if f.ndim != 2:
                raise NotImplementedError(f"outputs of shape {tuple(f.shape)}, not (batch, outputs)")
            loss_module(output, y if y.is_floating_point() else y.long()).backward()
        parameters = dict(module.named_parameters())
        kfacs = []
        for block in self.spec.blocks:
            key = block.parameter.rpartition(".")[2] if self.last_layer else block.parameter
            factors = getattr(parameters[key], name)
            kfacs.append([factors[0] * self.factor, *[a * (len(y) / N) for a in factors[1:]]])
        return self.likelihood_object.loss(f, y), Kron(kfacs)

    def examples_at_once(self, spec: SumsSpec) -> int:
        """Fewer than elsewhere: BackPACK's factors are one product over all examples and all directions."""
        directions = self.num_samples if self.stochastic else spec.n_outputs
        return max(1, super().examples_at_once(spec) // (directions if spec.structure == "kron" else 1))

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        """Let BackPACK draw from a seed of its own, and leave the global generators as they were."""
        if not self.stochastic:
            yield
            return
        seed = fresh_seed(31) if self.seed is None else self.seed * 1_000_003 + self._offset
        with torch.random.fork_rng():
            torch.manual_seed(seed % (1 << 62))
            yield


class BackPackEF(BackPackInterface, EFInterface):
    """Empirical Fisher by BackPACK; it has no Kronecker factors of that.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import BackPackEF
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "diag", backend=BackPackEF)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Refused.

        Raises:
            ValueError: Always: BackPACK computes no Kronecker factors of the empirical Fisher.
        """
        raise ValueError(
            "BackPACK has no Kronecker factors of the empirical Fisher. Use NativeEF, CurvlinopsEF or AsdlEF, or "
            "hessian_structure='diag' or 'full'."
        )


def _check_sequential(model: nn.Module) -> None:
    for name, module in model.named_modules():
        container = name == "" or any(True for _ in module.children())
        if container and not isinstance(module, nn.Sequential):
            where = f"its part {name!r} is" if name else "the model is"
            raise ValueError(
                f"The BackPACK backend takes nn.Sequential models only, but {where} {type(module).__name__}. Use the native "
                "or the curvlinops backend."
            )
        if getattr(module, "padding", None) == "same" or getattr(module, "padding_mode", "zeros") != "zeros":
            raise ValueError(
                f"BackPACK takes convolutions padded with a number of zeros, but {name!r} is {module}. Use the native backend."
            )


def _refuse_sharing(module: nn.Module) -> None:
    """BackPACK sums gradients over the positions of a convolution before it multiplies them: another approximation."""
    output = getattr(module, "output", None)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and output is not None and output[0, 0].numel() > 1:
        raise NotImplementedError(
            f"{module} has {output[0, 0].numel()} output positions, and BackPACK's Kronecker factors of shared weights sum "
            "over them before the outer product, which is not KFAC-expand"
        )


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what BackPACK does not implement, or stumbles over, into an error that names the alternative.

    Its warnings are followed by one.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            warnings.filterwarnings("ignore", message="Extension saving to .* does not have an extension")
            yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(f"BackPACK cannot treat this model: {error}. Use the native backend.") from error


__all__ = ["BackPackEF", "BackPackGGN", "BackPackInterface"]
