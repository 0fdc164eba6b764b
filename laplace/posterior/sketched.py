"""Low-rank posterior from sketches, which are sums over examples: two passes over the data, by any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from laplace.backends.interface import CurvatureInterface
from laplace.backends.native import NativeGGN
from laplace.linalg.inference import outside_inference_mode
from laplace.posterior.arguments import by_name
from laplace.posterior.lowrank import LowRankLaplace
from laplace.posterior.summed import SummedLaplace
from laplace.structures import sketch
from laplace.structures.registry import SECOND_PASSES
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums


class SketchedLowRankLaplace(LowRankLaplace):
    """Low-rank posterior whose eigenpairs come from a randomised range finder; see :mod:`laplace.structures.sketch`.

    Where :class:`LowRankLaplace` searches in many passes that depend on each other, this takes two that are sums over examples,
    so that the jobs can spread them. It is of the GGN, sampled or exact, or of the empirical Fisher: a Hessian need not be
    positive semi-definite.

    Args:
        rank: How many eigenpairs at most.
        oversampling: Further columns of the sketch; see the error bound in :mod:`laplace.structures.sketch`.
        seed: Of the random matrix.
        backend: A native GGN or empirical Fisher.
        **kwargs: As of :class:`laplace.BaseLaplace`.

    Raises:
        ValueError: If the backend has no rows along directions, or a number is out of range.

    Example:
        >>> import torch
        >>> from laplace import SketchedLowRankLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = SketchedLowRankLaplace(model, "classification", rank=5)
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    @by_name
    def __init__(
        self,
        *,
        rank: int = 10,
        oversampling: int = 10,
        seed: int = 0,
        backend: type[CurvatureInterface] | None = NativeGGN,
        **kwargs: Any,
    ):
        """See the class."""
        for name, value, least in (("rank", rank, 1), ("oversampling", oversampling, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
        backend = backend or NativeGGN
        if not hasattr(backend, "directions") or not hasattr(backend, "capture") or not hasattr(backend, "accumulate"):
            raise ValueError(
                f"A sketch adds up rows along directions, which {backend.__name__} has not; use NativeGGN."
            )
        self.rank, self.oversampling, self.seed = rank, oversampling, seed
        self._matrix: tuple[SumsSpec, Tensor] | None = None
        super().__init__(backend=backend, **kwargs)

    def initialize(self, x: Any) -> SumsSpec:
        """Decide from one batch of inputs how every parameter's rows are obtained."""
        self._spec = sketch.sketch_spec(super().initialize(x), self.rank + self.oversampling)
        return self._spec

    def zero_sums(self) -> CurvatureSums:
        """Raw sums of the first pass over no example."""
        sums, spec = SummedLaplace.zero_sums(self), self.sums_spec()
        if self._matrix is None or self._matrix[0] != spec:
            self._matrix = spec, sketch.random_matrix(spec, self.seed, self._device)
        sums.basis = {"test": self._matrix[1]}
        return sums

    accumulate = SummedLaplace.accumulate  # as its base is no sum, that refuses

    def set_second_sums(self, sums: CurvatureSums, basis: Mapping[str, Tensor]) -> None:
        """Finalise the raw sums of the second pass: the eigenpairs of the ``rank`` largest eigenvalues."""
        self.set_sums(sketch.eigenpairs(sums, basis, self.rank))

    @outside_inference_mode()
    def fit(self, train_loader: Iterable, override: bool = True, progress_bar: bool = False) -> None:
        """Find the leading eigenpairs of the curvature over a data loader, in two passes over it.

        Args:
            train_loader: Batches ``(x, y)`` or dict-like ones; the same data, in the same order, at both passes.
            override: Has to be True.
            progress_bar: Show progress over batches.

        Raises:
            NonFiniteError: On NaN or Inf; names the examples. An earlier fit stays as it was.
            ValueError: If ``override`` is False, on an empty loader, one that gives other data in the second pass, or targets
                that do not fit. An earlier fit stays.
        """
        if not override:
            self._refuse("fit(override=False)")
        if isinstance(train_loader, Iterator):
            raise ValueError("A sketch passes over the data twice; give a DataLoader or list, not an iterator.")
        with self._or_as_before():
            first = self._sum_over(train_loader, progress_bar)
            basis = SECOND_PASSES[self.structure].find_all(first)
            second = self.second_sums(basis)
            for x, y in self._batches(train_loader, progress_bar):
                self.accumulate(second, x, y, offset=second.n_data)
            _check_same(first, second)
            self.set_second_sums(second, basis)


def _check_same(first: CurvatureSums, second: CurvatureSums) -> None:
    """Refuse data that change from the first pass to the second."""
    losses = float(first.loss), float(second.loss)
    if first.n_data != second.n_data or abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0]):
        raise ValueError(
            f"The data changes between passes: {first.n_data} examples of summed loss {losses[0]:.6g} first, then "
            f"{second.n_data} of {losses[1]:.6g}. A sketch needs a loader without random augmentation or sampling."
        )
