r"""EKFAC posterior: :math:`P = \bigoplus_l Q_l \left(\mathrm{diag}(s_l) / (\sigma^2 T) + \delta_l I\right) Q_l^\top`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from laplace.linalg.decomposed import KronDecomposed
from laplace.linalg.inference import outside_inference_mode
from laplace.posterior.arguments import by_name
from laplace.posterior.decomposed import DecomposedLaplace
from laplace.posterior.refusals import check_structure
from laplace.structures import ekfac, passes
from laplace.structures.ekfac import Eigenbasis
from laplace.structures.registry import SECOND_PASSES
from laplace.structures.specification import Rows, SumsSpec
from laplace.structures.sums import CurvatureSums


class EKFACLaplace(DecomposedLaplace):
    r"""Laplace approximation with eigenvalue-corrected Kronecker factors.

    ``fit`` passes over the data twice: first for Kronecker factors, whose eigenvectors are found in float64, then for the
    second moments :math:`s` of the gradients in that basis, the exact diagonal of the curvature there; see
    :mod:`laplace.structures.ekfac`. With backends that sample labels, both passes draw the same ones.
    ``fit(override=False)`` adds second moments in the basis that there is.

    Whoever adds batches by hand does as ``fit`` does: until a basis is set, :meth:`initialize`, :meth:`zero_sums` and
    :meth:`accumulate` are those of Kronecker factors; ``la.basis = Eigenbasis.of(sums)`` ends the first pass.

    Attributes:
        basis: The eigenvectors by the names of the Kronecker factors, None before the first pass has ended.
        H: The summed curvature as :class:`laplace.utils.matrix.KronDecomposed`, with one table of eigenvalues for a weight.

    Example:
        >>> import torch
        >>> from laplace import EKFACLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = EKFACLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    structure = "ekfac"
    title = "EKFAC"

    @by_name
    def __init__(self, **kwargs: Any):
        """See :class:`laplace.BaseLaplace`."""
        self.basis: Eigenbasis | None = None
        self._kept: tuple[Mapping[str, Tensor], Eigenbasis] | None = None
        self._decomposed: KronDecomposed | None = None
        super().__init__(**kwargs)
        why = "it gives Kronecker factors, but no gradients in their eigenbasis"
        check_structure(self._backend_cls, self.structure, why, "kron")

    @property
    def _summed(self) -> str:
        """The structure of the sums of the pass that is under way."""
        return "kron" if self.basis is None else self.structure

    def initialize(self, x: Any) -> SumsSpec:
        """Decide from one batch of inputs how every parameter's curvature is obtained, in the pass that is under way."""
        spec = super().initialize(x)
        if self.basis is not None:
            self._spec = self.backend.spec = spec = self.basis.spec(spec)
        return spec

    def zero_sums(self, rows: Rows | None = None) -> CurvatureSums:
        """Raw sums over no example: Kronecker factors until there is a basis, second moments in it from then on."""
        sums = super().zero_sums(rows)
        sums.basis = self.basis
        return sums

    def second_sums(self, basis: Mapping[str, Tensor], rows: Rows | None = None) -> CurvatureSums:
        """Raw sums of second moments over no example, in an eigenbasis that was kept; of the first pass's specification."""
        sums = super().second_sums(basis, rows)
        if self._kept is None or self._kept[0] is not basis:  # its digest takes a pass over all of it
            self._kept = basis, Eigenbasis(sums.basis)
        vectors = self._kept[1]
        sums.spec, sums.basis = replace(sums.spec, basis=vectors.digest), vectors
        return sums

    def set_second_sums(self, sums: CurvatureSums, basis: Mapping[str, Tensor]) -> None:
        """Finalise second moments that were added up in an eigenbasis that was kept, and take that over."""
        whole = SECOND_PASSES[self.structure].finish(sums, basis)
        with self._or_as_before():
            self.basis = whole.basis
            self.set_sums(whole)

    @outside_inference_mode()
    def accumulate(
        self,
        sums: CurvatureSums,
        x: Any,
        y: Tensor,
        offset: int = 0,
        example_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Add one batch to raw sums in place; see :meth:`SummedLaplace.accumulate`.

        Raises:
            ValueError: If the sums are of another basis; or as there.
        """
        if sums.spec.structure == self.structure and sums.basis is None:
            sums.basis = self.basis
        super().accumulate(sums, x, y, offset, example_weights)

    @outside_inference_mode()
    def fit(self, train_loader: Iterable, override: bool = True, progress_bar: bool = False) -> None:
        """Find the eigenbasis in one pass over a data loader, and add up second moments in it in another.

        Args:
            train_loader: Batches ``(x, y)`` or dict-like ones; the same data at both passes.
            override: Start from zero; False adds second moments in the basis of the earlier fit, in one pass.
            progress_bar: Show progress over batches.

        Raises:
            NonFiniteError: On NaN or Inf; names the examples. An earlier fit stays as it was.
            ValueError: On a loader that is empty, can be passed through only once or changes between passes, or on targets that
                do not fit. An earlier fit stays as it was.
        """
        if not override and self.sums is not None:
            super().fit(train_loader, override=False, progress_bar=progress_bar)
            return
        passes.refuse_iterator(train_loader, "An EKFAC fit")
        with self._or_as_before(), passes.one_seed(self.backend):
            self.basis = None
            first = self._sum_over(train_loader, progress_bar)
            self.basis = Eigenbasis.of(first)
            sums = self._sum_over(train_loader, progress_bar)
            passes.check_same((first.n_data, float(first.loss)), (sums.n_data, float(sums.loss)), "An EKFAC fit")
            self.set_sums(sums)

    @contextmanager
    def _or_as_before(self) -> Iterator[None]:
        before, done = self.basis, False
        try:
            with super()._or_as_before():
                yield
            done = True
        finally:
            if not done:
                self.basis = before

    def set_sums(self, sums: CurvatureSums) -> None:
        """Finalise second moments; see :meth:`SummedLaplace.set_sums`.

        Raises:
            ValueError: If they are taken in another basis than ``basis``; or as there.
        """
        ours = None if self.basis is None else self.basis.digest
        if sums.spec.structure == self.structure and sums.spec.basis != ours:
            raise ValueError(
                f"The sums are taken in the eigenbasis {sums.spec.basis}, but this posterior's is {ours}. Set la.basis to the "
                "one that they were added up in. Nothing was changed."
            )
        super().set_sums(sums)

    def _finalize(self, sums: CurvatureSums) -> None:
        basis = {name: vectors.to(sums.spec.torch_dtype) for name, vectors in self.basis.vectors.items()}
        vectors = [[basis[name] for name in block.basis] or [None] for block in sums.spec.blocks]
        self._decomposed = KronDecomposed(vectors, [[table] for table in ekfac.tables(sums)])

    @property
    def H(self) -> KronDecomposed | None:
        """Curvature in the eigenbasis, with the second moments as eigenvalues; zero before ``fit``."""
        return super().H if self._decomposed is None else self._decomposed

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "basis": dict(self.basis.vectors)}

    def _read_state(self, state: dict[str, Any]) -> Any:
        vectors = {name: value.to(self._device) for name, value in state["basis"].items()}
        return super()._read_state(state), Eigenbasis(vectors)

    def _take_state(self, content: Any) -> None:
        sums, basis = content
        before, self.basis = self.basis, basis
        try:
            self.set_sums(sums)
        except ValueError:
            self.basis = before
            raise
