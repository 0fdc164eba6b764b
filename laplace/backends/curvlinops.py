"""Curvature by way of the curvlinops package (https://curvlinops.readthedocs.io)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.backends.forward_mode import DoubleOutputs, by_one_name, in_forward_mode
from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.backends.hessian import HessianInterface
from laplace.backends.interface import CurvatureInterface
from laplace.backends.optional import import_optional
from laplace.backends.options import honours
from laplace.capture.evaluation import eval_mode
from laplace.linalg.kronecker import Kron
from laplace.linalg.precision import coarsest
from laplace.noise import fixed_directions, fresh_seed
from laplace.structures import lowrank
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums

curvlinops = import_optional("curvlinops", "curvlinops-for-pytorch", "curvlinops")


class CurvlinopsInterface(CurvatureInterface):
    """Kronecker factors and dense matrices from curvlinops' linear operators; the diagonal from dense Jacobians."""

    _kfac_type: str
    kfac_approx = "expand"
    checks_targets_first = True

    def initialize(self, x: Any, structure: str) -> SumsSpec:
        """Decide from one batch which parameter's curvature comes from where.

        Raises:
            ValueError: If curvlinops does not know the likelihood.
        """
        self._require_torch_loss("curvlinops")
        return super().initialize(x, structure)

    def accumulate(self, sums: CurvatureSums, x: Any, y: Tensor, offset: int = 0) -> None:
        """Add one batch to raw sums in place; see :meth:`CurvatureInterface.accumulate`.

        Raises:
            NonFiniteError: If an output or target is NaN or Inf; names the examples. The sums are unchanged.
            ValueError: If the targets do not fit the outputs, or a layer has no Kronecker factors here.
        """
        self.spec = sums.spec
        super().accumulate(sums, x, y, offset)

    @honours("mc_samples", "kfac_approx")
    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Kronecker factors of one batch, their input side divided by ``N``; options ``kfac_approx`` and ``mc_samples``.

        Raises:
            ValueError: If a parameter belongs to no Linear or Conv2d layer, or curvlinops does not take a layer's use.
        """
        self._initialize_kron(x, "curvlinops")
        with self._counted_calls() as calls:
            f, model, inputs = self._outputs(x)
        self._check_layers(calls)
        with eval_mode(self.model):
            operator = curvlinops.KFACLinearOperator(
                model,
                self.lossfunc,
                self.params,
                [(inputs, self._targets(y))],
                check_deterministic=False,
                fisher_type=self._kfac_type,
                kfac_approx=self.kfac_approx,
                mc_samples=getattr(self, "num_samples", 1),
                seed=self._operator_seed(),
                separate_weight_and_bias=True,
                num_data=len(y),
                batch_size_fn=lambda _: len(y),
            )
            try:
                operator.compute_kronecker_factors()
            except (ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"curvlinops has no Kronecker factors of this model: {error} Use the native backend."
                ) from error
        factors = operator.state_dict()
        gradients, inputs = factors["gradient_covariances"], factors["input_covariances"]
        kfacs = []
        for block in self.spec.blocks:
            key = "" if self.last_layer else block.layer
            if key not in gradients:
                raise ValueError(
                    f"curvlinops has not seen the gradient of layer {block.layer!r}: its output is changed in place, or is "
                    "used without a gradient. Use the native backend."
                )
            block_factors = [gradients[key] * self._scale]
            if len(block.factors) == 2:
                block_factors.append(inputs[key] * (len(y) / N))
            kfacs.append(block_factors)
        return self.likelihood_object.loss(f, y), Kron(kfacs)

    @honours("mc_samples")
    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense curvature of one batch by applying the operator to the identity.

        Raises:
            ValueError: If something in the model has no derivative in forward mode.
        """
        f, model, inputs = self._outputs(x)
        with eval_mode(self.model), in_forward_mode():
            operator = self._dense_operator(DoubleOutputs(by_one_name(model)), inputs, self._loss_targets(y))
            size = sum(p.numel() for p in self.params)
            dense = operator @ torch.eye(size, dtype=self.params[0].dtype, device=self.params[0].device)
        if self.subnetwork_indices is not None:
            dense = dense[self.subnetwork_indices][:, self.subnetwork_indices]
        return self.likelihood_object.loss(f, y), dense * self._scale

    def _targets(self, y: Tensor) -> Tensor:
        """Targets of the type that torch's losses insist on."""
        return y if y.is_floating_point() else y.long()

    def _loss_targets(self, y: Tensor) -> Tensor:
        """The same, beside outputs in float64."""
        return y.double() if y.is_floating_point() else y.long()

    @property
    def _scale(self) -> float:
        """From the curvature of the summed loss to that of the negative log likelihood."""
        return self.factor

    def _operator_seed(self) -> int:
        seed = getattr(self, "seed", None)
        if seed is None:
            return fresh_seed(31)
        return (seed * 1_000_003 + self._offset) % (1 << 31)

    @contextmanager
    def _counted_calls(self) -> Iterator[Counter[str]]:
        """Count inside the block how often every covered layer runs."""
        calls: Counter[str] = Counter()
        names = [] if self.last_layer else dict.fromkeys(block.layer for block in self.spec.blocks)
        handles = [
            self.model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
            for name in names
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _check_layers(self, calls: Counter[str]) -> None:
        """Refuse what curvlinops would compute without complaint, but not as the factors that are meant here."""
        for name, count in calls.items():
            layer = self.model.get_submodule(name)
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                raise ValueError(
                    f"curvlinops has no Kronecker factors for {name!r} ({type(layer).__name__}). Use the native backend."
                )
            padding_mode = getattr(layer, "padding_mode", "zeros")
            if padding_mode != "zeros":
                raise ValueError(
                    f"curvlinops takes the padding of layer {name!r} for zeros, but it is {padding_mode!r}. "
                    "Use the native backend."
                )
            if count > 1:
                raise ValueError(
                    f"Layer {name!r} runs {count} times in one forward pass; curvlinops scales its input factor by "
                    "that number. Use the native backend."
                )

    def _outputs(self, x: Any) -> tuple[Tensor, nn.Module, Any]:
        """Outputs, and the module and inputs to differentiate: features and the last layer where that is all."""
        self._require_torch_loss("curvlinops")
        with torch.no_grad(), eval_mode(self.model):
            if self.last_layer:
                f, features = self.model.forward_with_features(x)
                model, x = self.model.last_layer, features
            else:
                f, model = self.model(x), self.model
        if f.ndim != 2:
            raise ValueError(
                f"curvlinops takes outputs (batch, outputs) here, not {tuple(f.shape)}. Use the native backend, which "
                "takes positions between the two."
            )
        return f, model, x


class CurvlinopsGGN(CurvlinopsInterface, GGNInterface):
    """Exact GGN, or its Monte-Carlo Fisher estimate, by curvlinops.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import CurvlinopsGGN
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "kron", backend=CurvlinopsGGN)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    @property
    def _kfac_type(self) -> str:
        return curvlinops.FisherType.MC if self.stochastic else curvlinops.FisherType.TYPE2

    def _dense_operator(self, model: nn.Module, x: Any, y: Tensor):
        arguments = (model, self.lossfunc, self.params, [(x, y)])
        options = {"check_deterministic": False, "num_data": len(y), "batch_size_fn": lambda _: len(y)}
        if self.stochastic:
            return curvlinops.FisherMCLinearOperator(
                *arguments, seed=self._operator_seed(), mc_samples=self.num_samples, **options
            )
        return curvlinops.GGNLinearOperator(*arguments, **options)


class CurvlinopsEF(CurvlinopsInterface, EFInterface):
    """Empirical Fisher by curvlinops.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import CurvlinopsEF
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "kron", backend=CurvlinopsEF)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    _kfac_type = curvlinops.FisherType.EMPIRICAL

    @property
    def _scale(self) -> float:
        """A gradient appears twice in every outer product."""
        return self.factor**2

    def _dense_operator(self, model: nn.Module, x: Any, y: Tensor):
        return curvlinops.EFLinearOperator(
            model,
            self.lossfunc,
            self.params,
            [(x, y)],
            check_deterministic=False,
            num_data=len(y),
            batch_size_fn=lambda _: len(y),
        )


