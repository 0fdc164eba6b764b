"""Searches on validation data in jobs: against closed forms, on beyond the range they begin with, and never worse than MAP."""

from __future__ import annotations

import io
import json
import math

import dist_cases
import numpy as np
import pytest
import torch
import tuning_cases
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tuning_cases import config

from laplace.likelihoods.comparison import paired_differences
from laplace.likelihoods.scores import log_probability_scores
from laplace_dist import fit, load_posterior
from laplace_dist.config.command_line import load_config
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.execution.inline import Inline
from laplace_dist.plan.segments import plan_shards
from laplace_dist.recalibration import recalibrate
from laplace_dist.report.metrics import show_result
from laplace_dist.run import tunings
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.rounds import some

STEP = 10**0.2  # of the default lattice


def tuned(chosen, **job):
    """Carry out fit and tuning; returns the key, the manifest, and what was said."""
    said = []
    with dist_cases.inline_job(chosen) as work:
        work.say = said.append
        work.open()
        work.map()
        key = work.tune(work.reduce())
    return key, tunings.read_tuning(Checkpoint(chosen.checkpoint), key)[0], "\n".join(said)


def posterior(chosen, model):
    return load_posterior(chosen.checkpoint, model)


def log_losses(la, x, y):
    return -la(x, log_probs=True).gather(1, y[:, None])[:, 0]


# ------------------------------------------------------------------ regression


def marginal(x, y, line, prior, noise):
    """Mean negative log likelihood of validation points under Bayesian linear regression, by dense algebra in numpy."""
    train = tuning_cases.points("train").tensors[0].numpy()
    covariance = np.linalg.inv(train.T @ train / noise**2 + prior * np.eye(train.shape[1]))
    variance = np.einsum("ni,ij,nj->n", x, covariance, x)[:, None] + noise**2
    return float(np.mean((y - x @ line.T) ** 2 / variance + np.log(2 * np.pi * variance)) / 2)


def test_a_linear_gaussian_models_prior_and_noise_are_the_best_of_all(tmp_path):
    chosen = config(tmp_path, "line")
    _, manifest, said = tuned(chosen)
    la = posterior(chosen, tuning_cases.line())
    x, y = (t.numpy() for t in tuning_cases.points("val").tensors)
    line = tuning_cases.line().weight.detach().numpy()

    def best_noise(log_ratio):  # of the prior precision to that of the noise
        loss = lambda u: marginal(x, y, line, 10**log_ratio / 10 ** (2 * u), 10**u)  # noqa: E731
        return minimize_scalar(loss, bounds=(-3, 2), method="bounded", options={"xatol": 1e-10})

    lattice = np.arange(-8, 8.01, 0.2)
    ratio = min(lattice, key=lambda value: best_noise(value).fun)
    noise = 10 ** best_noise(ratio).x
    assert la.sigma_noise.item() == pytest.approx(noise, rel=1e-5)
    assert la.prior_precision.item() == pytest.approx(10**ratio / noise**2, rel=1e-5)
    assert 0.2 < noise < 0.5 and -4 < ratio < 4
    again = marginal(x, y, line, la.prior_precision.item(), la.sigma_noise.item())
    fine = [loss for scored in manifest["search"]["rounds"] if not scored["coarse"] for loss in scored["losses"]]
    assert min(fine) == pytest.approx(again, rel=1e-7), "of 41 values most are interpolated, to 2e-5 of the variance"
    of_map = math.sqrt(float(np.mean((y - x @ line.T) ** 2)))
    assert manifest["search"]["map_noise"] == pytest.approx(of_map)
    assert manifest["search"]["rounds"][0]["map"] == pytest.approx((math.log(2 * math.pi * of_map**2) + 1) / 2)
    assert manifest["search"]["limit"] is None and manifest["search"]["helps"]
    assert f"observation noise {noise:.4g}" in said
    drawn = dict(tunings.curve(manifest))
    assert min(drawn, key=drawn.get) == pytest.approx(la.prior_precision.item())


def test_the_table_says_which_noise_it_is_of(tmp_path, capsys):
    chosen = config(tmp_path, "line", skip_evaluate=False)
    result = fit(chosen.model_copy(update={"ray_address": "inline"}))
    (text,) = [text for text in result.notes if "noise" in text]
    la = posterior(chosen, tuning_cases.line())
    assert (
        text == f"The NLL of MAP and of Laplace is that under the tuned observation noise, {la.sigma_noise.item():.4g}."
    )
    x, y = tuning_cases.points("test").tensors
    truth = -torch.distributions.Normal(tuning_cases.line()(x), la.sigma_noise).log_prob(y).mean()
    assert result.metrics["map"]["nll"] == pytest.approx(float(truth))


