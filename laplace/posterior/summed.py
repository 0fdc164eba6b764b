r"""Fits of posteriors over weights: what is added up over batches, how it becomes a posterior, and which weights it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from laplace.capture.input_types import check_type
from laplace.data.batches import batches
from laplace.data.example_weights import checked
from laplace.data.mistakes import check_inputs
from laplace.errors import NotFittedError
from laplace.likelihoods.base import BaseLikelihood
from laplace.linalg.dense import parameter_vector
from laplace.linalg.heap import keeping_freed
from laplace.linalg.inference import outside_inference_mode
from laplace.posterior import weights
from laplace.posterior.arguments import by_name
from laplace.posterior.base import BaseLaplace
from laplace.structures.registry import SECOND_PASSES, CoverageReport, coverage_report
from laplace.structures.specification import Rows, SumsSpec
from laplace.structures.sums import CurvatureSums, check_same_estimator


class SummedLaplace(BaseLaplace):
    """Base of what is fitted by adding up curvature; the attributes are those of :class:`ParametricLaplace`."""

    structure: str

    @by_name
    def __init__(self, **kwargs: Any):
        """See :class:`BaseLaplace`."""
        self.sums: CurvatureSums | None = None
        self._spec: SumsSpec | None = None
        self._fingerprint: weights.Fingerprint | None = None
        self.input_ndim: int | None = None
        super().__init__(**kwargs)

    def _check_likelihood(self, value: BaseLikelihood) -> None:
        if value.structures is not None and self.structure not in value.structures:
            valid = " and ".join(map(repr, value.structures))
            raise ValueError(
                f"likelihood={value.identity!r} has no {self.structure!r} posterior; valid "
                f"hessian_structures are {valid}."
            )
        if self._fingerprint is not None and value.identity != self.likelihood_object.identity:
            raise ValueError(
                f"This posterior was fitted under likelihood={self.likelihood_object.identity!r}; its loss and curvature are "
                f"not those of {value.identity!r}. Make a new posterior and fit it (rewards: likelihood='reward_modeling' "
                "from the start)."
            )

    def _check_fitted(self) -> None:
        if self.sums is None:
            raise NotFittedError(f"{type(self).__name__} has not been fitted: call fit(train_loader) first.")

    def initialize(self, x: Tensor | MutableMapping[str, Any]) -> SumsSpec:
        """Decide from one batch of inputs how every parameter's curvature is obtained.

        ``fit`` does this with its first batch; call it directly only to use :meth:`accumulate`.

        Args:
            x: Inputs ``(batch, …)`` or a dict-like batch.

        Raises:
            ValueError: If the model is not one that curvature can be had of; names the module.
        """
        self._check_parameters(x)
        self._spec = self.backend.initialize(x, self._summed)
        self.n_outputs = self._spec.n_outputs
        return self._spec

    def _check_parameters(self, x: Any) -> None:
        """Refuse a model whose ``requires_grad`` flags have changed; remember what a batch of inputs looks like."""
        if self._device.type == "mps":
            raise ValueError(
                "The model is on 'mps', which has no float64, in which curvature is added up. Fit and predict on the CPU: "
                "model.cpu() before the posterior is made."
            )
        known, now = {id(p) for p in self.params}, self.backend.named_params
        names = {id(p): name for name, p in self.model.named_parameters()}
        changed = [name for name, p in now.items() if id(p) not in known]
        changed += [names.get(i, "one that was replaced") for i in known - {id(p) for p in now.values()}]
        if changed:
            raise ValueError(
                f"requires_grad of {sorted(changed)} has changed since this {type(self).__name__} was made. Set it first, then "
                "make the posterior."
            )
        self.input_ndim = x.ndim if isinstance(x, Tensor) else None

    def _check_inputs(self, x: Any) -> None:
        """Refuse inputs of a prediction that are no batch, or not like those of the fit."""
        law = self.likelihood_object
        same = law.fitted is law  # rewards are fitted on pairs, and predicted for single items
        check_inputs(x, "this prediction", self.input_ndim if same else None)
        check_type(self.model, x, "this prediction")

    def sums_spec(self) -> SumsSpec:
        """Names, shapes and precision of the raw sums.

        Raises:
            NotFittedError: Before :meth:`initialize` or ``fit``.
        """
        if self._spec is None:
            raise NotFittedError("The sums are not known yet: call initialize(x) or fit(train_loader) first.")
        return self._spec

    @property
    def coverage(self) -> CoverageReport:
        """For every parameter, the structure its curvature has and where it comes from."""
        return coverage_report(self.sums_spec())

    @property
    def _summed(self) -> str:
        """The structure of the sums, where that is not the posterior's own."""
        return self.structure

    def zero_sums(self, rows: Rows | None = None) -> CurvatureSums:
        """Raw sums over no example; with ``rows`` the part that holds these, see :mod:`laplace.structures.specification`."""
        sums = CurvatureSums.zero(self.sums_spec(), self._device, rows)
        sums.estimator = self.backend.estimator
        return sums

    def second_sums(self, basis: Mapping[str, Tensor], rows: Rows | None = None) -> CurvatureSums:
        """Raw sums over no example of the second pass over the data, in a basis that the first one's sums gave.

        Args:
            basis: Arrays by name, see :class:`laplace.structures.second_pass.SecondPass`.
            rows: What they hold; everything if not given.
        """
        sums = CurvatureSums.zero(SECOND_PASSES[self.structure].spec(self.sums_spec()), self._device, rows)
        sums.estimator = self.backend.estimator
        sums.basis = {name: value.to(self._device) for name, value in basis.items()}
        return sums

    def set_second_sums(self, sums: CurvatureSums, basis: Mapping[str, Tensor]) -> None:
        """Finalise the raw sums of the second pass, as :meth:`set_sums` does those of a structure that takes one.

        Args:
            sums: From :meth:`second_sums`, with the data added.
            basis: That in which they were added.
        """
        self.set_sums(SECOND_PASSES[self.structure].finish(sums, basis))

    @outside_inference_mode()
    def accumulate(
        self,
        sums: CurvatureSums,
        x: Any,
        y: Tensor,
        offset: int = 0,
        example_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Add one batch to raw sums in place.

        Args:
            sums: The state to add to.
            x: Inputs ``(batch, …)`` or a dict-like batch.
            y: Targets.
            offset: Index of the batch's first example in the data set.
            example_weights: One number for each example, not negative: an example of weight 2 adds what it would add twice, in
                curvature, loss and number of examples. 1 each if not given. Draws of a sampled Fisher do not depend on them.

        Raises:
            ValueError: If a regression's outputs are more or fewer per example than those of the first batch, which the
                evidence counts on; if weights are no weights, or the backend takes none; or as the backend's ``accumulate``.
        """
        self.backend.spec = sums.spec
        y = y.to(self._device)
        self.likelihood_object.check_length(y, sums.spec.n_outputs)
        if example_weights is None:
            for start, inputs, targets in self._parts(x, y):
                self.backend.accumulate(sums, inputs, targets, offset + start)
            return
        if not self.backend.weighs_examples:
            raise ValueError(
                f"{type(self.backend).__name__} takes no weights of examples: its package sums over a batch by itself. Use the "
                "native backend (NativeGGN or NativeEF), or leave example_weights out."
            )
        of_all = checked(example_weights, len(y), self._device, offset)
        for start, inputs, targets in self._parts(x, y):
            weights = of_all[start : start + len(targets)]
            self.backend.accumulate(sums, inputs, targets, offset + start, example_weights=weights)

    def _parts(self, x: Any, y: Tensor, every_output: bool = False) -> Iterator[tuple[int, Any, Tensor]]:
        """The parts in which a batch is captured, for all outputs at once or not: first example's number, inputs, targets."""
        parts = self.backend.parts(x, every_output)
        if len(parts) == 1:
            yield 0, x, y
            return
        if len(y) != parts[-1][0].stop:
            raise ValueError(f"There are {len(y)} targets, but {parts[-1][0].stop} inputs in this batch.")
        for part, inputs in parts:
            yield part.start, inputs, y[part]

    def set_sums(self, sums: CurvatureSums) -> None:
        """Finalise raw sums: from here on this is a fitted posterior, and the sums belong to it.

        Args:
            sums: From :meth:`zero_sums`, with the data added.

        Raises:
            ValueError: If the sums hold no example, NaN or Inf, or belong to other parameters.
        """
        if sums.n_data == 0:
            raise ValueError("The sums hold no example: the data loader was empty. Nothing was changed.")
        wrong = sums.non_finite()
        if wrong:
            raise ValueError(f"The summed curvature is NaN or Inf in {wrong}. Nothing was changed.")
        kept = self._kept_shapes()
        if [(b.shape, b.chosen) for b in sums.spec.blocks] != kept or sums.spec.structure != self.structure:
            raise ValueError(
                f"The sums are of structure {sums.spec.structure!r} for parameters {[b.parameter for b in sums.spec.blocks]} "
                f"and do not fit this {self.structure!r} posterior over shapes {[shape for shape, _ in kept]}"
                f"{', or are of another subnetwork' if any(chosen for _, chosen in kept) else ''}."
            )
        self._spec = self.backend.spec = sums.spec
        self._finalize(sums)
        self.sums = sums
        self.loss, self.n_data, self.n_outputs = sums.loss, sums.n_data, sums.spec.n_outputs
        self._remember_weights()
        self._prior_changed()

    def _remember_weights(self) -> None:
        self.mean = parameter_vector(self.params).detach()
        self._fingerprint = weights.Fingerprint(self.model, self.params)

    def _check_weights(self) -> None:
        weights.check_unchanged(self)

    @outside_inference_mode()
    def fit(self, train_loader: DataLoader, override: bool = True, progress_bar: bool = False) -> None:
        """Add up curvature over a data loader and finalise it.

        Args:
            train_loader: Batches ``(x, y)``, or dict-like batches that hold ``dict_key_y``.
            override: Start from zero; False adds to what was fitted before, as in online learning.
            progress_bar: Show progress over batches.

        Raises:
            NonFiniteError: On NaN or Inf; names the examples. An earlier fit stays as it was.
            ValueError: On an empty loader or targets that do not fit. An earlier fit stays as it was.
        """
        adds = not override and self.sums is not None
        if adds:
            check_same_estimator(self.sums.estimator, self.backend.estimator)
            weights.warn_of_addition(self)
        with self._or_as_before(), keeping_freed:
            sums = self._sum_over(train_loader, progress_bar)
            if adds:
                sums.merge(self.sums)
            self.set_sums(sums)

    @contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """Where a fit fails, what an earlier one knew about the layers stays."""
        before, done = (self._spec, self.n_outputs), False
        try:
            yield
            done = True
        finally:
            if not done:
                self._spec, self.n_outputs = before
                self.backend.spec = self._spec

    def _sum_over(self, train_loader: DataLoader, progress_bar: bool) -> CurvatureSums:
        sums: CurvatureSums | None = None
        for x, y in self._batches(train_loader, progress_bar):
            if sums is None:
                self._start_fit(x)
                sums = self.zero_sums()
            self.accumulate(sums, x, y, offset=sums.n_data)
        if sums is None:
            raise ValueError("The data loader is empty, so there is nothing to fit. An earlier fit stays as it was.")
        return sums

    def _start_fit(self, x: Any) -> None:
        """Learn from the first batch what the sums look like."""
        self.initialize(x)

    def _batches(
        self, loader: DataLoader, progress_bar: bool = False, what: str = "Computing Hessian"
    ) -> Iterator[tuple[Any, Tensor]]:
        """Batches on the model's device, as inputs and targets."""
        if progress_bar:
            from tqdm.auto import tqdm

            loader = tqdm(loader, desc=f"[{what}]")
        yield from batches(loader, self._device, self.dict_key_y)

    def _adopt_parameters(self, spec: SumsSpec) -> Callable[[], None]:
        """Subsets of weights that depend on the data find their parameters from a stored specification here.

        Returns:
            What takes that back.
        """
        return lambda: None

    # --- what a structure provides -------------------------------------------------------------------------------

    def _kept_shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
        """Shape of every parameter tensor with a distribution, and which of its entries have one (None for all)."""
        return [(tuple(p.shape), None) for p in self.params]

    def _finalize(self, sums: CurvatureSums) -> None:
        """Set ``H`` from raw sums."""
        raise NotImplementedError
