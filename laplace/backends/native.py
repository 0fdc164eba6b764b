"""The project's own backend: capture once, contract many."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.backends.options import check_chosen_outputs, check_kfac_approx, honours
from laplace.capture import contractions
from laplace.capture.evaluation import eval_mode
from laplace.data.batches import joined, length_of
from laplace.data.example_weights import weighted
from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.linalg.kronecker import Kron
from laplace.structures import last_layer
from laplace.structures.diag import diag_vector
from laplace.structures.registry import add_curvature_
from laplace.structures.sums import CurvatureSums

_PASSES = 64  # backward passes for one batch that need no word


class _Native:
    """Contractions in place of dense Jacobians; the estimator's directions come from the sibling class."""

    exact_products = True
    contracted = frozenset({"ekfac", "blockdiag"})
    weighs_examples = True
    _has_warned = False

    kfac_approx = "expand"
    outputs: tuple[int, ...] | None = None

    @property
    def estimator(self) -> str:
        """As of the sibling class, and the approximation of weight sharing where it is not the default."""
        return super().estimator + ("" if self.kfac_approx == "expand" else " with KFAC-reduce")

    def accumulate(
        self, sums: CurvatureSums, x: Any, y: Tensor, offset: int = 0, example_weights: Tensor | None = None
    ) -> None:
        """Add one batch to raw sums in place.

        Args:
            sums: The state to add to.
            x: Inputs ``(batch, …)`` or a dict-like batch.
            y: Targets: class labels ``(batch, …)`` or values ``(batch, outputs)``.
            offset: Index in the data set of the batch's first example; names examples in errors and seeds their noise.
            example_weights: ``(batch,)`` float64, see :func:`laplace.data.example_weights.checked`; 1 each if not given.

        Raises:
            NonFiniteError: If an output or target is NaN or Inf; names the examples. The sums are unchanged.
            ValueError: If the targets do not fit the outputs. The sums are unchanged.
        """
        self.spec = sums.spec
        with eval_mode(self.model):
            self._accumulate(sums, x, y, offset, example_weights)

    def _accumulate(self, sums: CurvatureSums, x: Any, y: Tensor, offset: int, weights: Tensor | None) -> None:
        capture = self.capture(x)
        y = y.to(capture.f.device)
        self.likelihood_object.check(capture.f, y, offset)
        self._warn_of_passes(capture.f)
        f = capture.f.double()  # in float32, 1 - p of a sure example has no digits
        closed = self.last_layer and last_layer.applies(sums.spec, f)
        if closed and sums.spec.structure == "full":
            last_layer.add_full_(sums, capture, weighted(self.directions(f, y, offset), weights))
        elif closed and self.sums_all_outputs and sums.spec.structure in ("kron", "diag"):
            last_layer.add_(sums, capture, self.likelihood_object, f, y, weights)
        else:
            directions = weighted(self.directions(f, y, offset), weights)
            add_curvature_(sums, capture, directions, self.kfac_approx == "reduce", weights)
        if weights is None:
            sums.loss = sums.loss + self.likelihood_object.loss(f, y)
            sums.n_data += len(y)
        else:
            sums.loss = sums.loss + self.likelihood_object.weighted_loss(f, y, weights)
            sums.n_data += float(weights.sum())

    @property
    def sums_all_outputs(self) -> bool:
        """Whether the estimator is the exact GGN of every output."""
        return isinstance(self, GGNInterface) and not self.stochastic and self.outputs is None

    def is_closed_form(self, f: Tensor) -> bool:
        """Whether curvature needs no backward pass along directions: the exact one of a plain last layer, of one position."""
        assert self.spec is not None, "initialize() comes first"
        closed = self.spec.structure in ("full", "kron", "diag")
        return closed and self.last_layer and self.sums_all_outputs and last_layer.applies(self.spec, f)

    def _warn_of_passes(self, f: Tensor) -> None:
        """Say once that exact curvature of many outputs takes many backward passes."""
        outputs = f[0].numel()
        if self.sums_all_outputs and not self.last_layer and outputs > _PASSES and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"The exact GGN of {outputs} outputs per example takes about as many backward passes for every batch. "
                "backend_kwargs={'stochastic': True, 'num_samples': 1} samples it in one pass per draw.",
                stacklevel=2,
            )

    def _sums(self, structure: str, x: Any, y: Tensor) -> CurvatureSums:
        if self.spec is None or self.spec.structure != structure:
            self.initialize(x, structure)
        sums = CurvatureSums.zero(self.spec, self.params[0].device)
        self.accumulate(sums, x, y)
        return sums

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Dense Jacobians ``(batch, outputs, parameters)`` and outputs."""
        if enable_backprop:
            return self.functorch_jacobians(x, enable_backprop)
        if self.spec is None:
            self.initialize(x, "diag")
        blocks = self.spec.blocks
        size, dtype = sum(block.size for block in blocks), self.spec.torch_dtype
        contractions.require_jacobians(length_of(x), self._outputs_per_example(x), size, dtype, self.params[0].device)
        found = []
        for _, inputs in self.parts(x, every_output=True):
            capture = self.capture(inputs)
            found.append((torch.cat(list(contractions.jacobian_chunks(capture, blocks))), capture.f))
        js, f = joined(found)
        return self._in_given_order(js), f

    @honours("mc_samples")
    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense curvature of one batch ``(parameters, parameters)``."""
        sums = self._sums("full", x, y)
        half = self._in_given_order(sums.tensors["full"].to(sums.spec.torch_dtype))
        return sums.loss, self._in_given_order(half.mT)

    @honours("mc_samples", "kfac_approx")
    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Kronecker factors of one batch, their input side divided by ``N``; options ``kfac_approx`` and ``mc_samples``."""
        sums = self._sums("kron", x, y)
        return sums.loss, Kron.from_sums(sums, N)

    @honours("mc_samples")
    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Diagonal curvature of one batch ``(parameters,)``."""
        sums = self._sums("diag", x, y)
        return sums.loss, self._in_given_order(diag_vector(sums))


