r"""Train weights and hyperparameters together: online empirical Bayes.

Algorithm 1 of Immer et al., "Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning" (ICML
2021). Epochs of ordinary training on the negative log joint alternate with steps of Adam on the logarithms of the
prior precision and the observation noise, which climb the Laplace approximation of the evidence at the current
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader

from laplace.backends.interface import CurvatureInterface
from laplace.backends.native import NativeGGN
from laplace.data.batches import batches
from laplace.empirical_bayes import Hyperparameters, is_estimated, penalty
from laplace.enums import HessianStructure, Likelihood, PriorStructure, SubsetOfWeights, parse
from laplace.laplace import Laplace
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.named import likelihood_of
from laplace.linalg.inference import outside_inference_mode
from laplace.linalg.precision import without_kept_casts
from laplace.posterior.parametric import ParametricLaplace
from laplace.structures.sums import CurvatureSums


@outside_inference_mode()
def marglik_training(
    model: nn.Module,
    train_loader: DataLoader,
    likelihood: BaseLikelihood | Likelihood | str = Likelihood.CLASSIFICATION,
    hessian_structure: HessianStructure | str = HessianStructure.KRON,
    backend: type[CurvatureInterface] = NativeGGN,
    optimizer_cls: type[Optimizer] = Adam,
    optimizer_kwargs: dict[str, Any] | None = None,
    scheduler_cls: type[LRScheduler] | None = None,
    scheduler_kwargs: dict[str, Any] | None = None,
    n_epochs: int = 300,
    lr_hyp: float = 0.1,
    prior_structure: PriorStructure | str = PriorStructure.LAYERWISE,
    n_epochs_burnin: int = 0,
    n_hypersteps: int = 10,
    marglik_frequency: int = 1,
    prior_prec_init: float = 1.0,
    sigma_noise_init: float = 1.0,
    temperature: float = 1.0,
    fix_sigma_noise: bool = False,
    progress_bar: bool = False,
    enable_backprop: bool = False,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
) -> tuple[ParametricLaplace, nn.Module, list[float], list[float]]:
    """Optimise weights and hyperparameters jointly; this replaces ordinary training.

    The loss of the weights is torch's mean (over examples, and over outputs of a regression or positions) plus the prior over
    the number of examples, as in laplace-torch: of several outputs or positions, the prior weighs as many times more in it
    than in the negative log joint. The evidence is exact in either case.

    Args:
        model: Network that returns logits or regression means; trained in place.
        train_loader: Training batches. The examples that an epoch uses are counted, whatever the length of the data set: in
            one pass where the loader does not tell.
        likelihood: ``'classification'`` or ``'regression'``.
        hessian_structure: ``'kron'``, ``'diag'`` or ``'full'``, over all weights.
        backend: Curvature backend. The default is the native exact GGN: the same quantity as the GGN of the ASDL
            package, without needing that package.
        optimizer_cls: Optimizer of the weights.
        optimizer_kwargs: Its further arguments, such as ``lr``.
        scheduler_cls: Learning rate scheduler of the optimizer, stepped after every batch.
        scheduler_kwargs: Its further arguments.
        n_epochs: Epochs of training.
        lr_hyp: Step size of Adam on the hyperparameters.
        prior_structure: ``'scalar'``, ``'layerwise'`` or ``'diag'``; Kron takes the first two.
        n_epochs_burnin: Epochs at the start without estimates of the evidence.
        n_hypersteps: Steps on the hyperparameters for each estimate.
        marglik_frequency: Estimate after every so many epochs.
        prior_prec_init: Initial prior precision.
        sigma_noise_init: Initial observation noise (regression).
        temperature: Temperature of the likelihood, for data that is counted several times by augmentation.
        fix_sigma_noise: Keep ``sigma_noise_init`` instead of optimising it (regression).
        progress_bar: Show progress over epochs.
        enable_backprop: Make the returned posterior's predictives differentiable in their inputs.
        dict_key_x: Key of the inputs in dict-like batches.
        dict_key_y: Key of the targets in dict-like batches.

    Returns:
        The posterior with the best evidence met; the model, at its weights; the *negative* log marginal likelihood
        before every step on the hyperparameters; and the loss (negative log joint per example, in units of the
        criterion) of every epoch. Without a single estimate, the posterior is that of the last weights.

    Raises:
        ValueError: On unknown or impossible arguments, an empty loader, or when the evidence becomes NaN or Inf.
    """
    law = likelihood_of(likelihood)
    _check(law, hessian_structure, n_epochs=n_epochs, marglik_frequency=marglik_frequency, n_hypersteps=n_hypersteps)
    la = Laplace(
        model,
        law,
        SubsetOfWeights.ALL,
        hessian_structure,
        sigma_noise=sigma_noise_init,
        temperature=temperature,
        enable_backprop=enable_backprop,
        dict_key_x=dict_key_x,
        dict_key_y=dict_key_y,
        backend=backend,
    )
    la.prior_precision = la.initial_prior_precision(prior_prec_init, prior_structure)
    hyper = Hyperparameters(la, law.has_noise and not fix_sigma_noise, lr_hyp)
    optimizer = optimizer_cls(la.params, **(optimizer_kwargs or {}))
    scheduler = None if scheduler_cls is None else scheduler_cls(optimizer, **(scheduler_kwargs or {}))
    _check_steps(optimizer, scheduler)
    n_data = _count(train_loader, dict_key_y)
    best: _Best | None = None
    margliks: list[float] = []
    losses: list[float] = []
    for epoch in _epochs(n_epochs, progress_bar):
        loss, n_data = _train_epoch(la, train_loader, optimizer, scheduler, n_data)
        losses.append(loss)
        if not is_estimated(epoch, n_epochs_burnin, marglik_frequency):
            continue
        la.fit(train_loader)
        margliks += hyper.climb(n_hypersteps, epoch)
        if best is None or margliks[-1] < best.marglik:
            best = _Best.of(la, margliks[-1])
        hyper.apply()
    if best is None:
        la.fit(train_loader)
    else:
        best.restore(la)
    return la, model, margliks, losses


def _check(law: BaseLikelihood, hessian_structure: HessianStructure | str, **counts: int) -> None:
    """Refuse what cannot be trained like this."""
    if law.fitted is not law:
        raise ValueError(f"marglik_training takes likelihood='classification' or 'regression', not {law.identity!r}.")
    structure = parse(HessianStructure, hessian_structure, "hessian_structure")
    if structure.value not in ("kron", "diag", "full"):
        raise ValueError(f"marglik_training takes hessian_structure='kron', 'diag' or 'full', not {structure.value!r}.")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def _check_steps(optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Refuse what needs to be told something at every step: a closure that runs the model again, a metric."""
    for argument, stepped in (("optimizer_cls", optimizer), ("scheduler_cls", scheduler)):
        if stepped is None:
            continue
        _, *parameters = signature(type(stepped).step).parameters.values()
        asked = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if asked:
            raise ValueError(
                f"{argument}={type(stepped).__name__} asks for {', '.join(asked)} at every step, which this training has not. "
                "Take one whose step() needs nothing, such as Adam or CosineAnnealingLR."
            )


