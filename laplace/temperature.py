"""Temperature scaling of the logits of a predictive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from laplace import search
from laplace.enums import LinkApprox, PredType
from laplace.fitted import Fitted
from laplace.linalg.inference import outside_inference_mode
from laplace.scoring import score_candidates

TEMPERATURES = search.Lattice(-1.0, 1.0, 201, floor=-4.0, ceiling=4.0, reach=1.0, tolerance=1e-9)


@outside_inference_mode()
def optimize_logit_temperature(
    la: Fitted,
    val_loader: Iterable,
    pred_type: PredType | str = PredType.GLM,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    progress_bar: bool = False,
) -> None:
    r"""Set ``la.logit_temperature`` to the :math:`T` under which the negative log likelihood of validation data is the lowest.

    Temperature scaling (Guo et al., "On calibration of modern neural networks", ICML 2017) of the predictive: that of the
    network whose logits are :math:`f / T`. Without variance the loss is convex in :math:`1 / T`; with it, it need not be. So
    it is scored on a grid of :math:`\log T`, coarse first, then fine around the best value, each in one pass over the data; a
    parabola through the last three values gives the rest. The prior precision stays as it is.

    Args:
        la: A fitted posterior whose outputs are logits.
        val_loader: Validation batches.
        pred_type: Predictive to score, ``'glm'`` or ``'nn'``.
        link_approx: Link of the GLM predictive.
        n_samples: Samples of predictives that draw any; all temperatures see the same ones.
        progress_bar: Show progress.

    Raises:
        ValueError: If the outputs are no logits, ``val_loader`` is empty, or the loss has no lowest point.
    """
    la._check_fitted()
    if not la.likelihood_object.scales_logits:
        raise ValueError(f"{la.likelihood_object.identity} has no logits that a temperature could divide.")
    done: list[search.Scored] = []
    while not isinstance(step := search.next_step(TEMPERATURES, done), search.Found):
        values = [TEMPERATURES.value(i) for i in step.indices]
        scores = score_candidates(
            la,
            val_loader,
            None,
            values,
            link_approx=link_approx,
            pred_type=pred_type,
            n_samples=n_samples,
            progress_bar=progress_bar,
        )
        done.append(search.Scored(step, tuple((scores.totals[0] / scores.n).tolist())))
    if step.where != "inside":
        raise ValueError(
            f"The loss has no lowest point between the temperatures {TEMPERATURES.value(min(search.scores_of(done))):.3g} and "
            f"{TEMPERATURES.value(max(search.scores_of(done))):.3g}: the predictions are right, or wrong, about every example, "
            "or do not depend on the temperature. Nothing was changed."
        )
    la.logit_temperature = best_temperature(done)


def best_temperature(done: Sequence[search.Scored]) -> float:
    """The temperature at the vertex of the parabola through the best value of a finished search and its neighbours."""
    fine = search.scores_of([scored for scored in done if not scored.round.coarse])
    index, _ = search.vertex(list(fine), list(fine.values()))
    return TEMPERATURES.value(index)