def test_a_noise_that_was_not_tuned_is_said(tmp_path):
    chosen = config(tmp_path, "line", skip_evaluate=False, skip_tune=True, ray_address="inline")
    result = fit(chosen)
    assert result.notes == (
        "The NLL of MAP and of Laplace is that under an observation noise that nobody has tuned, 1.",
    )
    x, y = tuning_cases.points("test").tensors
    truth = -torch.distributions.Normal(tuning_cases.line()(x), 1.0).log_prob(y).mean()
    assert result.metrics["map"]["nll"] == pytest.approx(truth.item())


def test_sampled_networks_are_evaluated_under_a_noise_that_was_tuned(tmp_path):
    chosen = config(tmp_path, "line", pred_type="nn")
    tuned(chosen)
    assert 0.2 < posterior(chosen, tuning_cases.line()).sigma_noise.item() < 0.5


def test_noises_of_every_output_are_tuned_by_their_common_factor(tmp_path):
    chosen = config(tmp_path, "line", likelihood="tuning_cases:two_noises", skip_evaluate=False, ray_address="inline")
    result = fit(chosen)
    la = posterior(chosen, tuning_cases.line())
    x, y = tuning_cases.points("test").tensors
    mean, covariance = la(x)
    deviation = (covariance.diagonal(dim1=1, dim2=2) + (la.sigma_noise * torch.tensor([0.3, 1.2])) ** 2).sqrt()
    truth = -torch.distributions.Normal(mean, deviation).log_prob(y).mean()
    assert result.metrics["laplace"]["nll"] == pytest.approx(truth.item())
    assert la.sigma_noise.item() != 1 and result.helps


# ------------------------------------------------------------------ far outside, limits, and MAP


@pytest.mark.parametrize("power", [-5, 0, 5])
def test_a_prior_far_outside_the_range_at_the_start_is_found(tmp_path, power):
    """With inputs s times larger and weights s times smaller the best prior precision is s squared times larger."""
    found = []
    for size in (1.0, 10.0**power):
        arguments = {"model_args": {"size": size, "times": 3.0}, "data_args": {"size": size}}
        chosen = config(tmp_path / f"{size}", "classes", **arguments)
        _, manifest, _ = tuned(chosen)
        assert manifest["search"]["limit"] is None and manifest["search"]["helps"]
        found.append(posterior(chosen, tuning_cases.classifier(size, 3.0)).prior_precision.item())
    assert 0.01 < found[0] < 100
    assert found[1] / found[0] == pytest.approx(10.0 ** (2 * power), rel=1e-6)


def test_the_chosen_prior_is_the_best_of_a_scan(tmp_path):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0})
    tuned(chosen)
    la, (x, y) = posterior(chosen, tuning_cases.classifier(times=3.0)), tuning_cases.classes("val").tensors
    prior, losses = la.prior_precision.item(), []
    for power in (-1, 0, 1):
        la.prior_precision = prior * STEP**power
        losses.append(float(log_losses(la, x, y).mean()))
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_where_no_prior_helps_the_limit_is_kept_and_named(tmp_path):
    chosen = config(tmp_path, "calibrated", skip_evaluate=False, ray_address="inline")
    result = fit(chosen)
    search = tunings.read_tuning(Checkpoint(str(tmp_path)), result.tuning)[0]["search"]
    assert (search["limit"], search["helps"]) == ("MAP", False)
    la, (x, y) = posterior(chosen, tuning_cases.classifier()), tuning_cases.calibrated("val").tensors
    of_map = cross_entropy(tuning_cases.classifier()(x).detach(), y)
    assert float(log_losses(la, x, y).mean()) == pytest.approx(float(of_map), abs=1e-4)
    losses = []
    for prior in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0):  # and that is right
        la.prior_precision = prior
        losses.append(float(log_losses(la, x, y).mean() - of_map))
    assert losses == sorted(losses, reverse=True) and losses[0] > 1e-4 and losses[-1] > -1e-9, losses
    assert not result.helps
    said, out = " ".join(result.notes), io.StringIO()
    show_result(result, "", out)
    assert "Laplace, kept at MAP" in out.getvalue() and result.notes[-1] in out.getvalue()
    assert "no prior precision makes this posterior better than MAP" in said
    assert "To try: --subset-of-weights last_layer; --hessian-structure kron or diag; --recalibrate both" in said