class NativeGGN(_Native, GGNInterface):
    r"""Exact GGN, or with ``stochastic=True`` its Monte-Carlo Fisher estimate.

    Args:
        model: As for :class:`laplace.curvature.GGNInterface`, like all further arguments but the last.
        likelihood: See there.
        last_layer: See there.
        subnetwork_indices: See there.
        dict_key_x: See there.
        dict_key_y: See there.
        stochastic: See there.
        num_samples: See there.
        seed: See there.
        low_rank: See there.
        kfac_approx: ``'expand'`` or ``'reduce'``: how Kronecker factors treat weights that are shared over positions.
        outputs: Some of the outputs, by index: the exact GGN of these, the others being held constant,
            :math:`J_S^\top \Lambda_{SS} J_S`, in as many backward passes; all of them if not given.

    Raises:
        ValueError: If ``outputs`` is empty, names one twice or a negative one, or is given with ``stochastic``.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import NativeGGN
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "kron", backend=NativeGGN)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: BaseLikelihood | Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        seed: int | None = None,
        low_rank: int = 10,
        *,
        kfac_approx: str = "expand",
        outputs: Sequence[int] | None = None,
    ):
        """See the class."""
        keys = (dict_key_x, dict_key_y)
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, *keys, stochastic, num_samples, seed, low_rank
        )
        self.kfac_approx = check_kfac_approx(kfac_approx)
        self.outputs = None if outputs is None else check_chosen_outputs(outputs, stochastic)

    @property
    def estimator(self) -> str:
        """As of the other backends, and the outputs where they are chosen."""
        return super().estimator + ("" if self.outputs is None else f" of outputs {', '.join(map(str, self.outputs))}")

    def directions(self, f: Tensor, y: Tensor, offset: int = 0) -> Iterator[Tensor]:
        """See :class:`laplace.curvature.GGNInterface`.

        Raises:
            ValueError: If the model lacks one of the outputs that were chosen.
        """
        if self.outputs is None:
            return super().directions(f, y, offset)
        if max(self.outputs) >= f.shape[-1]:
            last = f.shape[-1] - 1
            raise ValueError(
                f"outputs={list(self.outputs)}: the model has {last + 1} outputs, so they lie in 0…{last}."
            )
        return self.likelihood_object.hessian_root(f, y, self.outputs)


class NativeEF(_Native, EFInterface):
    """Empirical Fisher; arguments as of :class:`NativeGGN`, ``kfac_approx`` among them, but for those of sampling.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.curvature import NativeEF
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Sequential(torch.nn.Linear(2, 3)), "classification", "all", "kron", backend=NativeEF)
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: BaseLikelihood | Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        low_rank: int = 10,
        *,
        kfac_approx: str = "expand",
    ):
        """See the class."""
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, low_rank)
        self.kfac_approx = check_kfac_approx(kfac_approx)