@dataclass
class _Best:
    """The best evidence so far, and all that it takes to return there."""

    marglik: float
    model_state: dict[str, Any]
    sums: CurvatureSums
    prior_precision: Tensor
    sigma_noise: Tensor

    @classmethod
    def of(cls, la: ParametricLaplace, marglik: float) -> _Best:
        state = copy.deepcopy(la.model.state_dict())
        return cls(marglik, state, la.sums, la.prior_precision.detach(), la.sigma_noise.detach())

    def restore(self, la: ParametricLaplace) -> None:
        la.model.load_state_dict(self.model_state)
        la.set_sums(self.sums)
        la.prior_precision, la.sigma_noise = self.prior_precision, self.sigma_noise


@without_kept_casts()
def _train_epoch(
    la: ParametricLaplace, loader: Iterable, optimizer: Optimizer, scheduler: LRScheduler | None, n_data: int
) -> tuple[float, int]:
    """One epoch on the mean loss and the prior's part of it; its mean, and the number of examples."""
    total, seen = 0.0, 0
    la.model.train()
    for x, y in batches(loader, la._device, la.dict_key_y):
        optimizer.zero_grad()
        loss, factor = la.likelihood_object.training_loss(la.model(x), y)
        loss = loss + penalty(la, n_data, factor)
        loss.backward()
        optimizer.step()
        total, seen = total + loss.item() * len(y), seen + len(y)
        if scheduler is not None:
            scheduler.step()
    if seen == 0:
        raise ValueError(
            "The data loader gives no batch in this epoch; an iterator is used up after one pass, give a DataLoader."
        )
    return total / seen, seen


def _count(loader: Iterable, dict_key_y: str) -> int:
    """Number of examples of an epoch: by the sampler's length where torch makes the batches of it, else by a pass."""
    if (
        isinstance(loader, DataLoader)
        and type(loader.batch_sampler) is BatchSampler
        and hasattr(loader.sampler, "__len__")
    ):
        n = len(loader.sampler)
        n = n // loader.batch_size * loader.batch_size if loader.drop_last else n
    else:
        n = sum(len(y) for _, y in batches(loader, None, dict_key_y))
    if n == 0:
        raise ValueError("The data loader is empty, so there is nothing to train on.")
    return n


def _epochs(n_epochs: int, progress_bar: bool) -> Iterable[int]:
    epochs = range(1, n_epochs + 1)
    if not progress_bar:
        return epochs
    from tqdm.auto import tqdm

    return tqdm(epochs, desc="[Training marginal likelihood]")
