r"""Classification with class weights, label smoothing, labels that are left out, or distributions for targets.

All of these are :math:`-\sum_c t_c \log \mathrm{softmax}(f)_c` with
:math:`t_c = w_c \left[(1 - \varepsilon) y_c + \tfrac\varepsilon C\right]`, as in :class:`torch.nn.CrossEntropyLoss` (its
documentation, and Szegedy et al., "Rethinking the Inception architecture", CVPR 2016). With mass :math:`m = \sum_c t_c` the
gradient is :math:`m p - t` and the Hessian :math:`m (\mathrm{diag}(p) - p p^\top)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.categorical import Categorical
from laplace.likelihoods.checks import check_finite
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.probabilities import one_at
from laplace.likelihoods.scores import log_probability_scores

_TOLERANCE = 1e-3  # of the sum of a distribution, as rounding in half precision may leave it


class WeightedCategorical(Categorical):
    """A categorical likelihood to powers: one example or class may count more than another, or not at all.

    Scores of predictions are those of a plain classification, without weights and smoothing; labels that are left out have
    none.

    Args:
        class_weights: Weight of every class.
        label_smoothing: Share of every target that is spread evenly over the classes.
        ignore_index: Labels of this value are left out.
        soft_targets: Targets are distributions over classes ``(batch, …, classes)`` instead of labels.

    Raises:
        ValueError: If a value is out of range, or labels are to be left out of ``soft_targets``.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import WeightedCategorical
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> law = WeightedCategorical(class_weights=[1.0, 2.0, 0.5], ignore_index=-100)
        >>> la = Laplace(torch.nn.Linear(2, 3), law, "all", "full")
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    def __init__(
        self,
        class_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        soft_targets: bool = False,
    ):
        """See the class."""
        self.class_weights = (
            None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float64).tolist()
        )
        self.label_smoothing, self.ignore_index, self.soft_targets = label_smoothing, ignore_index, soft_targets
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1).")
        if self.class_weights is not None and not all(0 <= w < float("inf") for w in self.class_weights):
            raise ValueError(f"class_weights={self.class_weights} must be finite and not negative.")
        if soft_targets and ignore_index is not None:
            raise ValueError(
                f"ignore_index={ignore_index} names a label, but soft_targets=True has none; leave one of them out."
            )

    @property
    def word(self) -> Likelihood | None:
        """None: it is not what the word ``'classification'`` stands for."""
        return None

    @property
    def identity(self) -> str:
        """Its settings."""
        return (
            f"WeightedCategorical(class_weights={self.class_weights}, label_smoothing={self.label_smoothing}, "
            f"ignore_index={self.ignore_index}, soft_targets={self.soft_targets})"
        )

    def are_right(self, f: Tensor, y: Tensor) -> bool:
        """See :meth:`BaseLikelihood.are_right`."""
        known = self.class_weights is None or len(self.class_weights) == f.shape[-1]
        return known and not self.soft_targets and super().are_right(f, self._counted(y))

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse labels or distributions that do not fit the outputs."""
        if self.class_weights is not None and len(self.class_weights) != f.shape[-1]:
            raise ValueError(
                f"There are {len(self.class_weights)} class_weights for {f.shape[-1]} outputs; give one each."
            )
        if not self.soft_targets:
            super().check_shapes(f, self._counted(y), offset)
            return
        if y.shape != f.shape or not y.is_floating_point():
            raise ValueError(
                f"Targets of shape {tuple(y.shape)} and type {y.dtype} are no distributions over outputs {tuple(f.shape)}: "
                "soft_targets=True takes floats (batch, …, classes)."
            )
        check_finite("The soft target", y, offset)
        wrong = (y < 0).any(-1) | ((y.double().sum(-1) - 1).abs() > _TOLERANCE)
        if bool(wrong.any()):
            first = int(wrong.reshape(len(y), -1).any(1).nonzero()[0])
            raise ValueError(
                f"The soft target of example {offset + first} is no distribution: it has a negative value, "
                "or does not sum to 1."
            )

    def targets(self, f: Tensor, y: Tensor) -> Tensor:
        """The targets :math:`t`, shaped like ``f``."""
        classes, smoothing = f.shape[-1], self.label_smoothing
        hard = y.to(f.dtype) if self.soft_targets else one_at(self._counted(y), f)
        t = (1 - smoothing) * hard + smoothing / classes
        if self.class_weights is not None:
            t = t * torch.tensor(self.class_weights, dtype=f.dtype, device=f.device)
        return t if self.ignore_index is None else t * (y != self.ignore_index)[..., None]

    def counts(self, y: Tensor) -> Tensor | None:
        """All but the positions with ``ignore_index``."""
        return None if self.ignore_index is None else y != self.ignore_index

    def _counted(self, y: Tensor) -> Tensor:
        """Labels, with a valid one in place of those that are left out."""
        return y if self.ignore_index is None else torch.where(y == self.ignore_index, torch.zeros_like(y), y)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Weighted cross entropy of every position."""
        return -(self.targets(f, y) * f.log_softmax(-1)).sum(-1)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Their sum, float64."""
        return BaseLikelihood.loss(self, f, y)

    def torch_loss(self) -> tuple[nn.Module | None, float]:
        """None: other packages' factors leave out the weights."""
        return None, 1.0

    def training_loss(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Sum of the weighted cross entropies over the number of examples."""
        return BaseLikelihood.training_loss(self, f, y)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Probabilities times mass, minus targets."""
        t = self.targets(f, y)
        return t.sum(-1, keepdim=True) * f.softmax(-1) - t

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Those of the plain likelihood, times the root of the mass."""
        root = self._root_of_mass(f, y)
        return (root * column for column in super().root_columns(f, y))

    def sampled_gradients(self, f: Tensor, y: Tensor, num_samples: int, seed: int, offset: int) -> Iterator[Tensor]:
        """Those of the plain likelihood, times the root of the mass: their outer products have the Hessian's mean."""
        root, plain = self._root_of_mass(f, y), super().sampled_gradients(f, y, num_samples, seed, offset)
        return (root * gradient for gradient in plain)

    def _root_of_mass(self, f: Tensor, y: Tensor) -> Tensor:
        return self.targets(f, y).sum(-1, keepdim=True).sqrt()

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """Labels from the softmax, as distributions if ``soft_targets``."""
        label = super().draw(f, u)
        return one_at(label, f) if self.soft_targets else label

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """Scores of a plain classification; under a distribution for target, their mean, and ``correct`` by its mode."""
        log_probs = prediction[0]
        if not self.soft_targets:
            kept = y.flatten() != self.ignore_index
            return log_probability_scores(log_probs.reshape(-1, log_probs.shape[-1])[kept], y.flatten()[kept])
        y = y.double().to(log_probs.device).reshape(-1, log_probs.shape[-1])
        found = log_probability_scores(log_probs, y.argmax(-1))
        log_probs = log_probs.detach().double().reshape(y.shape)
        return {**found, "nll": -(y * log_probs).sum(-1), "brier": (log_probs.exp() - y).square().sum(-1)}

    def monitored(self, prediction: Prediction, y: Tensor | None = None, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """Of the terms that count; the label of a distribution is its mode."""
        if y is None:
            return super().monitored(prediction)
        found = super().monitored(prediction, y.argmax(-1) if self.soft_targets else y)
        if self.ignore_index is None:
            return found
        kept = y.flatten() != self.ignore_index
        return {name: values[kept] for name, values in found.items()}

    def tuning_loss(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> float:
        """Summed negative log likelihood of the scores."""
        return BaseLikelihood.tuning_loss(self, prediction, y)