@pytest.mark.parametrize(
    ("kind", "changes", "rounds"),
    [
        ("classes", {"model_args": {"times": 0.0}}, 1),  # zero logits stay so under any variance, by the probit link
        ("classes", {"model_args": {"times": 0.0}, "recalibrate": "both"}, None),
        ("classes", {"model": "tuning_cases:constant", "link_approx": "mc"}, 2),
        ("line", {"model_args": {"outputs": 2}, "model": "tuning_cases:constant"}, 1),  # its noise is open
    ],
)
def test_a_loss_that_does_not_depend_on_the_prior_is_said_to_be_so_at_once(tmp_path, kind, changes, rounds):
    _, manifest, said = tuned(config(tmp_path, kind, **changes))
    assert "The loss does not depend on the prior" in said and "so large" not in said
    search = manifest["search"]
    assert (search["limit"], search["helps"]) == ("MAP", False)
    assert rounds in (None, len(search["rounds"]))


def compared_with_map(la, model, x, y):
    scores = log_probability_scores(la(x, log_probs=True), y), log_probability_scores(model(x).log_softmax(-1), y)
    return paired_differences(*scores)


def test_a_prior_that_helps_one_figure_and_harms_the_other_is_passed_over(tmp_path):
    chosen = config(tmp_path, "outliers")
    _, manifest, said = tuned(chosen)
    model, (x, y) = tuning_cases.slope(), tuning_cases.outliers("val").tensors
    la = posterior(chosen, model)
    found = compared_with_map(la, model, x, y)
    assert found["nll"].low <= 1e-4 and found["ece"].low <= 1e-4
    assert manifest["search"]["limit"] == "MAP" or found["nll"].value < -1e-4
    rounds = [scored for scored in manifest["search"]["rounds"] if not scored["coarse"]]
    best = min(
        (loss, prior) for scored in rounds for prior, loss in zip(scored["priors"], scored["losses"], strict=True)
    )
    la.prior_precision = best[1]
    harmed = compared_with_map(la, model, x, y)
    assert harmed["nll"].high < 0 and harmed["ece"].low > 1e-4, "else this tests nothing"
    assert best[0] < rounds[0]["map"]
    assert "worse than MAP" in said


def test_where_every_prior_is_worse_in_a_figure_the_limit_is_looked_for(tmp_path, monkeypatch):
    """The bootstrap is asked for something that no value of the search meets."""
    monkeypatch.setattr("laplace_dist.stages.tune.not_worse", lambda found, tolerance: False)
    chosen = config(tmp_path, "outliers")
    _, manifest, said = tuned(chosen)
    assert (manifest["search"]["limit"], manifest["search"]["helps"]) == ("MAP", False)
    model, (x, y) = tuning_cases.slope(), tuning_cases.outliers("val").tensors
    found = compared_with_map(posterior(chosen, model), model, x, y)
    assert abs(found["nll"].value) <= 1e-6 and abs(found["ece"].value) < 1e-4
    assert "Kept is the limit in which the predictive is MAP's" in said and "ECE by" in said


def test_the_bridge_has_no_limit_that_is_map(tmp_path):
    chosen = config(tmp_path, "calibrated", link_approx="bridge")
    _, manifest, said = tuned(chosen)
    assert manifest["search"]["limit"] != "MAP"


@pytest.mark.parametrize(("bounds", "edge"), [([1e-3, 1e-2], 1e-2), ([1e3, 1e4], 1e3)])
def test_a_range_that_is_given_is_not_left(tmp_path, bounds, edge):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0}, prior_range=bounds)
    _, manifest, said = tuned(chosen)
    priors = [prior for scored in manifest["search"]["rounds"] for prior in scored["priors"]]
    found = posterior(chosen, tuning_cases.classifier(times=3.0)).prior_precision.item()
    assert bounds[0] * (1 - 1e-9) <= min(priors) and max(priors) <= bounds[1] * (1 + 1e-9)
    assert manifest["search"]["limit"] == "edge" and found == pytest.approx(edge)
    assert f"lies at an end of --prior-range {bounds[0]:g} {bounds[1]:g}" in said


