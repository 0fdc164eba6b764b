"""Curvature by way of ASDL (the package asdfghjkl 0.1a4, whose module is called ``asdl``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.backends.asdl_limits import check_layer, check_own, hooks_of, owners_of
from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.backends.hessian import HessianInterface
from laplace.backends.optional import import_optional
from laplace.backends.options import honours
from laplace.backends.per_example import Gradients, PerExampleInterface
from laplace.enums import Likelihood
from laplace.linalg.kronecker import Kron

asdl = import_optional("asdl", "asdfghjkl==0.1a4", "asdl")


class AsdlInterface(PerExampleInterface):
    r"""Kronecker factors and per-example gradients from ASDL's hooks.

    ASDL 0.1a4 sums over the positions of a sequence where its diagonal and its input factor should not, divides sampled
    losses by the number of samples instead of its root, and draws from the global generator. So only its contractions for
    one direction in output space are used here; the directions are this library's own.
    """

    package = "ASDL"

    @property
    def loss_type(self) -> str:
        """ASDL's name of the loss, ``'mse'`` or ``'cross_entropy'``."""
        self._require_torch_loss(self.package)
        return asdl.LOSS_MSE if isinstance(self.lossfunc, nn.MSELoss) else asdl.LOSS_CROSS_ENTROPY

    @honours("mc_samples")
    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Kronecker factors of one batch (KFAC-expand), their input side divided by ``N``.

        Raises:
            ValueError: If a parameter belongs to no Linear or Conv2d layer, or ASDL does not take a layer's use.
        """
        self._initialize_kron(x, self.package)
        module, inputs = self._module(x)
        check_own(module)
        layers = {b.layer: module if self.last_layer else module.get_submodule(b.layer) for b in self.spec.blocks}
        for name, layer in layers.items():
            check_layer(name, layer)
        with _recorded(layers) as shapes, _quiet(), asdl.no_centered_cov(module, [asdl.SHAPE_KRON]) as context:
            with hooks_of(module):
                output = module(inputs)
            f = output.detach()
            self.likelihood_object.check(f, y, self._offset)
            parameters = [p for p in module.parameters() if p.requires_grad]
            for v in self.directions(f.double(), y, self._offset):
                with hooks_of(module):
                    torch.autograd.grad(output, parameters, v.to(f.dtype), retain_graph=True, allow_unused=True)
            found = {name: context.cov_kron(layer) for name, layer in layers.items()}
        positions = {name: _positions(name, layers[name], shapes[name], len(f)) for name in layers}
        kfacs = []
        for block in self.spec.blocks:
            if "B" not in found[block.layer]:
                raise ValueError(
                    f"ASDL has not seen the gradient of layer {block.layer!r}: its output is changed in place, or is used "
                    "without a gradient. Use the native backend."
                )
            factors = [found[block.layer]["B"]]
            if len(block.factors) == 2:
                factors.append(found[block.layer]["A"] / (positions[block.layer] * N))
            kfacs.append(factors)
        return self.likelihood_object.loss(f, y), Kron(kfacs)

    @contextmanager
    def _linearised(self, module: nn.Module, x: Any) -> Iterator[tuple[Tensor, Gradients]]:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        owners = owners_of(module, named)
        check_own(module)
        with _quiet(), asdl.extend(module, asdl.OP_BATCH_GRADS) as context:
            with hooks_of(module):
                output = module(x)

            def gradients(v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
                context.clear_batch_grads()
                with hooks_of(module):
                    sums = torch.autograd.grad(output, named.values(), v, retain_graph=True, allow_unused=True)
                sums = [torch.zeros_like(p) if g is None else g for g, p in zip(sums, named.values(), strict=True)]
                rows = [_rows(context, owners[name], len(v)) for name in named]
                rows = [g.new_zeros(len(v), *g.shape) if r is None else r for r, g in zip(rows, sums, strict=True)]
                return rows, sums

            yield output, gradients


class AsdlGGN(AsdlInterface, GGNInterface):
    """Exact GGN, or its Monte-Carlo Fisher estimate, by ASDL.

    Args:
        model: As for :class:`laplace.curvature.GGNInterface`, like all further arguments but one.
        likelihood: See there.
        last_layer: See there.
        subnetwork_indices: See there.
        dict_key_x: See there.
        dict_key_y: See there.
        stochastic: See there.
        asdl_fisher_kwargs: ``n_mc_samples`` and ``seed`` under ASDL's own names; the rest of ASDL's settings follow from
            likelihood and structure.
        **kwargs: See there.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import AsdlGGN
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "kron", backend=AsdlGGN)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    takes_fisher_kwargs = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        *,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """See the class."""
        ours = {"n_mc_samples": "num_samples", "seed": "seed"}
        for name, value in (asdl_fisher_kwargs or {}).items():
            if name not in ours:
                raise ValueError(
                    f"asdl_fisher_kwargs holds {name!r}; valid are {', '.join(map(repr, ours))}. The other settings of ASDL "
                    "follow from the likelihood, the structure and backend_kwargs={'stochastic': …}."
                )
            kwargs[ours[name]] = value
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, stochastic, **kwargs
        )


