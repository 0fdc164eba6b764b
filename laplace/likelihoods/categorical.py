r"""Classification: :math:`-\sum_c t_c \log \mathrm{softmax}(f)_c`, with a one at the label for :math:`t`, or other weights.

With mass :math:`m = \sum_c t_c` the gradient is :math:`m p - t` and the Hessian :math:`m (\mathrm{diag}(p) - p p^\top)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from laplace.data.example_weights import along
from laplace.enums import Likelihood, LinkApprox
from laplace.likelihoods.checks import first_wrong
from laplace.likelihoods.links import log_mean, softmax_link
from laplace.likelihoods.mistakes import check_classes, warn_of_layout, warn_of_probabilities
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.probabilities import ClassProbabilities, one_at
from laplace.likelihoods.scores import log_probability_scores
from laplace.linalg.gram import add_gram_, mirror_
from laplace.linalg.precision import double

_LEFT_OUT = (
    " Positions with -100, as torch's losses leave them out, are left out by the likelihood "
    "laplace.likelihoods.WeightedCategorical(ignore_index=-100)."
)


class Categorical(ClassProbabilities):
    """Classification by a softmax over the last dimension; a prediction is log-probabilities.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import Categorical
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = Laplace(torch.nn.Linear(2, 3), Categorical(), "all", "full")
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 3])
    """

    word: Likelihood | None = Likelihood.CLASSIFICATION

    def are_right(self, f: Tensor, y: Tensor) -> bool:
        """See :meth:`BaseLikelihood.are_right`."""
        if y.shape != f.shape[:-1] or f.shape[-1] == 1 or y.is_floating_point() or y.dtype is torch.bool:
            return False
        return bool(torch.isfinite(f.sum()) & ((y >= 0) & (y < f.shape[-1])).all())

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse labels that are not integers, not one per position, or out of range."""
        check_classes(f, y)
        if y.is_floating_point() or y.dtype is torch.bool:
            raise ValueError(
                f"Classification needs integer class labels, but the targets are {y.dtype}. "
                "Convert them with .long(), or use likelihood='regression'."
            )
        if y.shape != f.shape[:-1]:
            raise ValueError(
                f"Labels of shape {tuple(y.shape)} do not match outputs {tuple(f.shape)}: (batch, …, classes)."
            )
        wrong = (y < 0) | (y >= f.shape[-1])
        if bool(wrong.any()):
            first, value, affected = first_wrong(wrong, y, offset)
            left_out = _LEFT_OUT if value == -100 else ""
            raise ValueError(
                f"Label {value} of example {first} is out of range: the model has {f.shape[-1]} outputs, so labels "
                f"must lie in 0…{f.shape[-1] - 1}. {affected} example(s) of this batch are affected.{left_out}"
            )

    def warn_of_outputs(self, f: Tensor) -> None:
        """Say so where the classes may be the last or the second dimension, and where outputs are no logits."""
        warn_of_layout(f)
        warn_of_probabilities(f)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Cross entropy of every position."""
        return cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1).long(), reduction="none").reshape(f.shape[:-1])

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Summed cross entropy, float64."""
        f = double(f)
        return cross_entropy(f.reshape(-1, f.shape[-1]), y.to(f.device).reshape(-1).long(), reduction="sum")

    def torch_loss(self) -> tuple[nn.Module | None, float]:
        """The cross entropy."""
        return nn.CrossEntropyLoss(reduction="sum"), 1.0

    def training_loss(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Mean cross entropy over examples and positions."""
        return cross_entropy(f.flatten(0, -2), y.flatten()), 1.0

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Probabilities minus the one at the label."""
        return f.softmax(-1) - one_at(y, f)

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        r"""Columns of a root of :math:`\mathrm{diag}(p) - pp^\top`, which has rank :math:`C - 1`.

        With :math:`u = \sqrt p`, a Householder reflection that maps :math:`e_0` to :math:`-u` takes the null direction out of
        the symmetric root and leaves
        :math:`v_j = u_j \left[(e_j - p) - \tfrac{u_0}{1 + u_0} (e_0 - p)\right]` for :math:`j \geq 1`.
        """
        p = f.softmax(-1)
        u = p.sqrt()
        shared = -p
        shared[..., 0] += 1
        shared *= (u[..., :1]) / (1 + u[..., :1])
        base = -p - shared
        for j in range(1, f.shape[-1]):
            column = base.clone()
            column[..., j] += 1
            yield column * u[..., j : j + 1]

    def hessian_diagonal(self, f: Tensor, y: Tensor) -> Tensor:
        r"""Variances :math:`p (1 - p)` of the classes; :math:`1 - p` of a sure example keeps its digits."""
        p = f.softmax(-1)
        top = p.argmax(-1, keepdim=True)
        others = p.scatter(-1, top, 0).sum(-1, keepdim=True)
        return (1 - p).scatter_(-1, top, others).mul_(p)

    def hessian_sum(self, f: Tensor, y: Tensor) -> Tensor:
        r""":math:`\mathrm{diag}(\sum_n p_n) - P^\top P`, but for the diagonal, which would lose digits."""
        p = f.softmax(-1)
        total = torch.zeros(p.shape[-1], p.shape[-1], dtype=p.dtype, device=p.device)
        add_gram_(total, [p], -1.0)
        mirror_(total)
        total.diagonal().copy_(self.hessian_diagonal(f, y).sum(0))
        return total

    def weighted_hessian_sum(self, f: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        r"""The same with :math:`\sqrt{w_n} p_n` for the rows of :math:`P`."""
        p = f.softmax(-1)
        total = torch.zeros(p.shape[-1], p.shape[-1], dtype=p.dtype, device=p.device)
        add_gram_(total, [along(weights.sqrt(), p) * p], -1.0)
        mirror_(total)
        total.diagonal().copy_((along(weights, p) * self.hessian_diagonal(f, y)).sum(0))
        return total

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """Labels by the inverse of the cumulative probabilities."""
        return _label(f.double().softmax(-1).cumsum(-1), u[..., 0])

    def sampled_gradients(self, f: Tensor, y: Tensor, num_samples: int, seed: int, offset: int) -> Iterator[Tensor]:
        """See :meth:`BaseLikelihood.sampled_gradients`; one uniform number per position."""
        probabilities, cumulative = f.softmax(-1), f.double().softmax(-1).cumsum(-1)
        for u in self._uniform(f, y, num_samples, seed, offset, each=1):
            label = _label(cumulative, u[..., 0])
            yield (probabilities - one_at(label, f)) * num_samples**-0.5

    def mean(self, f: Tensor) -> Tensor:
        """Class probabilities."""
        return f.softmax(-1)

    def at(self, f: Tensor) -> Prediction:
        """Log-probabilities of one network."""
        return (f.log_softmax(-1),)

    def of_networks(self, outputs: Tensor) -> Prediction:
        """Logarithm of the mean probabilities of several networks."""
        return (log_mean(outputs.log_softmax(-1)),)

    def diagonal_suffices(self, link_approx: LinkApprox) -> bool:
        """The probit approximation takes no covariances."""
        return link_approx is LinkApprox.PROBIT

    def integrate(
        self,
        f: Tensor,
        variance: Tensor,
        link_approx: LinkApprox,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """See :func:`laplace.likelihoods.links.softmax_link`."""
        return (softmax_link(f, variance, link_approx, n_samples, generator),)

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :func:`laplace.likelihoods.scores.log_probability_scores`."""
        return log_probability_scores(prediction[0], y)

    def confidences(self, prediction: Prediction) -> Tensor:
        """Largest probability of every term."""
        return prediction[0].detach().double().reshape(-1, prediction[0].shape[-1]).amax(1).exp()

    def monitored(self, prediction: Prediction, y: Tensor | None = None, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :meth:`BaseLikelihood.monitored`."""
        log_probs = prediction[0].detach().double().reshape(-1, prediction[0].shape[-1])
        found = {
            "entropy": torch.special.entr(log_probs.exp()).sum(1),
            "predicted": log_probs.argmax(1).double(),
        }
        return found if y is None else {**found, "label": y.flatten().double().to(log_probs.device)}

    def tuning_loss(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> float:
        """Summed negative log likelihood."""
        return float(-prediction[0].double().gather(-1, y.long()[..., None]).sum())


def _label(cumulative: Tensor, u: Tensor) -> Tensor:
    return (u[..., None] >= cumulative).sum(-1).clamp_(max=cumulative.shape[-1] - 1)
