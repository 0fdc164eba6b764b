"""Losses of many prior precisions, temperatures and noises on validation data, in one pass over it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace import predictive
from laplace.capture.evaluation import eval_mode
from laplace.enums import LinkApprox, PredType, parse
from laplace.fitted import Fitted
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.checks import check_scored_finite
from laplace.likelihoods.predictive import Prediction
from laplace.linalg.precision import widened
from laplace.search import vertex

_SWEEP = 1 << 24  # elements of the covariances of one sweep over priors
_GRID = 1 << 26  # elements of the variances of one sweep; every further one takes all backward passes again
MAP = None  # in place of a prior's number


@dataclass(frozen=True)
class Scores:
    """What one pass over validation data tells about candidates; those of parts of the data add up.

    Attributes:
        totals: Summed losses ``(priors, columns)``, float64. A column for each temperature; or where the observation noise is
            left open, the two that :func:`profile_noise` takes.
        map_totals: The same of the MAP, ``(columns,)``.
        n: Number of terms: examples, or examples times outputs or positions.
        examples: If asked for, scores per term by name, ``(priors · temperatures + 1, terms)``; those of the MAP, at
            temperature 1, come last.
        fixed: No prior precision, one that was not scored neither, changes any of the predictions.
    """

    totals: Tensor
    map_totals: Tensor
    n: int
    examples: dict[str, Tensor]
    fixed: bool = False


@torch.no_grad()
def score_candidates(
    la: Fitted,
    loader: Iterable,
    priors: Sequence[float] | None = None,
    temperatures: Sequence[float] = (1.0,),
    *,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    seed: int = 0,
    keep: bool = False,
    open_noise: bool = False,
    progress_bar: bool = False,
    offset: int = 0,
) -> Scores:
    r"""Score every pair of a prior precision and a temperature of the logits, and the MAP, in one pass over the data.

    With ``open_noise``, for a regression under ``pred_type='glm'``, a candidate :math:`\lambda` stands for the
    prior precisions :math:`\delta = \lambda / \sigma^2`, under which the predictive variance is
    :math:`\sigma^2 (1 + v_\lambda)` with :math:`v_\lambda = J (H + \lambda)^{-1} J^\top`, and the best noise is a closed form.

    Args:
        la: A fitted posterior; left as it is.
        loader: Validation batches.
        priors: Scalar prior precisions; the posterior's own, whatever its structure, if not given.
        temperatures: Of the logits; not for a regression.
        link_approx: Link of the GLM predictive.
        pred_type: ``'glm'`` or ``'nn'``.
        n_samples: Samples of predictives that draw any.
        seed: Of these samples; all candidates see the same draws.
        keep: Keep the scores of every term.
        open_noise: Leave the observation noise open.
        progress_bar: Show progress over batches.
        offset: Index of the first example in the data set, for messages.

    Raises:
        NonFiniteError: If an output of the network is NaN or Inf; names the examples.
        ValueError: If the loader is empty, or targets do not fit the predictions.
    """
    la._check_weights()
    law, noise = la.likelihood_object.fitted, la.sigma_noise
    precisions = [la.prior_precision] if priors is None else torch.tensor(priors, dtype=torch.float64)
    tally = _Tally(law, None if open_noise else float(noise), len(precisions), temperatures, keep, offset)
    if open_noise:
        la.sigma_noise = 1.0
    try:
        for x, y in parts(la, loader, progress_bar):
            arguments = precisions, link_approx, pred_type, n_samples, seed, tally.temperatures
            tally.add(sweep(la, x, *arguments, offset=tally.examples), y)
    finally:
        la.sigma_noise = noise
    return tally.scores()


class _Tally:
    """Running totals of candidates, and the scores of every term if they are kept.

    Args:
        law: The likelihood.
        noise: Observation noise; None leaves it open.
        priors: How many there are.
        temperatures: Those whose losses are added up.
        keep: Keep the scores of every term.
        offset: Index of the first example in the data set.

    Attributes:
        temperatures: Those that predictions are needed at, 1 among them, at which the MAP's scores are kept.
    """

    def __init__(
        self,
        law: BaseLikelihood,
        noise: float | None,
        priors: int,
        temperatures: Sequence[float],
        keep: bool,
        offset: int,
    ) -> None:
        self.law, self.noise, self.keep = law, noise, keep
        self.temperatures = [1.0] if noise is None else list(dict.fromkeys((*temperatures, 1.0)))
        self.columns = 2 if noise is None else len(temperatures)
        self.totals = torch.zeros(priors, self.columns, dtype=torch.float64)
        self.map_totals = torch.zeros(self.columns, dtype=torch.float64)
        self.n, self.examples, self.fixed = 0, offset, True
        self.rows: dict[str, list[list[Tensor]]] = {}

    def add(self, predictions: Iterable[tuple[int | None, int, Prediction, bool]], y: Tensor) -> None:
        """Add a batch, of which the predictions are as :func:`sweep` gives them."""
        found: dict[tuple[float, int], dict[str, Tensor]] = {}
        for number, (index, t, prediction, moves) in enumerate(predictions):
            if number == 0:
                self.law.check_scored(prediction, y, self.examples)
            self.fixed = self.fixed and not moves
            scores = self._add_one(index, t, prediction, y)
            if scores is not None:
                found[(math.inf if index is MAP else index, t)] = scores
        for name in next(iter(found.values())) if found else ():
            self.rows.setdefault(name, []).append([found[key][name].cpu() for key in sorted(found)])
        self.n, self.examples = self.n + y.numel(), self.examples + len(y)

    def _add_one(self, index: int | None, t: int, prediction: Prediction, y: Tensor) -> dict[str, Tensor] | None:
        """Add one prediction; returns its scores where they are kept."""
        row = self.map_totals if index is MAP else self.totals[index]
        if self.noise is None:
            terms = self.law.free_noise_terms(prediction, y)
            row += torch.stack([terms[name].sum().cpu() for name in ("spread", "error")])
            return {name: values.mean(1) for name, values in terms.items()} if self.keep else None
        counts = t < self.columns
        if counts:
            row[t] += self.law.tuning_loss(prediction, y, self.noise)
        kept = self.keep and (counts if index is not MAP else self.temperatures[t] == 1)
        return self.law.scores(prediction, y, self.noise) if kept else None

    def scores(self) -> Scores:
        """What was added up, or a refusal of no data."""
        if self.n == 0:
            raise ValueError("The validation data is empty.")
        examples = {
            name: torch.cat([torch.stack(batch) for batch in batches], 1) for name, batches in self.rows.items()
        }
        return Scores(self.totals, self.map_totals, self.n, examples, self.fixed)


def profile_noise(totals: Tensor, n: int) -> tuple[Tensor, Tensor]:
    r"""Mean loss per term under the best observation noise, and that noise, of candidates ``(…, 2)``.

    From :math:`S = \sum \log(1 + v)` and :math:`E = \sum (y - f)^2 / (1 + v)` over :math:`n` values it is
    :math:`\sigma^2 = E / n`, where the mean loss is :math:`\tfrac12 (S / n + \log(2 \pi \sigma^2) + 1)`.
    """
    spread, variance = totals[..., 0] / n, totals[..., 1] / n
    return (spread + (2 * math.pi * variance).log() + 1) / 2, variance.sqrt()


def loss_under_noise(spread: Tensor, error: Tensor, noise: float) -> Tensor:
    r"""Loss of every term under an observation noise, from :math:`\log(1 + v)` and :math:`(y - f)^2 / (1 + v)`."""
    return (spread + error / noise**2 + math.log(2 * math.pi * noise**2)) / 2


def lowest_over_temperatures(losses: Tensor) -> Tensor:
    """The lowest loss of every row, by :func:`laplace.search.vertex`; columns are evenly spaced logarithms of temperatures."""
    places = list(range(losses.shape[-1]))
    return torch.tensor([vertex(places, row.tolist())[1] for row in losses], dtype=torch.float64)


def parts(la: Fitted, loader: Iterable, progress_bar: bool) -> Iterator[tuple[Any, Tensor]]:
    """Batches in the parts in which they are captured."""
    for x, y in la._batches(loader, progress_bar, "Scoring prior precisions"):
        la._check_inputs(x)
        yield from ((inputs, targets) for _, inputs, targets in la._parts(x, y, every_output=True))


def sweep(
    la: Fitted,
    x: Any,
    grid: Sequence[Tensor],
    link_approx: LinkApprox | str,
    pred_type: PredType | str,
    n_samples: int,
    seed: int,
    temperatures: Sequence[float] = (1.0,),
    *,
    spread: bool = True,
    diagonal: bool = True,
    with_map: bool = True,
    offset: int = 0,
) -> Iterator[tuple[int | None, int, Prediction, bool]]:
    """The likelihood's predictions for every prior precision and temperature, one forward and backward pass in all.

    Yields the prior's number, :data:`MAP` for the MAP, the temperature's, the prediction, and whether other prior precisions
    may give another one. With the outputs alone where a prior precision does not change their mean, unless ``spread`` asks for
    their variances: covariances of the linearised network's outputs, but for ``diagonal``.

    Raises:
        NonFiniteError: If an output of the network is NaN or Inf; names the examples, counted from ``offset``.
    """
    pred_type, link_approx = parse(PredType, pred_type, "pred_type"), parse(LinkApprox, link_approx, "link_approx")
    predictive.check_combination(la, pred_type, link_approx)
    law = la.likelihood_object.fitted
    own = la.prior_precision
    priors = [value if value is own else value.reshape(-1).to(la._device, la._dtype) for value in grid]
    if pred_type is PredType.NN:
        outputs = predictive.map_outputs(la, x)
        check_scored_finite("The model's output", outputs, offset)
        if with_map:
            yield from ((MAP, t, law.at(outputs / value), False) for t, value in enumerate(temperatures))
        yield from _sweep_networks(la, x, priors, n_samples, seed, temperatures)
        return
    capture = la.backend.capture(x)
    check_scored_finite("The model's output", capture.f, offset)
    if with_map:
        outputs = widened(capture.f)
        yield from ((MAP, t, law.at(outputs / value), False) for t, value in enumerate(temperatures))
    if not (law.grid_needs_variance or spread):
        yield from ((index, 0, (capture.f,), False) for index in range(len(grid)))
        return
    diagonal = law.diagonal_suffices(link_approx) or (diagonal and law.predicts_outputs)
    moves = False
    for index, variance in enumerate(_variances(la, capture, priors, diagonal)):
        if index == 0:  # outputs without a variance have none under any prior
            moves = law.moves(capture.f, variance, link_approx)
        for t, value in enumerate(temperatures):
            generator = torch.Generator(la._device).manual_seed(seed)
            f, spread_of = (capture.f, variance) if value == 1 else (capture.f / value, variance / value**2)
            yield index, t, law.integrate(f, spread_of, link_approx, n_samples, generator), moves


def _variances(la: Fitted, capture: Any, priors: list[Tensor], diagonal: bool) -> Iterator[Tensor]:
    """Variances of the outputs, or their covariances, of every prior; of many scalar ones most are interpolated."""
    outputs = capture.f[0].numel()
    several = diagonal and len(priors) > 1 and all(prior.numel() == 1 for prior in priors)
    step = max(1, (_GRID if several else _SWEEP) // (len(capture.f) * outputs * (1 if diagonal else outputs)))
    for i in range(0, len(priors), step):
        part = priors[i : i + step]
        with eval_mode(la.backend.model):
            if several:
                found = la._grid_variance(capture, [float(prior) for prior in part])
            else:
                found = la._glm_variance(capture, part, diagonal)
        yield from found.detach()


def _sweep_networks(la, x: Any, priors, n_samples: int, seed: int, temperatures):
    law, before = la.likelihood_object.fitted, la.prior_precision
    try:
        for index, prior in enumerate(priors):
            la.prior_precision = prior
            generator = torch.Generator(la._device).manual_seed(seed)
            outputs = widened(predictive.sampled_outputs(la, x, n_samples, generator))
            yield from ((index, t, law.of_networks(outputs / value), True) for t, value in enumerate(temperatures))
    finally:
        la.prior_precision = before
