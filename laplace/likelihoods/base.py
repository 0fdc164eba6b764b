r"""A likelihood as an object: all that the library asks of :math:`p(y \mid f)`, given the network's outputs :math:`f`.

Outputs have shape ``(batch, …, outputs)``; every position between the first and the last dimension is a likelihood term of its
own. A likelihood of one's own gives :meth:`BaseLikelihood.nll`; everything else has a default that follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace import noise
from laplace.data.example_weights import along
from laplace.enums import Likelihood
from laplace.likelihoods.checks import check_finite
from laplace.likelihoods.predictive import Predictive
from laplace.likelihoods.roots import eigen_columns, restricted_columns
from laplace.linalg.precision import double

_FOLLOWING = {  # methods by one that they have to agree with
    "root_columns": ("hessian_diagonal", "hessian_sum", "weighted_hessian_sum"),
    "check_shapes": ("are_right",),
}


class BaseLikelihood(Predictive):
    r"""Loss :math:`-\log p(y \mid f)` with its derivatives in the outputs, its samples, predictives and scores.

    A subclass gives :meth:`nll`. Beyond that it may give :meth:`check_shapes` (which targets fit), :meth:`mean` (for
    predictions), :meth:`draw` (for Monte-Carlo Fisher) and :meth:`root_columns` (faster, or where the Hessian in the outputs is
    not positive semi-definite); the rest is for likelihoods with closed forms. Two objects with equal :attr:`identity` are
    taken for the same likelihood, so one with settings of its own has to put them there.

    Everywhere ``f`` are outputs ``(batch, …, outputs)``, ``y`` targets as the likelihood takes them, ``offset`` the index in
    the data set of the batch's first example, ``weights`` those of examples ``(batch,)``, ``u`` uniform numbers shaped like
    ``f``, ``n_data``, ``n_outputs`` and ``sigma_noise`` what the posterior has under these names, and ``num_samples`` and
    ``seed`` those of the Monte-Carlo Fisher. Targets that do not fit are a ValueError, values not finite a NonFiniteError.

    Attributes:
        word: The name under which users ask for it, where the library has one.
        has_noise: Whether ``sigma_noise`` means something.
        structures: Hessian structures that it is limited to, or None.
        tuning: How the jobs tune a scalar prior precision by default, ``'gridsearch'`` or ``'marglik'``.
        predicts_outputs: Whether its predictive is the Gaussian over the outputs itself.
        grid_needs_variance: Whether the prior precision changes the mean of its predictive under ``pred_type='glm'``.
        scales_logits: Whether its outputs are logits, which a temperature may divide.
        has_confidence: Whether its scores hold a ``confidence``, by which out-of-distribution data can be told.
        sampling: How the numbers that targets are drawn by are shared out among an example's positions: 2, by turn among those
            that count, so that what is padded in front of them or behind moves none; 1, as runs of laplace_dist 0.1 have it.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import BaseLikelihood
        >>> class Exponential(BaseLikelihood):
        ...     def nll(self, f, y):  # waiting times whose log rate is the output
        ...         return (y * f.exp() - f).sum(-1)
        ...     def mean(self, f):
        ...         return (-f).exp()
        ...
        >>> la = Laplace(torch.nn.Linear(2, 1), Exponential(), "all", "full")
        >>> la.fit([(torch.randn(8, 2), torch.rand(8, 1))])
        >>> la.H.shape
        torch.Size([3, 3])
    """

    word: Likelihood | None = None
    has_noise = False
    structures: tuple[str, ...] | None = None
    tuning = "marglik"
    predicts_outputs = False
    grid_needs_variance = True
    scales_logits = False
    has_confidence = False
    sampling = 2

    def __init_subclass__(cls, **kwargs: Any):
        """A class with a root or checks of its own does not inherit another's closed forms or what stands for its checks."""
        super().__init_subclass__(**kwargs)
        for own, names in _FOLLOWING.items():
            for name in names if own in vars(cls) else ():
                if name not in vars(cls):
                    setattr(cls, name, getattr(BaseLikelihood, name))

    @property
    def identity(self) -> str:
        """What tells it from other likelihoods, in states and messages."""
        return f"{type(self).__module__}:{type(self).__qualname__}" if self.word is None else self.word.value

    @property
    def fitted(self) -> BaseLikelihood:
        """The likelihood of the training data, whose curvature is summed; reward models predict by another one."""
        return self

    def predicting(self, fitting: bool) -> BaseLikelihood:
        """The likelihood of predictions; ``fitting`` asks for that of the training data."""
        return self

    # --- targets and loss ----------------------------------------------------------------------------------------

    def check(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse outputs that are not finite, and targets that do not fit them.

        Args:
            f: Outputs ``(batch, …, outputs)``.
            y: Targets.
            offset: Index of the first example in the data set, for messages.

        Raises:
            ValueError: If the targets do not fit.
            NonFiniteError: On NaN or Inf.
        """
        if not self.are_right(f, y):
            check_finite("The model's output", f, offset)
            self.check_shapes(f, y, offset)

    def are_right(self, f: Tensor, y: Tensor) -> bool:
        """Whether outputs and targets are known to be right by one look at their values; False leaves that to the checks.

        On a GPU every look at a value waits for all that was asked of the device before, and every batch is checked.
        """
        return False

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that do not fit the outputs; by default those of another number of examples, or not finite.

        Raises:
            ValueError: If the targets do not fit.
            NonFiniteError: On NaN or Inf.
        """
        if len(y) != len(f):
            raise ValueError(f"There are {len(y)} targets for the outputs of {len(f)} examples; give one per example.")
        check_finite("The target", y, offset)

    def warn_of_outputs(self, f: Tensor) -> None:
        """Say so where outputs, given with their graph, may not be what is meant; asked once, with the first batch of a fit."""

    def check_length(self, y: Tensor, n_outputs: int) -> None:
        """Refuse targets of another number of values per example than the evidence counts on, if it counts any.

        Raises:
            ValueError: If there are.
        """

    def count_outputs(self, f: Tensor) -> int:
        """Number of outputs that a posterior remembers: of one position, or where they are counted, of an example."""
        return f.shape[-1]

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of every term, ``(batch, …)``, differentiable in ``f``."""
        raise NotImplementedError(
            f"{type(self).__name__} has no nll(f, y), the one method that a likelihood must give."
        )

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Sum over examples of the negative log likelihood (without what :meth:`noise_constant` adds), float64 scalar."""
        f = double(f)
        return self.nll(f, y.to(f.device)).double().sum()

    def weighted_loss(self, f: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The same of examples with weights ``(batch,)``: an example's terms times its weight."""
        terms = self.nll(double(f), y.to(f.device)).double()
        return (along(weights, terms) * terms).sum()

    def noise_constant(self, n_data: int, n_outputs: int, sigma_noise: Tensor) -> Tensor | float:
        """What the log likelihood of the data lacks beside the scaled loss, where that depends on the noise."""
        return 0.0

    def torch_loss(self) -> tuple[nn.Module | None, float]:
        """Torch's loss whose sum, times the factor, is the negative log likelihood; None where packages know of none."""
        return None, 1.0

    def training_loss(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Mean loss to train a network with, and the factor from it to the mean negative log likelihood."""
        return self.loss(f, y) / len(y), 1.0

    # --- derivatives in the outputs ------------------------------------------------------------------------------

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Gradient of the loss with respect to the outputs, shaped like ``f``."""
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            return torch.autograd.grad(self.nll(leaf, y).sum(), leaf)[0]

    @property
    def can_draw(self) -> bool:
        """Whether targets can be drawn from the model, which a Monte-Carlo Fisher needs."""
        own = type(self)
        return own.draw is not BaseLikelihood.draw or own.sampled_gradients is not BaseLikelihood.sampled_gradients

    def hessian_root(self, f: Tensor, y: Tensor, outputs: Sequence[int] | None = None) -> Iterator[Tensor]:
        r"""Columns :math:`v_k` with :math:`\sum_k v_k v_k^\top = \nabla^2_f (-\log p)`, each shaped like ``f``.

        Args:
            f: Outputs ``(batch, …, outputs)``.
            y: Targets.
            outputs: Some of the outputs, the others being held constant: the rows and columns :math:`(\nabla^2_f)_{SS}` alone,
                zero elsewhere; all of them if not given.
        """
        positions = f[0, ..., 0].numel()
        columns = self.root_columns(f, y)
        for column in columns if outputs is None else restricted_columns(columns, f, outputs):
            if positions == 1:
                yield column
                continue
            flat = column.reshape(len(f), positions, -1)
            for t in range(positions):
                alone = torch.zeros_like(flat)
                alone[:, t] = flat[:, t]
                yield alone.reshape(f.shape)

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        r"""Columns of a root of the Hessian of every position's term, each shaped like ``f``.

        By default from eigenvectors of the Hessian that automatic differentiation gives.

        Raises:
            ValueError: If the Hessian has a negative eigenvalue. A likelihood that is not log-concave in its outputs takes its
                Fisher information here instead, as the Gauss-Newton matrix does.
        """
        return eigen_columns(self.nll, f, y, self.identity)

    def hessian_diagonal(self, f: Tensor, y: Tensor) -> Tensor:
        r"""Diagonal of :math:`\nabla^2_f (-\log p)`, shaped like ``f``."""
        total = torch.zeros_like(f)
        for column in self.root_columns(f, y):
            total += column.square()
        return total

    def hessian_sum(self, f: Tensor, y: Tensor) -> Tensor:
        r"""Sum of :math:`\nabla^2_f (-\log p)` over examples, ``(outputs, outputs)`` for outputs of one position."""
        total = f.new_zeros(f.shape[-1], f.shape[-1])
        for column in self.root_columns(f, y):
            total += column.T @ column
        return total

    def weighted_hessian_sum(self, f: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The same of examples with weights ``(batch,)``."""
        total = f.new_zeros(f.shape[-1], f.shape[-1])
        for column in self.root_columns(f, y):
            total += (along(weights, column) * column).T @ column
        return total

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """Targets drawn from the model, from uniform numbers in (0, 1) shaped like ``f``; a function of the two alone."""
        raise NotImplementedError(
            f"{type(self).__name__} has no draw(f, u), which a Monte-Carlo Fisher needs; give it one, or use the exact GGN."
        )

    def sampled_gradients(self, f: Tensor, y: Tensor, num_samples: int, seed: int, offset: int) -> Iterator[Tensor]:
        r"""Gradients under targets drawn from the model, scaled by :math:`1/\sqrt{S}`, each shaped like ``f``.

        Their outer products sum to an unbiased estimate of the Fisher (Kunstner et al., NeurIPS 2019). The draws of an
        example depend on ``seed`` and on its index in the data set only.
        """
        for u in self._uniform(f, y, num_samples, seed, offset):
            yield self.gradient(f, self.draw(f, u)) * num_samples**-0.5

    def counts(self, y: Tensor) -> Tensor | None:
        """Which positions are terms of the loss, ``(batch, …)`` bool; None where all are, whatever their target."""
        return None

    def _uniform(
        self, f: Tensor, y: Tensor, num_samples: int, seed: int, offset: int, each: int | None = None
    ) -> Iterator[Tensor]:
        """Uniform numbers ``(batch, …, each)`` of every sample; as many for each position as it has outputs by default."""
        each, positions = each or f.shape[-1], f[0, ..., 0].numel()
        examples = torch.arange(offset, offset + len(f), device=f.device)
        numbers = noise.uniform(seed, examples, num_samples * positions * each)
        if self.sampling == 1:
            yield from numbers.reshape(len(f), num_samples, *f.shape[1:-1], each).unbind(1)
            return
        numbers = numbers.reshape(len(f), positions, num_samples, each)
        if (counts := self.counts(y)) is not None:
            turns = (counts.to(f.device).reshape(len(f), positions).cumsum(1) - 1).clamp_(min=0)
            numbers = numbers.take_along_dim(turns[:, :, None, None], 1)
        yield from numbers.reshape(len(f), *f.shape[1:-1], num_samples, each).unbind(-2)
