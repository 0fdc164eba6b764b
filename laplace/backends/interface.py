r"""The interface between Laplace approximations and whatever computes their curvature.

A backend adds one batch to raw sums (:meth:`CurvatureInterface.accumulate`). Users' own backends may instead implement
``full``, ``kron`` or ``diag`` for one batch; ``accumulate`` is then derived from these.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace.backends.captured_model import CapturedModel
from laplace.capture.contractions import require_jacobians
from laplace.capture.evaluation import eval_mode
from laplace.capture.fallback import jacobians, plain_jacobians
from laplace.capture.last_layer import apply_last_layer
from laplace.data.batches import length_of, part_of
from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.linalg.kronecker import Kron
from laplace.linalg.memory import ranges
from laplace.structures import lowrank
from laplace.structures.specification import SumsSpec
from laplace.structures.subnetwork import given_order
from laplace.structures.sums import CurvatureSums

# Rows that other code than ours may add up in float32 before the sums take the result. Added one after the other to one large
# row, each of 63 others may vanish if it is just below half a unit in the last place of the sum, 2^-25: 63 · 2^-25 = 1.9e-6.
_EXAMPLES = 64


class CurvatureInterface(CapturedModel):
    """Access to curvature of a model under a likelihood.

    Args:
        model: The network, or a :class:`FeatureExtractor` around it for last-layer curvature.
        likelihood: ``'classification'``, ``'regression'``, ``'reward_modeling'``, or an object of
            :mod:`laplace.likelihoods`; of reward models that of the pairs.
        last_layer: Consider the parameters of the last layer only.
        subnetwork_indices: Indices of the parameter vector to restrict dense curvature to.
        dict_key_x: Key of the inputs in dict-like batches.
        dict_key_y: Key of the targets in dict-like batches.
        low_rank: How many eigenpairs :meth:`eig_lowrank` finds at most.

    Attributes:
        lossfunc: Loss whose sum, times ``factor``, is the negative log likelihood.
        factor: 1 for classification; ½ for regression, since :class:`torch.nn.MSELoss` has no ½.
        likelihood_object: The likelihood itself, of which ``likelihood`` may be the name; setting either sets both.
        params: Parameters with ``requires_grad`` (of the last layer where ``last_layer``).

    Everywhere ``x`` are the inputs ``(batch, …)`` of a batch, or a dict-like batch, ``y`` its targets, ``offset`` the index in
    the data set of its first example, ``structure`` one of ``'full'``, ``'kron'``, ``'diag'``, ``'ekfac'``, ``'blockdiag'``;
    ``enable_backprop`` keeps the graph from the inputs. Losses are summed over the batch. What a backend does not have is a
    NotImplementedError; a batch that does not fit the model and the likelihood a ValueError.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import CurvatureInterface
        >>> class SquaredGradients(CurvatureInterface):
        ...     def diag(self, x, y, **kwargs):
        ...         rows, loss = self.gradients(x, y)
        ...         return loss, rows.square().sum(0)
        ...
        >>> la = Laplace(torch.nn.Linear(2, 3), "classification", "all", "diag", backend=SquaredGradients)
        >>> la.fit([(torch.randn(8, 2), torch.arange(8) % 3)])
        >>> la.H.shape
        torch.Size([9])
    """

    stochastic = False
    contracted: frozenset[str] = frozenset()  # structures without a method of their own that ``accumulate`` adds
    checks_targets_first = False  # whether what ``full``, ``kron`` and ``diag`` call does not
    weighs_examples = False  # whether ``accumulate`` takes weights of the examples
    exact_products = False  # whether dense sums are of products in float64, so that they have the rank of the rows

    def __init__(
        self,
        model: nn.Module,
        likelihood: BaseLikelihood | Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        low_rank: int = 10,
    ):
        """See the class."""
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self.low_rank = low_rank
        self._offset = 0  # index in the data set of the first example of the batch that is being added

    @classmethod
    def has_structure(cls, structure: str) -> bool:
        """Whether curvature of this structure can be added up: by a method of that name, or by ``accumulate`` itself."""
        base = CurvatureInterface
        if structure in ("ekfac", "blockdiag"):
            return structure in cls.contracted
        return (
            getattr(cls, structure, None) is not getattr(base, structure, None) or cls.accumulate is not base.accumulate
        )

    def is_closed_form(self, f: Tensor) -> bool:
        """Whether the curvature of a batch with outputs ``f`` takes no backward pass per output."""
        return False

    @property
    def estimator(self) -> str:
        """What is estimated, as a name; curvature of different ones is not added up."""
        return type(self).__name__

    def _require_torch_loss(self, package: str) -> None:
        """Refuse a likelihood that is none of torch's losses that a package knows."""
        if self.likelihood_object.torch_loss()[0] is None:
            raise ValueError(
                f"{package} knows the likelihoods 'classification' and 'regression' alone, not "
                f"{self.likelihood_object.identity}. Use the native backend."
            )

    def _initialize_kron(self, x: Tensor | MutableMapping[str, Any], package: str) -> None:
        """Initialise for Kronecker factors, and refuse parameters that the package behind this backend has none for."""
        if self.spec is None or self.spec.structure != "kron":
            self.initialize(x, "kron")
        own = self.named_params  # packages know nothing of weights that functions multiply
        missing = [b.parameter for b in self.spec.blocks if not b.has_factors or b.layer in own]
        if missing:
            raise ValueError(
                f"{package} has no Kronecker factors for {missing}. Use the native backend, which gives them a diagonal "
                "block, or set requires_grad=False on them."
            )

    def accumulate(self, sums: CurvatureSums, x: Any, y: Tensor, offset: int = 0) -> None:
        """Add one batch to raw sums in place, by way of this backend's ``full``, ``kron`` or ``diag``.

        These see at most :meth:`examples_at_once` of a batch: what they add up in float32 loses small contributions of a
        very large one.

        Args:
            sums: The state to add to.
            x: Inputs ``(batch, …)`` or a dict-like batch.
            y: Targets.
            offset: Index in the data set of the batch's first example.

        Raises:
            ValueError: If this batch is the first to show that examples depend on one another; names the module.
        """
        step = self.examples_at_once(sums.spec)
        whole = len(y) <= step
        self.check_batch(
            x, None if whole and not self.checks_targets_first else y, offset
        )  # before the first part is added
        if whole:
            self._accumulate_part(sums, x, y, offset)
            return
        for start, stop in ranges(len(y), 1, step):
            part = slice(start, stop)
            self._accumulate_part(sums, part_of(x, part), y[part], offset + start)

    def examples_at_once(self, spec: SumsSpec) -> int:
        """How many examples ``full``, ``kron`` or ``diag`` may add up in the precision of ``spec``."""
        return _EXAMPLES

    def _accumulate_part(self, sums: CurvatureSums, x: Any, y: Tensor, offset: int) -> None:
        n = len(y)
        structure = sums.spec.structure
        self._offset, self._is_asked = offset, True
        try:
            loss, curvature = self.kron(x, y, N=n) if structure == "kron" else getattr(self, structure)(x, y)
        finally:
            self._offset, self._is_asked = 0, False
        if structure == "kron":
            self._add_kron(sums, curvature, n)
        else:
            order = given_order(self.subnetwork_indices)
            if order is not None:
                curvature = curvature[order.argsort()]
                curvature = curvature[:, order.argsort()] if structure == "full" else curvature
            flat = curvature if structure == "full" else curvature.split([block.size for block in sums.spec.blocks])
            for factor, value in zip(sums.spec.factors, [flat] if structure == "full" else flat, strict=True):
                sums.add_whole_(factor, value.detach().view(sums.spec.factors[factor].shape))
        sums.loss = sums.loss + torch.as_tensor(loss, dtype=torch.float64, device=sums.loss.device).detach()
        sums.n_data += n

    def _add_kron(self, sums: CurvatureSums, kron: Kron, n: int) -> None:
        """Undo the division by the number of examples and add."""
        done: set[str] = set()
        for block, factors in zip(sums.spec.blocks, kron.kfacs, strict=True):
            if len(factors) != len(block.factors):
                raise ValueError(
                    f"Backend {type(self).__name__} returned {len(factors)} Kronecker factor(s) for {block.parameter!r}, "
                    f"expected {len(block.factors)} ({', '.join(block.factors)}). Use the native backend for this model."
                )
            for name, value in zip(block.factors, factors, strict=True):
                if name not in done:
                    scale = n if name.endswith("/A") else 1
                    sums.add_whole_(name, value.detach(), scale)
                    done.add(name)

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Dense Jacobians ``(batch, outputs, parameters)`` and outputs ``(batch, outputs)``."""
        return self.functorch_jacobians(x, enable_backprop)

    def functorch_jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Dense Jacobians by :mod:`torch.func`: reverse mode for each example; shapes as of :meth:`jacobians`."""
        self.check_batch(x)
        if self.last_layer:
            return self.last_layer_jacobians(x, enable_backprop)
        named, kept = self.named_params, self.kept_entries()
        sizes = [named[name].numel() if own is None else len(own) for name, own in kept.items()]
        require_jacobians(
            length_of(x), self._outputs_per_example(x), sum(sizes), self.sums_dtype, self.params[0].device
        )

        # the faster kernels of attention have no second derivative
        differentiable = sdpa_kernel(SDPBackend.MATH) if enable_backprop else nullcontext()
        with eval_mode(self.model), differentiable:
            js, f = jacobians(self.model, x, kept, enable_backprop)
        rows = [js[name].reshape(len(f), f[0].numel(), -1) for name in kept]
        rows = [r if own is None else r[..., list(own)] for r, own in zip(rows, kept.values(), strict=True)]
        flat = self._in_given_order(torch.cat(rows, -1).to(self.sums_dtype))
        return (flat, f) if enable_backprop else (flat.detach(), f.detach())

    def _in_given_order(self, rows: Tensor) -> Tensor:
        """Bring the last dimension from the order of the tensors to that of ``subnetwork_indices``."""
        order = given_order(self.subnetwork_indices)
        return rows if order is None else rows[..., order]

    def last_layer_jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Dense Jacobians with respect to the last layer, ``(batch, outputs, last-layer parameters)``."""
        if self.spec is None:
            self.initialize(x, "diag")
        layer = self.model.last_layer
        with eval_mode(self.model), torch.set_grad_enabled(enable_backprop):
            _, features = self.model.forward_with_features(x)
            f, inputs = apply_last_layer(layer, features)
        size = sum(p.numel() for p in self.params)
        require_jacobians(len(f), f[0].numel(), size, self.sums_dtype, f.device)
        others = [block.parameter for block in self.spec.blocks if block.layer is None]
        local = {other: other.removeprefix(f"{self.model.last_layer_name}.") for other in others}
        found = plain_jacobians(layer, features, local.values())[0] if others else {}
        identity = torch.eye(f.shape[-1], device=f.device, dtype=f.dtype)
        parts = []
        for name in self.named_params:
            if name in local:
                parts.append(found[local[name]].reshape(*f.shape, -1))
            elif name.endswith(".bias"):
                parts.append(identity.expand(*f.shape, -1))
            else:
                parts.append(torch.einsum("n...i,cd->n...cdi", inputs, identity).flatten(-2))
        js = torch.cat(parts, -1).flatten(1, -2).to(self.sums_dtype)
        return (js, f) if enable_backprop else (js.detach(), f.detach())

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Per-example gradients of the negative log likelihood ``(batch, parameters)``, and its sum."""
        js, f = self.jacobians(x)
        self.likelihood_object.check(f, y)
        gradient = self.likelihood_object.gradient(f.to(js.dtype), y)
        return torch.einsum("ncp,nc->np", js, gradient.flatten(1)), self.likelihood_object.loss(f, y)

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense curvature of one batch ``(parameters, parameters)``."""
        raise NotImplementedError(f"{type(self).__name__} has no dense curvature.")

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Kronecker factors of one batch, their input side divided by ``N``."""
        raise NotImplementedError(f"{type(self).__name__} has no Kronecker-factored curvature.")

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Diagonal curvature of one batch ``(parameters,)``."""
        raise NotImplementedError(f"{type(self).__name__} has no diagonal curvature.")

    def curvature_product(self, x: Any, y: Tensor, vectors: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss of one batch, and its curvature times ``vectors``, both of these ``(parameters, k)``."""
        raise NotImplementedError(f"{type(self).__name__} has no products of its curvature with vectors.")

    def eig_lowrank(self, data_loader: Iterable) -> tuple[Tensor, Tensor, Tensor]:
        """Leading eigenpairs of the curvature summed over a data set, in several passes over it.

        Args:
            data_loader: Batches, the same in every pass.

        Returns:
            Eigenvectors ``(parameters, k)`` with ``k`` at most ``low_rank``, positive eigenvalues ``(k,)`` in falling order,
            and the summed loss.

        Raises:
            ValueError: See :func:`laplace.structures.lowrank.eigenpairs`.
        """
        return lowrank.eigenpairs(self, data_loader, self.low_rank)
