"""The numbers of a report against torchmetrics, scikit-learn, weighted and naive computations, and closed forms."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import dist_cases
import numpy as np
import pytest
import report_cases
import torch
import zarr
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score

import laplace_dist
from laplace.likelihoods.scores import summarize_classification, summarize_regression
from laplace.tuning import score_grid
from laplace_dist.data.groups import groups_of
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import SettingsError
from laplace_dist.recalibration import recalibrate, rollback
from laplace_dist.report.html import calibration, columns, intervals, regression, slices, tuned
from laplace_dist.report.html.columns import Column, Evaluated
from laplace_dist.report.html.facts import facts, plain
from laplace_dist.report.html.page import _figures, embedded, page
from laplace_dist.report.html.subject import is_up_to_date
from laplace_dist.report.html.task import write_report
from laplace_dist.run import decompositions
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.evaluations import joined_scores
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.spectra import spectra


def scores(n: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    confidence = random.uniform(0.3, 1, n).round(2)  # with ties
    correct = (random.uniform(size=n) < confidence).astype(float)
    return {
        "confidence": confidence,
        "correct": correct,
        "nll": random.exponential(size=n),
        "brier": random.uniform(size=n),
    }


def column(own=None, **more) -> Column:
    return Column("MAP", "map", {}, own or scores(), **more)


# ------------------------------------------------------------------ intervals


@pytest.mark.parametrize("seed", range(3))
def test_a_metric_of_counts_is_that_of_the_examples_repeated(seed):
    """As the core library and torchmetrics have it."""
    own = scores(seed=seed)
    counts = np.random.default_rng(seed).multinomial(60, np.full(60, 1 / 60), 4).astype(float)
    for draw in counts:
        repeated = {name: torch.from_numpy(np.repeat(values, draw.astype(int))) for name, values in own.items()}
        for name, expected in summarize_classification(repeated).items():
            assert intervals.statistic(name, own)(draw[None])[0] == pytest.approx(expected, rel=1e-5), name


def test_the_same_for_regression():
    random = np.random.default_rng(0)
    own = {"nll": random.normal(size=40), "squared_error": random.exponential(size=40), "covered_90": np.ones(40)}
    counts = random.multinomial(40, np.full(40, 1 / 40)).astype(float)
    repeated = {name: torch.from_numpy(np.repeat(values, counts.astype(int))) for name, values in own.items()}
    for name, expected in summarize_regression(repeated).items():
        assert intervals.statistic(name, own)(counts[None])[0] == pytest.approx(expected, rel=1e-12), name


def test_the_area_of_each_draw_is_scikit_learns_with_the_counts_as_weights(monkeypatch):
    inside, outside = scores(50, 1), scores(35, 2)["confidence"] - 0.15
    found = intervals._areas([column(inside, outside={"far": outside})], "far", seed=3)[0]
    drawn = [list(intervals._rows(n, len(found), np.random.default_rng([3, part]))) for part, n in enumerate((50, 35))]
    labels, values = np.r_[np.ones(50), np.zeros(35)], np.r_[inside["confidence"], outside]
    for place in range(0, len(found), 100):
        weights = np.r_[drawn[0][place], drawn[1][place]]
        assert found[place] == pytest.approx(roc_auc_score(labels, values, sample_weight=weights), abs=1e-12)


def test_the_interval_of_a_mean_is_that_of_the_central_limit_and_is_the_same_every_time():
    own = scores(2000)
    (values,) = intervals.distributions([column(own)], ["nll"], seed=0)["nll"]
    low, high = intervals.interval(values)
    error = own["nll"].std() / math.sqrt(2000)
    assert (low, high) == pytest.approx(
        (own["nll"].mean() - 1.96 * error, own["nll"].mean() + 1.96 * error), abs=0.25 * error
    )
    again = intervals.distributions([column(own)], ["nll"], seed=0)["nll"][0]
    assert np.array_equal(values, again) and len(values) == intervals.DRAWS


def test_columns_are_drawn_alike_so_that_differences_are_paired():
    own = scores()
    shifted = {**own, "nll": own["nll"] + 0.5}
    one, other = intervals.distributions([column(own), column(shifted)], ["nll"], seed=0)["nll"]
    assert other - one == pytest.approx(np.full(len(one), 0.5))


def test_what_is_not_known_has_no_interval_and_large_sets_have_fewer_draws():
    drawn = intervals.distributions([column()], ["nll", "of_their_own"], seed=0)
    assert drawn["of_their_own"] == [None] and intervals.interval(None) is None
    assert [intervals.draws_of(n) for n in (1, 10**5, 10**6, 10**9)] == [1000, 1000, 200, 200]


# ------------------------------------------------------------------ curves


def test_reliability_has_the_means_of_each_bin_and_gives_the_calibration_error():
    own = scores(200)
    found = calibration.reliability(column(own))
    for place in range(intervals.BINS):
        low, high = place / 15, (place + 1) / 15 + (place == 14)
        inside = (own["confidence"] >= low - 1e-12) & (own["confidence"] < high - 1e-12)
        assert found["count"][place] == inside.sum()
        if inside.any():
            assert found["accuracy"][place] == pytest.approx(own["correct"][inside].mean())
        else:
            assert found["accuracy"][place] is found["confidence"][place] is None
    gaps = [
        count * abs(a - c)
        for count, a, c in zip(found["count"], found["accuracy"], found["confidence"], strict=True)
        if count
    ]
    expected = summarize_classification({name: torch.from_numpy(values) for name, values in own.items()})["ece"]
    assert sum(gaps) / 200 == pytest.approx(expected, rel=1e-5)


def test_risk_over_coverage_is_the_error_of_the_most_confident_whatever_the_order_of_ties():
    own = scores(80)
    found = calibration.risk_coverage(column(own))
    order = np.random.default_rng(5).permutation(80)
    shuffled = calibration.risk_coverage(column({name: values[order] for name, values in own.items()}))
    assert shuffled["risk"] == pytest.approx(found["risk"])
    assert found["risk"][-1] == pytest.approx(1 - own["correct"].mean())
    most = own["confidence"] == own["confidence"].max()
    assert found["risk"][0] == pytest.approx(1 - own["correct"][most].mean())
    distinct = {**own, "confidence": np.linspace(1, 0.2, 80)}
    naive = [1 - distinct["correct"][: k + 1].mean() for k in range(80)]
    assert calibration.risk_coverage(column(distinct))["risk"] == pytest.approx(naive)
    assert calibration.risk_coverage(column(distinct))["area"] == pytest.approx(np.mean(naive))


def test_intervals_that_are_right_lie_on_the_diagonal():
    """Targets at the quantiles of their own Gaussians."""
    levels = (np.arange(2000) + 0.5) / 2000
    mean, deviation = np.linspace(-3, 3, 2000)[:, None], np.linspace(0.5, 2, 2000)[:, None]
    spread = np.random.default_rng(0).permutation(ndtri(levels))[:, None]
    kept = {"mean": mean, "deviation": deviation, "target": mean + deviation * spread}
    found = regression.curve(column(details=kept))
    assert found["observed"] == pytest.approx(found["expected"], abs=1e-3)
    wide = regression.curve(column(details={**kept, "deviation": 2 * deviation}))
    assert wide["observed"] == pytest.approx(
        [2 * _normal(2 * ndtri((1 + e) / 2)) - 1 for e in wide["expected"]], abs=1e-3
    )
    median = regression.widths(column(details=kept))["quartiles"][1]
    assert median == pytest.approx(2 * 1.6448536 * 1.25, rel=1e-3)


def _normal(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


# ------------------------------------------------------------------ of runs


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """Return a finished run with an out-of-distribution split, and the result of its job."""
    given = {"skip_tune": False, "skip_evaluate": False, "skip_report": False, "ood": ["other"], "grid_size": 7}
    return report_cases.inline(dist_cases.config(tmp_path_factory.mktemp("classified"), **given))


@pytest.fixture(scope="module")
def regressed(tmp_path_factory):
    return report_cases.inline(report_cases.regression(tmp_path_factory.mktemp("regressed")))


def test_the_table_has_the_committed_metrics_inside_their_intervals(classified):
    found = facts(Checkpoint(classified.checkpoint))
    assert classified.report == f"{classified.checkpoint}/report.html" and Path(classified.report).is_file()
    for row in found["metrics"]["rows"]:
        for method, cell in zip(("map", "laplace"), row["values"], strict=True):
            assert cell["value"] == classified.metrics[method][row["name"]]
            if row["name"] != "ece":  # which draws raise
                assert cell["interval"][0] <= cell["value"] <= cell["interval"][1]
    for own, method in zip(found["calibration"]["columns"], ("map", "laplace"), strict=True):
        assert own["roc"]["other"]["area"] == pytest.approx(classified.metrics[method]["ood_auroc/other"], abs=1e-6)


def test_the_curve_of_the_prior_is_that_of_one_process(classified):
    store = Checkpoint(classified.checkpoint)
    found = facts(store)["tuned"]
    la = laplace_dist.load_posterior(store.url, dist_cases.convnet(), tuned=False)
    loader = torch.utils.data.DataLoader(dist_cases.blobs("val"), batch_size=4)
    grid, values = zip(*found["curve"], strict=True)
    total, n = score_grid(la, loader, torch.tensor(grid, dtype=torch.float64))
    assert len(grid) >= 3 and list(grid) == sorted(grid)
    assert values == pytest.approx((total / n).tolist(), rel=1e-5)
    assert min(abs(prior / found["prior_precision"][0] - 1) for prior in grid) < 1e-6


def test_what_a_search_ended_at_is_said():
    assert tuned._limit({"limit": None, "helps": True, "said": ["all is well"]}) is None
    assert tuned._limit({"limit": "MAP", "helps": True, "said": ["that is MAP."]}) == "that is MAP."


@pytest.mark.parametrize(("chosen", "said"), [(1e-4, "is the smallest"), (1e4, "is the largest"), (1.0, None)])
def test_a_choice_on_the_edge_of_a_grid_is_warned_of(chosen, said):
    found = {"curve": [(1e-4, 1.0), (1.0, 0.5), (1e4, 1.0)], "values": 1, "prior_precision": [chosen]}
    assert (tuned._warning(found) is None) if said is None else (said in tuned._warning(found))


def test_spectra_are_those_of_the_factors_and_are_computed_once(classified, monkeypatch):
    store = Checkpoint(classified.checkpoint)
    la = laplace_dist.load_posterior(store.url, dist_cases.convnet())
    expected = la.sums.to_tensors()
    found = spectra(store, read_plan(store), classified.version)
    assert {own["factor"] for own in found} == set(la.sums.spec.factors)
    for own in found:
        weight = la.n_data if own["factor"].endswith("/A") else 1
        values = np.linalg.eigvalsh(expected[own["factor"]].double().numpy() / weight)[::-1]
        assert own["size"] == len(values) and own["values"][0] == pytest.approx(values[0], rel=1e-6)
        assert own["values"] == pytest.approx(values.tolist(), abs=1e-5 * values[0])
    monkeypatch.setattr("laplace_dist.run.spectra.read_version", None)  # calling it would be an error
    assert spectra(store, read_plan(store), classified.version) == found


def test_committed_decompositions_are_taken_over_however_large_their_factors(classified, monkeypatch):
    store = Checkpoint(classified.checkpoint)
    plan = read_plan(store)
    whole = spectra(store, plan, classified.version)
    monkeypatch.setattr(decompositions, "WORTH", 1)
    with dist_cases.inline_job(dist_cases.config(store.url)) as job:
        job.decompose(classified.version)
    store.delete_tree("report")
    monkeypatch.setattr("laplace_dist.run.spectra.LARGEST", 0)
    found = spectra(store, plan, classified.version)
    assert [own["factor"] for own in found] == [own["factor"] for own in whole]
    for own, other in zip(found, whole, strict=True):
        assert own["values"] == pytest.approx(other["values"], rel=1e-4, abs=1e-6 * other["values"][0])
    store.delete_tree("decompositions")
    store.delete_tree("report")


def test_factors_that_are_too_large_are_left_out_by_name(classified, monkeypatch):
    store = Checkpoint(classified.checkpoint)
    store.delete_tree("report")
    monkeypatch.setattr("laplace_dist.run.spectra.LARGEST", 9)
    found = {own["factor"]: own for own in spectra(store, read_plan(store), classified.version)}
    assert (
        found["4.weight/A"]["skipped"] == "too large to be decomposed for a report"
        and not found["4.weight/A"]["values"]
    )
    assert found["4.weight/B"]["values"] and found["4.weight/B"]["skipped"] is None
    store.delete_tree("report")


def test_the_predictions_of_a_regression_are_kept_and_agree_with_its_metrics(regressed):
    store = Checkpoint(regressed.checkpoint)
    found = facts(store)
    x, y = report_cases.sinusoid("test").tensors
    la = laplace_dist.load_posterior(store.url, report_cases.waves())
    mean, variance = la(x)
    deviation = (variance.diagonal(dim1=1, dim2=2) + la.sigma_noise.item() ** 2).sqrt()
    own = found["regression"]["columns"][1]
    inside = ((y - mean).abs() <= deviation * 1.6448536).double().mean().item()
    place = [round(level, 2) for level in own["calibration"]["expected"]].index(0.9)
    assert own["calibration"]["observed"][place] == pytest.approx(inside) == regressed.metrics["laplace"]["coverage_90"]
    assert own["residuals"][1]["residual"] == pytest.approx((y - mean)[:, 1].tolist(), abs=1e-5)
    assert own["residuals"][0]["deviation"] == pytest.approx(deviation[:, 0].tolist(), rel=1e-4)
    assert own["width"]["quartiles"][1] == pytest.approx(2 * 1.6448536 * deviation.median().item(), rel=1e-2)


def test_groups_of_the_data_are_slices_with_the_metrics_of_their_examples(regressed):
    found = facts(Checkpoint(regressed.checkpoint))["slices"]
    data = report_cases.sinusoid("test")
    la = laplace_dist.load_posterior(regressed.checkpoint, report_cases.waves())
    mean = la(data.tensors[0])[0]
    for row in found["groups"]:
        inside = torch.tensor([group == row["group"] for group in data.group])
        rmse = (data.tensors[1] - mean)[inside].square().mean().sqrt().item()
        assert row["examples"] == inside.sum() and row["values"]["rmse"][1]["value"] == pytest.approx(rmse, rel=1e-5)
    assert [row["group"] for row in found["groups"]] == ["outside", "inside"], "the worse first"


def test_slices_of_a_classifier_have_accuracy_and_calibration():
    own = scores(90)
    metrics = {"accuracy": 0.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}
    both = [Column(name, style, metrics, own) for name, style in (("MAP", "map"), ("Laplace", "laplace"))]
    groups = ["a", "b", "b"] * 30
    found = slices.slices(Evaluated("key", both, groups, {}, []), seed=0)
    for row in found["groups"]:
        inside = np.array([group == row["group"] for group in groups])
        part = summarize_classification({name: torch.from_numpy(values[inside]) for name, values in own.items()})
        assert {name: cells[0]["value"] for name, cells in row["values"].items()} == {
            name: pytest.approx(part[name], rel=1e-5) for name in ("accuracy", "nll", "ece")
        }


def test_a_promotion_shows_the_previous_posterior_and_a_rollback_the_candidate_on_the_same_examples(tmp_path):
    given = {"margin_nll": 10.0, "margin_ece": 1.0, "weights": report_cases.trained(), "ood": ["shuffled"]}
    report_cases.inline(report_cases.digits(tmp_path, skip_report=True, **given))
    found = recalibrate(report_cases.digits(tmp_path, 2, **given), executor=laplace_dist.Inline)
    assert found.promoted and found.report == f"{tmp_path}/report.html"
    store = Checkpoint(str(tmp_path))
    numbers = facts(store)
    assert [column["name"] for column in numbers["metrics"]["columns"]] == ["MAP", "Laplace", "previous"]
    for row in numbers["metrics"]["rows"]:
        wanted = [found.metrics[side][row["name"]] for side in ("map", "candidate", "current")]
        assert [cell["value"] for cell in row["values"]] == wanted
    (decision,) = numbers["history"]["recalibrations"]
    assert decision["promoted"] and decision["window"] == "week-2" and decision["why"] == found.why
    rollback(str(tmp_path), numbers["history"]["current"][0]["version"])
    assert not is_up_to_date(store)
    back = facts(store)["metrics"]
    assert [column["name"] for column in back["columns"]] == ["MAP", "Laplace", "candidate"]
    assert back["rows"][1]["values"][1]["value"] == found.metrics["current"]["nll"]
    write_report(store)
    assert is_up_to_date(store)
    kept = recalibrate(report_cases.digits(tmp_path, 3, keep_versions=1, **given), executor=laplace_dist.Inline)
    assert kept.promoted and store.list("report") == ["report/numbers.json", f"report/spectra-{kept.version}.json"]


def test_a_split_without_labels_is_not_shown_as_out_of_distribution(tmp_path):
    given = {"skip_evaluate": False, "ood": ["far"], "unlabelled": "requests"}
    report_cases.inline(dist_cases.config(tmp_path, **given))
    assert facts(Checkpoint(str(tmp_path)))["calibration"]["splits"] == ["far"]


def test_another_posterior_of_other_examples_has_no_column():
    own = scores(20)
    one = column(own, outside={"far": own["nll"]})
    assert columns.alike(one, one)
    assert not columns.alike(one, column(scores(19), outside={"far": own["nll"]}))
    assert not columns.alike(one, column(own)) and not columns.alike(one, column(own, outside={"far": own["nll"][:3]}))


def test_a_report_in_an_object_store(s3):
    url = s3.url()
    chosen = dist_cases.config(url, storage_options=s3.options, skip_evaluate=False, skip_report=False)
    result = report_cases.inline(chosen)
    store = Checkpoint(url, s3.options)
    assert result.report == f"{url}/report.html" and store.read("report.html").startswith(b"<!doctype html>")
    assert s3.options["secret"] not in store.read("report.html").decode() and is_up_to_date(store)
    assert facts(store)["running"]["jobs"][0]["state"] == "done"


def test_workers_over_time_are_drawn_where_their_number_changes(classified):
    found = facts(Checkpoint(classified.checkpoint))
    assert "workers0" not in _figures(found)
    found["running"]["jobs"][0]["workers"] = [[0.0, 0], [5.0, 2], [9.0, 1]]
    assert "workers0" in _figures(found) and "Workers over time" in page(found)


def test_the_array_group_of_a_zarr_split_is_its_groups(tmp_path):
    split = zarr.open_group(tmp_path / "data", mode="w").create_group("test")
    for name, values in {"x": np.zeros((4, 2), "float32"), "y": np.arange(4), "group": np.array([3, 1, 1, 3])}.items():
        split.create_array(name, data=values)
    assert groups_of(ZarrSplit(str(tmp_path / "data"), "test"), "test") == ("3", "1", "1", "3")


def test_groups_that_do_not_fit_are_refused_by_name():
    data = report_cases.sinusoid("test")
    assert groups_of(dist_cases.blobs("test"), "test") == ()
    data.group = ["a"] * 3
    with pytest.raises(SettingsError, match=r"'group' of the split 'test' has 3 entries for 150 examples"):
        groups_of(data, "test")
    data.group = torch.arange(150)
    assert groups_of(data, "test")[:2] == ("0", "1")
    data.group = np.arange(150).reshape(150, 1)
    with pytest.raises(SettingsError, match="expected one name or number for each"):
        groups_of(data, "test")
    x = torch.zeros(300, 1)
    many = report_cases.Grouped(x, x, group=[str(i) for i in range(300)])
    with pytest.raises(SettingsError, match="names 300 different groups; expected at most 200"):
        groups_of(many, "test")


# ------------------------------------------------------------------ what is not there


def test_a_run_of_0_1_has_a_report_that_says_what_it_lacks(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "fixtures" / "runs_0.1.zip") as archive:
        archive.extractall(tmp_path)
    for name in ("finished", "interrupted"):
        write_report(Checkpoint(str(tmp_path / name)))
        found = facts(Checkpoint(str(tmp_path / name)))
        text = (tmp_path / name / "report.html").read_text()
        assert "No record of the jobs is kept" in text and found["running"]["jobs"] == []
        assert found["fitted"]["coverage"]["parameters"] == 4
        if name == "finished":
            assert found["metrics"]["rows"] and found["tuned"]["curve"] and found["calibration"]
        else:
            assert found["metrics"] is None and "The run has no posterior yet" in text
        assert laplace_dist.verify(str(tmp_path / name)).problems == []


def test_an_evaluation_without_predictions_says_so(regressed, monkeypatch):
    store = Checkpoint(regressed.checkpoint)
    monkeypatch.setattr(
        columns,
        "joined_scores",
        lambda store, key, split, ids, method: (
            {} if "details" in method else joined_scores(store, key, split, ids, method)
        ),
    )
    found = facts(store)
    assert found["regression"] is None and any(
        "kept the scores of each example but not its prediction" in n for n in found["notes"]
    )
    assert "kept the scores of each example" in page(found)


def test_numbers_that_are_not_finite_are_null_and_no_name_ends_the_script():
    assert plain({"a": [math.nan, math.inf, 1.5, (2,)]}) == {"a": [None, None, 1.5, [2]]}
    text = str(embedded({"</script><!--": "&\u2028"}))
    assert not set("<>&") & set(text) and text.isascii()


def test_no_run_is_no_report(tmp_path):
    with pytest.raises(SettingsError, match="where there is no run; expected one that a fit job has started"):
        write_report(Checkpoint(str(tmp_path / "mistyped")))