def test_a_range_in_which_all_is_worse_than_map_is_left_and_that_is_said(tmp_path):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0}, prior_range=[1e-9, 1e-7])
    _, manifest, said = tuned(chosen)
    la, model = posterior(chosen, tuning_cases.classifier(times=3.0)), tuning_cases.classifier(times=3.0)
    assert la.prior_precision.item() > 1e-6
    assert "It lies outside --prior-range 1e-09 1e-07, where all are worse" in said
    x, y = tuning_cases.classes("val").tensors
    found = compared_with_map(la, model, x, y)
    assert found["nll"].value < 0 and found["ece"].low <= 1e-4
    assert manifest["search"]["compared"]["nll"]["value"] == pytest.approx(found["nll"].value)
    la.prior_precision = 1e-7
    worse = compared_with_map(la, model, x, y)
    assert max(difference.low for difference in worse.values()) > 1e-4


def test_losses_that_are_not_finite_end_the_run_with_a_reason(tmp_path, monkeypatch):
    chosen = config(tmp_path, "classes")
    broken = lambda self, prediction, y, noise=1.0: math.nan  # noqa: E731
    monkeypatch.setattr("laplace.likelihoods.categorical.Categorical.tuning_loss", broken)
    with pytest.raises(RunFailed, match="No value that was tried has a finite score"):
        tuned(chosen)


# ------------------------------------------------------------------ temperature


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


# ------------------------------------------------------------------ as jobs


def searched(url):
    store = Checkpoint(str(url))
    (key,) = [key for key in store.list("tuning", recursive=False) if key.endswith(".json")]
    manifest, prior = tunings.read_tuning(store, key)
    return key, {name: manifest[name] for name in ("search", "shards", "settings", "logit_temperature")}, prior


def test_a_search_killed_in_the_middle_of_a_round_goes_on_to_the_same_bits(tmp_path):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0}, recalibrate="both")
    tuned(chosen)
    key, manifest, prior = searched(tmp_path)
    folder = (tmp_path / key).with_suffix("")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    last = max(int(name.split("-")[0][1:]) for name in kept)
    assert last >= 2
    gone = {name for name in kept if name.startswith(f"r{last}-")} | {
        next(n for n in sorted(kept) if n.startswith("r1-"))
    }
    for name in gone:
        (folder / name).unlink()
    (tmp_path / key).unlink()
    (tmp_path / "CURRENT.json").unlink()
    tuned(chosen)
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert {name for name in kept if kept[name] != now[name]} == gone
    again = searched(tmp_path)
    assert again[:2] == (key, manifest) and torch.equal(again[2], prior)


def test_scores_of_another_round_are_noticed(tmp_path):
    chosen = config(tmp_path, "classes")
    key, _, _ = tuned(chosen)
    store, shard = Checkpoint(str(tmp_path)), f"{key.removesuffix('.json')}/r0-000000.json"
    from laplace_dist.run.checkpoint import open_json
    from laplace_dist.storage.sealed_json import seal_json

    values = open_json(store.read(shard), shard)
    scores = json.loads(values["scores"])
    store.replace(shard, seal_json({**values, "scores": json.dumps({**scores, "priors": scores["priors"][::-1]})}))
    (tmp_path / key).unlink()
    (tmp_path / "CURRENT.json").unlink()
    with pytest.raises(CheckpointError, match="r0-000000.json is altered: its scores are not those of this grid"):
        tuned(chosen)


def test_workers_of_a_cluster_find_the_same_bits(tmp_path, cluster):
    arguments = {"model_args": {"times": 3.0}, "recalibrate": "both"}
    fit(config(tmp_path / "ray", "classes", ray_address=cluster, num_workers=2, **arguments))
    tuned(config(tmp_path / "inline", "classes", **arguments))
    one, two = (searched(tmp_path / name) for name in ("ray", "inline"))
    assert one[:2] == two[:2] and torch.equal(one[2], two[2])


def test_a_run_with_a_search_is_whole(tmp_path):
    import laplace_dist

    tuned(config(tmp_path, "classes", recalibrate="both"))
    report = laplace_dist.verify(str(tmp_path), collect_orphans_older_than=0)
    assert report.ok and not report.orphans and not report.notes, (report.problems, report.orphans, report.notes)


