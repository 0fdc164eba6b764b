"""A temperature of the logits, tuned alone, with the prior, and on top of the evidence."""

from __future__ import annotations

import json

import pytest
import torch
import tuning_cases
from torch.utils.data import DataLoader
from tuning_cases import config, log_losses, posterior, tuned

from laplace_dist import fit, load_posterior
from laplace_dist.execution.inline import Inline
from laplace_dist.recalibration import recalibrate
from laplace_dist.run import tunings
from laplace_dist.run.checkpoint import Checkpoint


def test_both_are_tuned_together_and_belong_to_the_posterior(tmp_path):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0}, recalibrate="both", skip_evaluate=False)
    result = fit(chosen.model_copy(update={"ray_address": "inline"}))
    la, (x, y) = posterior(chosen, tuning_cases.classifier(times=3.0)), tuning_cases.classes("val").tensors
    temperature, prior = la.logit_temperature, la.prior_precision.item()
    assert temperature > 1
    la.optimize_logit_temperature(DataLoader(tuning_cases.classes("val"), 16))
    assert la.logit_temperature == pytest.approx(temperature, rel=1e-9), "the core library's"
    best = float(log_losses(la, x, y).mean())
    for factor in (0.9, 1.1):
        la.logit_temperature = temperature * factor
        assert float(log_losses(la, x, y).mean()) > best
    la.logit_temperature = temperature
    alone = config(tmp_path / "prior", "classes", model_args={"times": 3.0})
    tuned(alone)
    assert best < float(log_losses(posterior(alone, tuning_cases.classifier(times=3.0)), x, y).mean())
    x, y = tuning_cases.classes("test").tensors
    assert result.metrics["laplace"]["nll"] == pytest.approx(float(log_losses(la, x, y).mean())), "as evaluated"
    assert la.prior_precision.item() == prior
    assert any("divided by the temperature" in text for text in result.notes)


def test_a_temperature_alone_keeps_the_prior_that_is_in_force(tmp_path):
    arguments = {"model_args": {"times": 3.0}}
    first, before, _ = tuned(config(tmp_path, "classes", **arguments))
    chosen = config(tmp_path, "classes", **arguments, recalibrate="temperature")
    key, manifest, said = tuned(chosen)
    assert manifest["settings"]["prior_of"] == first != key
    la = posterior(chosen, tuning_cases.classifier(times=3.0))
    prior = load_posterior(str(tmp_path), tuning_cases.classifier(times=3.0), tuned=False)
    tunings.apply_tuning(Checkpoint(str(tmp_path)), prior, first)
    assert torch.equal(la.prior_precision, prior.prior_precision) and prior.logit_temperature == 1
    assert la.logit_temperature != 1 and "temperature of the logits" in said
    assert tuned(chosen)[0] == key, "again is nothing to do"


def test_a_temperature_on_top_of_the_evidence(tmp_path):
    chosen = config(
        tmp_path,
        "classes",
        model_args={"times": 20.0},
        tune_method="marglik",
        prior_structure="layerwise",
        recalibrate="both",
    )
    key, manifest, _ = tuned(chosen)
    la = posterior(chosen, tuning_cases.classifier(times=20.0))
    first = tunings.read_tuning(Checkpoint(str(tmp_path)), manifest["settings"]["prior_of"])
    assert first[0]["settings"]["method"] == "marglik"
    assert torch.equal(la.prior_precision, first[1]) and la.logit_temperature > 1


def test_predictions_that_are_all_right_keep_the_temperature_of_one(tmp_path, monkeypatch):
    def right(split):
        x = tuning_cases.inputs(split)
        return torch.utils.data.TensorDataset(x, tuning_cases.classifier()(x).argmax(-1))

    monkeypatch.setattr(tuning_cases, "classes", right)
    chosen = config(tmp_path, "classes", recalibrate="both", prior_range=[1e24, 1e25], grid_size=2)
    _, manifest, said = tuned(chosen)
    assert manifest["logit_temperature"] == 1
    assert "No temperature is best" in said


def test_a_recalibration_of_the_temperature_keeps_the_prior_and_its_temperature_is_compared(tmp_path):
    arguments = {"model_args": {"times": 3.0}, "skip_evaluate": False, "margin_nll": 10.0, "margin_ece": 1.0}
    tuned(config(tmp_path, "classes", **arguments, window="one"))
    before = posterior(config(tmp_path, "classes"), tuning_cases.classifier(times=3.0))

    def add(what):
        chosen = config(tmp_path, "classes", **arguments, window="two", data_args={"window": 2}, recalibrate=what)
        return recalibrate(chosen, Inline)

    found = add("temperature")
    assert found.promoted, found.why
    la, (x, y) = (
        posterior(config(tmp_path, "classes"), tuning_cases.classifier(times=3.0)),
        tuning_cases.classes("test").tensors,
    )
    assert torch.equal(la.prior_precision, before.prior_precision) and la.logit_temperature > 1
    assert found.metrics["candidate"]["nll"] == pytest.approx(float(log_losses(la, x, y).mean()))
    assert found.metrics["current"]["nll"] == pytest.approx(float(log_losses(before, x, y).mean()))
    (note,) = found.notes
    assert (
        note
        == f"The logits of the candidate are divided by the temperature {la.logit_temperature:.4g}; those of MAP are not."
    )
    said = json.loads((tmp_path / "recalibration" / "two" / "decision.json").read_text())
    assert said["settings"]["recalibrate"] == "temperature"
    assert add("temperature").why == found.why, "nothing to do"
    again = add("both")
    assert again.why != found.why, "which is another question"