class _Order:
    """The documented order of arguments of ASDL's other backends, in which a subnetwork has no position."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        **kwargs: Any,
    ):
        """See :class:`laplace.curvature.CurvatureInterface`."""
        super().__init__(model, likelihood, last_layer, dict_key_x=dict_key_x, dict_key_y=dict_key_y, **kwargs)


class AsdlEF(_Order, AsdlInterface, EFInterface):
    """Empirical Fisher by ASDL."""


class AsdlHessian(_Order, HessianInterface, AsdlInterface):
    """Dense Hessian, and its eigenpairs from Hessian-vector products, by ASDL."""

    def curvature_product(self, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss of one batch, and its Hessian times ``vectors`` ``(parameters, k)``."""
        module, maker, loss = self._maker(x, y, offset)
        parameters = [p for p in module.parameters() if p.requires_grad]
        columns = []
        for vector in vectors.to(parameters[0].dtype).T:
            with _twice_differentiable():
                maker.forward_and_backward(hvp=True, vec=asdl.ParamVector(parameters, vector.contiguous()))
            columns.append(getattr(module, maker.config.hvp_attr).get_flatten_vector())
        return loss, torch.stack(columns, 1).to(vectors.dtype)

    def _dense(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        module, maker, loss = self._maker(x, y, self._offset)
        with _twice_differentiable():
            maker.forward_and_backward()
        return loss, getattr(module, maker.config.hessian_attr).data.to(self.sums_dtype)

    def _maker(self, x: Any, y: Tensor, offset: int) -> tuple[nn.Module, Any, Tensor]:
        """A copy of the module, ASDL's worker for it, and the loss."""
        module, inputs = self._module(x)
        with torch.no_grad():
            f = module(inputs)
        self.likelihood_object.check(f, y, offset)
        maker = asdl.HessianMaker(module, asdl.HessianConfig(hessian_shapes=[asdl.SHAPE_FULL]))
        maker.setup_loss_call(self.likelihood_object.loss, maker.setup_model_call(module, inputs), y)
        return module, maker, self.likelihood_object.loss(f, y)


@contextmanager
def _recorded(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[torch.Size]]]:
    """Record inside the block the shapes of the inputs of every layer."""
    shapes: dict[str, list[torch.Size]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(
            lambda m, args, out, name=name: shapes[name].append(args[0].shape if args else None)
        )
        for name, layer in layers.items()
    ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def _positions(name: str, layer: nn.Module, shapes: list[torch.Size], n: int) -> int:
    """How many positions of an example ASDL's input factor has added up (it averages those of convolutions itself)."""
    if len(shapes) != 1:
        raise ValueError(f"Layer {name!r} runs {len(shapes)} times in one forward pass. Use the native backend.")
    if shapes[0][0] != n:
        raise ValueError(
            f"The input of layer {name!r} does not have the batch dimension first. Use the native backend."
        )
    return shapes[0][1:-1].numel() if isinstance(layer, nn.Linear) else 1


def _rows(context: Any, owners: list[tuple[nn.Module, str]], n: int) -> Tensor | None:
    """Per-example gradients of one parameter over all modules that hold it; ASDL makes an example of every position."""
    total = None
    for module, attribute in owners:
        found = (context.batch_grads(module) or {}).get(attribute)
        if found is not None:
            rows = found if len(found) == n or len(found) % n else found.reshape(n, -1, *found.shape[1:]).sum(1)
            total = rows if total is None else total + rows
    return total


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Turn autograd's complaints, such as about parameters that enter linearly or not at all, into advice."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"ASDL cannot differentiate this model twice: {error} Use NativeHessian.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what ASDL's kind of hook warns about; results are checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-full backward hook.*")
        warnings.filterwarnings("ignore", message=".*operation is not supported for.*")
        yield


__all__ = ["AsdlEF", "AsdlGGN", "AsdlHessian", "AsdlInterface"]
