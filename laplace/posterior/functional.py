r"""Gaussian-process posterior of the linearised network: the same predictive from inner products of Jacobians.

What it computes is in :mod:`laplace.posterior.process`; here it is conditioned on data, asked for predictions, and stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.capture import contractions
from laplace.capture.contractions import output_directions
from laplace.capture.evaluation import eval_mode
from laplace.capture.forward import run
from laplace.data.subset import subset_of
from laplace.enums import PredType
from laplace.linalg import memory
from laplace.linalg.dense import parameter_vector
from laplace.linalg.eigen import eigh
from laplace.linalg.inference import outside_inference_mode
from laplace.posterior.arguments import before, by_name
from laplace.posterior.base import BaseLaplace
from laplace.posterior.process import ConditionedProcess
from laplace.structures import gp
from laplace.structures.specification import SumsSpec

OWN_ARGUMENTS = ("independent_outputs", "seed")


class FunctionalLaplace(ConditionedProcess):
    r"""Laplace approximation in function space, over all weights: a Gaussian process conditioned on some of the data.

    Its cost grows with the number of examples it is conditioned on and with the outputs, not with the square of the number of
    parameters. The examples are a random subset; their curvature counts :math:`N/M` times, an unbiased estimate of that of
    all of the data. The log likelihood in the evidence is that of all of the data.

    Args:
        n_subset: Number of examples to condition on; None for all.
        independent_outputs: One process per output instead of a joint one; ignores what outputs tell about each other, and
            needs one ``M x M`` matrix per output instead of one of all.
        seed: Seed of the choice of the subset.
        **kwargs: Further arguments of :class:`laplace.BaseLaplace`; the likelihood is ``'classification'`` or
            ``'regression'``, and the prior precision a scalar.

    Attributes:
        n_data: Number of examples in the data set.
        spectrum: Eigenvalues of the training kernel ``(processes, size)`` in float64; None before ``fit``.

    Raises:
        ValueError: If ``n_subset`` is not positive.

    Example:
        >>> import torch
        >>> from laplace import FunctionalLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = FunctionalLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    pred_types = (PredType.GP,)
    why_not = (
        "a functional (GP) posterior: it is conditioned on examples, has no curvature that adds up and no distribution over "
        "weights. Fit once over all of the data, or use hessian_structure='kron', 'diag' or 'full'."
    )

    order = (*before(BaseLaplace.order, "sigma_noise", "n_subset")[:-1], *OWN_ARGUMENTS)

    @by_name
    def __init__(
        self,
        *,
        n_subset: int | None = None,
        independent_outputs: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ):
        """See the class."""
        if n_subset is not None and n_subset < 1:
            raise ValueError(f"n_subset={n_subset} must be at least 1, or None for all of the data.")
        self.n_subset = n_subset
        self.independent_outputs = independent_outputs
        self.seed = seed
        self._rows = {}
        self._subset = []
        super().__init__(**kwargs)

    # --- fitting -------------------------------------------------------------------------------------------------

    def initialize(self, x: Any) -> SumsSpec:
        """Decide from one batch of inputs how every parameter's Jacobian is obtained.

        Raises:
            ValueError: If the backend has no roots of the output Hessian.
        """
        if not isinstance(self.backend, (GGNInterface, EFInterface)):
            raise ValueError(
                f"A functional (GP) posterior needs a GGN or EF backend, not {type(self.backend).__name__}; the true Hessian "
                "is no Gaussian process."
            )
        self._check_parameters(x)
        spec = self.backend.initialize(x, "diag")
        blocks = tuple(replace(block, factors=()) for block in spec.blocks)
        self._spec = replace(spec, structure=self.structure, blocks=blocks, factors={})
        self.n_outputs = spec.n_outputs
        return self._spec

    @outside_inference_mode()
    def fit(self, train_loader: Iterable, override: bool = True, progress_bar: bool = False) -> None:
        """Condition the process on a subset of a data loader, in two passes over it.

        Args:
            train_loader: Batches ``(x, y)``, or dict-like batches that hold ``dict_key_y``.
            override: Has to be True.
            progress_bar: Show progress over batches.

        Raises:
            NonFiniteError: On NaN or Inf; names the examples. An earlier fit stays as it was.
            ValueError: If ``override`` is False, on an empty loader, one shorter than ``n_subset``, or targets that do not fit.
        """
        if not override:
            self._refuse("fit(override=False)")
        if isinstance(train_loader, Iterator):
            raise ValueError("A GP fit passes over the data twice; give a DataLoader or list, not an iterator.")
        with self._or_as_before():
            loss, n_data = self._loss_of(train_loader, progress_bar)
            size = n_data if self.n_subset is None else self.n_subset
            if size > n_data:
                raise ValueError(f"n_subset={size} is more than the {n_data} examples of the data.")
            subset = subset_of(train_loader, n_data, size, self.seed, self.dict_key_y)
            self._condition(list(self._batches(subset)), loss, n_data)

    def _loss_of(self, loader: Iterable, progress_bar: bool) -> tuple[Tensor, int]:
        """Summed loss at the MAP and number of examples; initialises with the first batch."""
        loss, n = torch.zeros((), dtype=torch.float64, device=self._device), 0
        for x, y in self._batches(loader, progress_bar):
            if n == 0:
                self.initialize(x)
            with torch.no_grad(), eval_mode(self.model):
                f = run(self.model, x, "this batch")
            self.backend.likelihood_object.check(f, y, n)
            loss, n = loss + self.backend.likelihood_object.loss(f, y), n + len(y)
        if n == 0:
            raise ValueError("The data loader is empty, so there is nothing to fit. An earlier fit stays as it was.")
        return loss, n

    def _condition(self, subset: list[tuple[Any, Tensor]], loss: Tensor, n_data: int) -> None:
        """Set everything that depends on the data."""
        parts, start = [], 0
        size = sum(len(y) for _, y in subset)
        for x, y in subset:
            for first, inputs, targets in self._parts(x, y):
                capture = self.backend.capture(inputs)
                directions = self._roots(capture.f, targets, start + first)
                self._require_rows(capture, size, len(directions))
                parts.append(gp.rows_of(capture, self._spec.blocks, directions))
            start += len(y)
        rows = gp.concatenate(parts)
        gram = self._gram(rows, rows)
        values, vectors = (
            torch.stack(parts) for parts in zip(*(eigh(g, "training kernel") for g in gram), strict=True)
        )
        self.spectrum, self._vectors = values.clamp(min=0), vectors
        self._rows, self._subset = rows, subset
        self.loss, self.n_data = loss, n_data
        self._remember_weights()

    def _roots(self, f: Tensor, y: Tensor, offset: int) -> list[Tensor]:
        """Directions whose rows span the curvature; of independent outputs, one per output."""
        directions = list(self.backend.directions(f.to(self._spec.torch_dtype), y, offset))
        if not self.independent_outputs:
            return directions
        root = sum(v.square() for v in directions).sqrt().flatten(1)  # of the diagonal
        return [(root * unit).reshape(f.shape) for unit in output_directions(root)]

    def _require_rows(self, capture: Any, n: int, directions: int) -> None:
        """Stop before rows that have no factors, kept for all examples, exceed the free memory."""
        explicit = [block for block in self._spec.blocks if not contractions.is_outer_weight(block, capture)]
        memory.require(
            memory.tensor_bytes(n, directions, sum(block.size for block in explicit), dtype=self._spec.torch_dtype),
            self._device,
            f"The rows of {n} examples along {directions} directions for parameters without factors",
            "Lower n_subset, or set requires_grad=False on embeddings and other parameters that la.coverage gives no factors.",
        )

    # --- predictive and tuning -----------------------------------------------------------------------------------

    def __call__(self, x: Any, pred_type: PredType | str = PredType.GP, *args: Any, **kwargs: Any) -> Any:
        """Posterior predictive; see :func:`laplace.predictive.predict`. ``pred_type`` is ``'gp'``."""
        return super().__call__(x, pred_type, *args, **kwargs)

    def predictive_samples(self, x: Any, pred_type: PredType | str = PredType.GP, *args: Any, **kwargs: Any) -> Tensor:
        """Draws; see :func:`laplace.predictive.samples`. ``pred_type`` is ``'gp'``, and ``'glm'`` means it."""
        return super().predictive_samples(x, _as_gp(pred_type), *args, **kwargs)

    def functional_samples(self, x: Any, pred_type: PredType | str = PredType.GP, *args: Any, **kwargs: Any) -> Tensor:
        """Draws; see :func:`laplace.predictive.function_samples`. ``pred_type`` is ``'gp'``, and ``'glm'`` means it."""
        return super().functional_samples(x, _as_gp(pred_type), *args, **kwargs)

    def optimize_prior_precision(self, pred_type: PredType | str = PredType.GP, *args: Any, **kwargs: Any) -> None:
        """Choose the scalar prior precision after the fit; see :func:`laplace.tuning.optimize_prior_precision`."""
        super().optimize_prior_precision(pred_type, *args, **kwargs)

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        subset = [(dict(x) if isinstance(x, Mapping) else x, y) for x, y in self._subset]
        return {
            "spec": self._spec.to_json(),
            "loss": self.loss,
            "subset": subset,
            "independent": self.independent_outputs,
            "estimator": self.backend.estimator,
        }

    def _read_state(self, state: dict[str, Any]) -> dict[str, Any]:
        if state["independent"] != self.independent_outputs:
            raise ValueError(f"The state has independent_outputs={state['independent']}, but this posterior has not.")
        estimator = state.get("estimator", self.backend.estimator)
        if estimator != self.backend.estimator:
            raise ValueError(
                f"The state was fitted with the estimator {estimator!r}, but this posterior's backend is "
                f"{type(self.backend).__name__} ({self.backend.estimator!r}), and a GP is conditioned again when it is loaded."
            )
        return state

    def _take_state(self, state: dict[str, Any]) -> None:
        self._spec = self.backend.spec = SumsSpec.from_json(state["spec"])
        self.n_outputs = self._spec.n_outputs
        to = partial(_moved, device=self._device, dtypes=(state["mean"].dtype, parameter_vector(self.params).dtype))
        subset = [
            ({k: to(v) for k, v in x.items()} if isinstance(x, Mapping) else to(x), to(y)) for x, y in state["subset"]
        ]
        self._condition(subset, state["loss"].to(self._device), state["n_data"])


def _moved(value: Any, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> Any:
    """A tensor on another device; one of the type that the fitted model had is now of the type that the model has."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtypes[1] if value.dtype == dtypes[0] else value.dtype)


def _as_gp(pred_type: PredType | str) -> PredType | str:
    """Of a functional posterior, draws of the linearised network are draws of the process."""
    return PredType.GP if pred_type == PredType.GLM else pred_type
