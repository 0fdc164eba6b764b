r"""The steps of online empirical Bayes, for whoever trains: in one process, or with gradients from many.

Algorithm 1 of Immer et al., "Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning" (ICML 2021), in
pieces: the loss of a batch, the prior's part of it, one step on the weights, and the steps on the hyperparameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from laplace.linalg.dense import parameter_vector
from laplace.linalg.precision import without_kept_casts
from laplace.posterior.parametric import ParametricLaplace


def is_estimated(epoch: int, burnin: int, frequency: int) -> bool:
    """Whether the evidence is estimated after an epoch, the first of which is 1."""
    return epoch > burnin and epoch % frequency == 0


def penalty(la: ParametricLaplace, n_data: int, factor: float) -> Tensor:
    r"""The prior's part of the training loss, :math:`\tfrac{1}{2N c}\,(\theta - \mu_0)^\top P_0\,(\theta - \mu_0)`.

    :math:`c` turns the mean of torch's loss into the mean negative log likelihood: :math:`1/T` for cross entropy,
    :math:`1/(2\sigma^2T)` for the squared error. Torch's means are over outputs and positions too; of several, the prior then
    counts as many times as there are.

    Args:
        la: Has the weights, the prior and the noise.
        n_data: Number of examples of an epoch.
        factor: From torch's mean loss to the mean negative log likelihood at unit noise and temperature.
    """
    delta = parameter_vector(la.params) - la.prior_mean
    return 0.5 * (la.prior_precision_diag * delta * delta).sum() / n_data / (factor * float(la._H_factor))


@dataclass(frozen=True)
class PartOfBatch:
    """What a part of a batch adds to a step on the weights.

    Attributes:
        loss: Torch's mean loss over the part.
        factor: As of :func:`penalty`.
        gradient: Of the loss, in the order of the parameter vector.
        n: Number of examples.
    """

    loss: float
    factor: float
    gradient: Tensor
    n: int


@without_kept_casts()
def part_of_batch(la: ParametricLaplace, x: Any, y: Tensor, seed: int) -> PartOfBatch:
    """The loss of a part of a batch, as training sees it, and its gradient at the model's weights.

    Args:
        la: Over the model.
        x: Inputs.
        y: Targets.
        seed: Of dropout and the like in this part; the global generators are left as they were.
    """
    devices = [la._device] if la._device.type == "cuda" else []
    before = la.model.training
    la.model.train()
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(seed)
            loss, factor = la.likelihood_object.training_loss(la.model(x), y)
            gradients = torch.autograd.grad(loss, la.params, allow_unused=True)
    finally:
        la.model.train(before)
    flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, la.params, strict=True)]
    return PartOfBatch(loss.item(), factor, torch.cat(flat).detach().to(la._dtype), len(y))


def step(la: ParametricLaplace, optimizer: Optimizer, parts: Sequence[PartOfBatch], n_data: int) -> float:
    """One step on the weights from the parts of a batch, added up in their order in float64; returns the batch's loss.

    Up to rounding it is the step on the mean loss of the whole batch, of a likelihood whose examples have one term each, or
    equally many.
    """
    n = sum(part.n for part in parts)
    total = torch.zeros(len(parts[0].gradient), dtype=torch.float64)
    for part in parts:
        total += part.gradient.double() * (part.n / n)
    optimizer.zero_grad()
    prior = penalty(la, n_data, parts[0].factor)
    prior.backward()
    for p, gradient in zip(la.params, total.split([p.numel() for p in la.params]), strict=True):
        p.grad += gradient.view_as(p).to(p)
    optimizer.step()
    return math.fsum(part.loss * (part.n / n) for part in parts) + prior.item()


def set_weights(la: ParametricLaplace, vector: Tensor) -> None:
    """Give the model a parameter vector, whatever the types of its parameters."""
    with torch.no_grad():
        for p, part in zip(la.params, vector.split([p.numel() for p in la.params]), strict=True):
            p.copy_(part.view_as(p))


def refuse_changing_buffers(model: nn.Module, x: Any) -> None:
    """Refuse a model that keeps statistics of its batches, since those of parts of a batch are other ones.

    Raises:
        ValueError: Naming the buffers that a forward pass in training mode has changed; they are put back.
    """
    before = {name: value.clone() for name, value in model.named_buffers()}
    mode = model.training
    model.train()
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            model(x)
        changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
        for name, value in model.named_buffers():
            value.copy_(before[name])
    finally:
        model.train(mode)
    if changed:
        raise ValueError(
            f"The model changes its buffers while it trains ({', '.join(changed[:4])}): statistics of a part of a batch, as "
            "batch norm keeps them, are not those of the batch. Use layer or group norm, or train in one "
            "process with laplace.marglik_training."
        )


class Hyperparameters:
    """Logarithms of prior precision and observation noise, and the optimizer that climbs the evidence with them.

    Args:
        la: The posterior; they start from its own values.
        with_noise: Climb the observation noise too.
        lr: Step size of Adam.
    """

    def __init__(self, la: ParametricLaplace, with_noise: bool, lr: float):
        """See the class."""
        self.la = la
        start = [la.prior_precision, la.sigma_noise] if with_noise else [la.prior_precision]
        self.logs = [value.detach().log().requires_grad_(True) for value in start]
        self.optimizer = Adam(self.logs, lr=lr)

    def climb(self, n_steps: int, epoch: int) -> list[float]:
        """Take steps; the posterior is left with the values of the last estimate. Returns the negative evidences.

        Raises:
            ValueError: If an evidence or its gradient is NaN or Inf, or a step leads to a prior precision or noise of 0 or Inf.
        """
        estimates, less = [], "Lower lr_hyp or the step size of the optimizer, or start from other hyperparameters."
        for _ in range(n_steps):
            self.optimizer.zero_grad()
            loss = -self.la.log_marginal_likelihood(*[log.exp() for log in self.logs])
            loss.backward()
            if not all(bool(torch.isfinite(value).all()) for value in (loss, *(log.grad for log in self.logs))):
                raise ValueError(
                    f"The log marginal likelihood is {-loss.item()} after epoch {epoch}, and it or its gradient is not finite. "
                    f"{less}"
                )
            self.optimizer.step()
            estimates.append(loss.item())
            if not all(bool(((value := log.exp()) > 0).all() and torch.isfinite(value).all()) for log in self.logs):
                raise ValueError(
                    f"A step on the hyperparameters after epoch {epoch} leads to a prior precision or observation noise of 0 "
                    f"or Inf. {less}"
                )
        return estimates

    def apply(self) -> None:
        """Give the posterior the current values, detached."""
        self.la.prior_precision = self.logs[0].detach().exp()
        if len(self.logs) > 1:
            self.la.sigma_noise = self.logs[1].detach().exp()

    def state_dict(self) -> dict[str, Any]:
        """The logarithms, the optimizer's state, and the values that the posterior has."""
        return {
            "logs": [log.detach().clone() for log in self.logs],
            "optimizer": self.optimizer.state_dict(),
            "prior_precision": self.la.prior_precision.detach().clone(),
            "sigma_noise": self.la.sigma_noise.detach().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and give the posterior its values."""
        with torch.no_grad():
            for log, value in zip(self.logs, state["logs"], strict=True):
                log.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.la.prior_precision = state["prior_precision"]
        self.la.sigma_noise = state["sigma_noise"]
