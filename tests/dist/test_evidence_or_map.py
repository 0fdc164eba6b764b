"""The evidence's choice of a prior against MAP on the validation data."""

from __future__ import annotations

import io

import pytest
import torch
import tuning_cases
from torch.nn.functional import cross_entropy
from tuning_cases import config, log_losses, posterior, tuned

from laplace.likelihoods.comparison import paired_differences
from laplace.likelihoods.scores import log_probability_scores
from laplace_dist import fit
from laplace_dist.execution.inline import Inline
from laplace_dist.report.metrics import show_result
from laplace_dist.run import tunings
from laplace_dist.run.checkpoint import Checkpoint


def of_evidence(place, kind, **changes):
    return config(place, kind, tune_method="marglik", **changes)


def test_the_evidences_choice_is_compared_with_map_on_the_validation_data(tmp_path):
    """By the differences of the losses, recomputed from the posterior and the network, with the same draws."""
    chosen, model = of_evidence(tmp_path, "classes", model_args={"times": 4.0}), tuning_cases.classifier(times=4.0)
    _, manifest, said = tuned(chosen)
    la = posterior(chosen, model)
    x, y = tuning_cases.classes("val").tensors
    rows = [log_probability_scores(p, y) for p in (la(x, log_probs=True), model(x).log_softmax(-1))]
    wanted = paired_differences(*rows, draws=chosen.draws, level=chosen.level, seed=chosen.seed)
    for name, found in manifest["search"]["compared"].items():
        assert found["value"] == pytest.approx(wanted[name].value, abs=1e-9)
        assert (found["low"], found["high"]) == pytest.approx((wanted[name].low, wanted[name].high), abs=1e-9)
    assert manifest["settings"]["method"] == "marglik" and manifest["search"]["helps"] and "MAP" not in said
    assert said.count("tune: prior precision") == 1


@pytest.mark.parametrize("structure", ["scalar", "diag"])
def test_evidence_that_is_worse_than_map_is_passed_over_and_named_in_table_and_report(tmp_path, structure):
    """Labels that are as likely as the network says: whatever spreads the predictions is worse."""
    chosen = of_evidence(tmp_path, "calibrated", prior_structure=structure, skip_evaluate=False, ray_address="inline")
    chosen = chosen.model_copy(update={"data": "test_evidence_or_map:calibrated_with_test"})
    result = fit(chosen)
    manifest, prior = tunings.read_tuning(Checkpoint(chosen.checkpoint), result.tuning)
    said = manifest["search"]["said"]
    assert said[0].startswith(
        "The prior of the highest evidence is shown to be worse than MAP on the validation data (NLL"
    )
    assert "no prior precision makes this posterior better than MAP" in " ".join(said) and "To try: " in said[-1]
    assert not result.helps and prior.numel() == 1
    la = posterior(chosen, tuning_cases.classifier())
    x, y = tuning_cases.calibrated("val").tensors
    assert (log_losses(la, x, y).mean() - cross_entropy(tuning_cases.classifier()(x), y)).abs() < 1e-4
    shown = io.StringIO()
    show_result(result, "", shown)
    assert "Laplace, kept at MAP" in shown.getvalue() and said[0] in shown.getvalue()
    page = (tmp_path / "report.html").read_text()
    assert "The prior of the highest evidence is shown to be worse than MAP" in page
    assert "the NLL of the validation data, over a grid" in page and "log marginal likelihood (evidence)" not in page


def calibrated_with_test(split):
    return tuning_cases.calibrated("val" if split == "test" else split)


@pytest.mark.parametrize("structure", ["scalar", "diag"])
def test_a_regressions_evidence_is_compared_under_its_own_noise_and_map_under_the_best_of_map(tmp_path, structure):
    chosen = of_evidence(tmp_path, "line", prior_structure=structure)
    _, manifest, _ = tuned(chosen)
    la, model = posterior(chosen, tuning_cases.line()), tuning_cases.line()
    x, y = tuning_cases.points("val").tensors
    mean, variance = la(x)
    spread = variance.diagonal(dim1=-2, dim2=-1) + la.sigma_noise**2
    own = -torch.distributions.Normal(mean, spread.sqrt()).log_prob(y).mean(1)
    best = (y - model(x)).square().mean().sqrt()
    of_map = -torch.distributions.Normal(model(x), best).log_prob(y).mean(1)
    found = manifest["search"]["compared"]["nll"]
    assert found["value"] == pytest.approx((own.mean() - of_map.mean()).item(), abs=1e-8)
    assert manifest["search"]["map_noise"] == pytest.approx(best.item())


def test_without_a_validation_split_it_is_said_that_nothing_was_compared(tmp_path):
    chosen = of_evidence(tmp_path, "classes").model_copy(update={"data": "test_evidence_or_map:without_val"})
    _, manifest, said = tuned(chosen)
    assert (
        "nothing was compared with MAP, since there is no val split: --data: " in said
        and "raises AssertionError: val" in said
    )
    assert manifest.get("search") is None


def without_val(split):
    assert split != "val", split
    return tuning_cases.classes(split)


def test_a_comparison_of_the_evidence_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    wanted = tuned(of_evidence(tmp_path / "whole", "calibrated"))[1]
    chosen = of_evidence(tmp_path / "killed", "calibrated")
    deaths = 0
    while True:
        left = [deaths]

        class Deadly(Inline):
            def pool(self, *given, left=left):
                pool = super().pool(*given)
                real = pool.submit

                def submit(task):
                    left[0] -= 1
                    if left[0] < 0 and "shard" in task.what:
                        raise KeyboardInterrupt
                    real(task)

                pool.submit = submit
                return pool

        try:
            found = fit(chosen, executor=Deadly)
            break
        except KeyboardInterrupt:
            deaths += 9
            assert deaths < 500
    manifest = tunings.read_tuning(Checkpoint(chosen.checkpoint), found.tuning)[0]
    assert deaths > 9 and manifest["search"] == wanted["search"]
    assert manifest["arrays"]["prior_precision"]["sha256"] == wanted["arrays"]["prior_precision"]["sha256"]