def test_a_coarse_round_looks_at_a_part_of_much_data_and_at_all_of_little():
    for n in (10, 999, 2000, 50_000, 1_000_000):
        shards = plan_shards(n, 32)
        chosen = some(shards)
        examples = sum(shard.stop - shard.start for shard in chosen)
        assert len({shard.id for shard in chosen}) == len(chosen)
        assert min(n, 1000) <= examples + max(s.stop - s.start for s in shards)
        assert examples <= max(2000, n / 16 + max(s.stop - s.start for s in shards)) or n < 1000
    assert len(some(plan_shards(50_000, 32))) < len(plan_shards(50_000, 32)) / 4


def test_much_data_are_searched_from_coarse_to_fine_and_few_in_one_pass_with_the_same_end(tmp_path, monkeypatch):
    chosen = config(tmp_path / "one pass", "classes", model_args={"times": 3.0})
    _, manifest, _ = tuned(chosen)
    (scored,) = manifest["search"]["rounds"]
    assert len(scored["priors"]) == 41 == len(tunings.curve(manifest)) and not scored["coarse"]
    monkeypatch.setattr("laplace_dist.stages.rounds.ENOUGH", 150)
    _, again, _ = tuned(chosen.model_copy(update={"checkpoint": str(tmp_path / "rounds")}))
    rounds = again["search"]["rounds"]
    assert [scored["coarse"] for scored in rounds] == [True, False]
    assert sum(len(scored["priors"]) for scored in rounds) <= 20
    assert len(tunings.curve(again)) == len(rounds[1]["priors"])
    one, other = (posterior(chosen.model_copy(update={"checkpoint": str(tmp_path / name)}), tuning_cases.classifier(times=3.0))
                  for name in ("one pass", "rounds"))  # fmt: skip
    assert torch.equal(one.prior_precision, other.prior_precision)


def test_what_is_sampled_is_searched_in_rounds_however_few_the_data(tmp_path):
    _, manifest, _ = tuned(config(tmp_path, "classes", model_args={"times": 3.0}, link_approx="mc"))
    assert [scored["coarse"] for scored in manifest["search"]["rounds"]][:1] == [True]


def test_an_evaluation_refuses_weights_that_are_not_those_of_the_fit(tmp_path, monkeypatch):
    """It makes the checks that a call of the posterior makes."""
    chosen = config(tmp_path, "classes", skip_tune=True, skip_evaluate=False)
    from laplace_dist.stages.context import Context

    plain = Context.posterior

    def changed(self, *arguments):
        la = plain(self, *arguments)
        with torch.no_grad():
            la.model.weight.mul_(1.5)
        return la

    monkeypatch.setattr(Context, "posterior", changed)
    with pytest.raises(RunFailed, match="weights"):
        fit(chosen.model_copy(update={"ray_address": "inline"}))


FLAGS = ["--model=m:f", "--data=d:f", "--checkpoint=run"]


def test_a_range_on_the_command_line():
    assert load_config([*FLAGS, "--prior-range", "0.01", "1e6"]).prior_range == [0.01, 1e6]
    for bad in (["1", "0.1"], ["-1", "1"], ["0", "1"], ["1", "inf"], ["1", "nan"]):
        with pytest.raises(
            SettingsError, match="--prior-range: got .*expected two positive numbers, the lower one first"
        ):
            load_config([*FLAGS, "--prior-range", *bad])
    with pytest.raises(SettingsError, match="--prior-range"):
        load_config([*FLAGS, "--prior-range", "1"])
    with pytest.raises(SettingsError, match="--prior-range: got"):
        load_config([*FLAGS, "--prior-range", "a", "b"])
    with pytest.raises(SettingsError, match="expected one of prior, temperature, both"):
        load_config([*FLAGS, "--recalibrate", "all"])


def test_a_temperature_of_a_regression_is_refused(tmp_path, capsys):
    with pytest.raises(
        SettingsError, match="--recalibrate: got 'temperature' for regression, whose outputs are no logits"
    ):
        tuned(config(tmp_path, "line", recalibrate="temperature"))


# ------------------------------------------------------------------ the evidence against MAP


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
    chosen = chosen.model_copy(update={"data": "test_tuning:calibrated_with_test"})
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
    chosen = of_evidence(tmp_path, "classes").model_copy(update={"data": "test_tuning:without_val"})
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
