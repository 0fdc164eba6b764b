"""Tuning as a job: killed and resumed, on a cluster, in rounds over much data, and its flags."""

from __future__ import annotations

import json

import pytest
import torch
import tuning_cases
from tuning_cases import config, posterior, tuned

from laplace_dist import fit
from laplace_dist.config.command_line import load_config
from laplace_dist.config.compatibility import check_predictive
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.plan.segments import plan_shards
from laplace_dist.run import tunings
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages.rounds import some


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


@pytest.mark.parametrize(
    ("law", "refused"),
    [
        ("laplace.likelihoods:Poisson", True),
        ("laplace.likelihoods:Bernoulli", True),
        ("classification", False),
        ("regression", False),
    ],
)
def test_a_bridge_that_a_likelihood_has_not_is_refused_before_anything_begins(tmp_path, law, refused):
    """It failed at the first validation shard, after the fit."""
    chosen = config(tmp_path, "line", likelihood=law, link_approx="bridge")
    if not refused:
        check_predictive(chosen)
        return
    with pytest.raises(SettingsError, match="--link-approx: got 'bridge'; .*takes 'probit' or 'mc'"):
        check_predictive(chosen)


def test_a_temperature_of_a_regression_is_refused(tmp_path, capsys):
    with pytest.raises(
        SettingsError, match="--recalibrate: got 'temperature' for regression, whose outputs are no logits"
    ):
        tuned(config(tmp_path, "line", recalibrate="temperature"))