class CurvlinopsHessian(HessianInterface, CurvlinopsInterface):
    """Dense Hessian, and its eigenpairs from Hessian-vector products, by curvlinops.

    curvlinops differentiates gradients in forward mode, for which some layers of torch have wrong formulas (LayerNorm in
    torch 2.14). So one more product is compared with that of reverse mode.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import CurvlinopsHessian
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Linear(2, 3), "classification", "all", "lowrank", backend=CurvlinopsHessian)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def curvature_product(self, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss of one batch, and its Hessian times ``vectors`` ``(parameters, k)``.

        Raises:
            ValueError: If forward and reverse mode disagree about this model.
        """
        f, model, inputs = self._outputs(x)
        self.likelihood_object.check(f, y, offset)
        with eval_mode(self.model), in_forward_mode():
            operator = curvlinops.HessianLinearOperator(
                by_one_name(model),
                self.lossfunc,
                self.params,
                [(inputs, self._targets(y))],
                check_deterministic=False,
                num_data=len(y),
                batch_size_fn=lambda _: len(y),
            )
            probe = fixed_directions(vectors[:, :1])
            product = operator @ torch.cat([vectors, probe], 1).to(self.params[0].dtype)
        product = product.to(vectors.dtype) * self._scale
        truth = lowrank.hessian_product(self, x, y, probe, offset)[1]
        relative = min(1e3 * coarsest(self.params[0]), 0.05)
        if not float((product[:, -1:] - truth).norm()) <= relative * float(truth.norm()):
            raise ValueError(
                "curvlinops' Hessian of this model, by forward-mode differentiation, is not that of reverse mode; in torch "
                "2.14 LayerNorm is such a layer. Use NativeHessian."
            )
        return self.likelihood_object.loss(f, y), product[:, :-1]
