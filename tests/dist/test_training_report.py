"""The report of a training: its numbers against what the training returns, its page in a browser, and what it names."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from functools import partial
from pathlib import Path

import browser
import dist_cases
import pytest
import torch
from report_cases import HTML
from test_report_page import planted
from training_cases import config, drawn, settings, small

import laplace_dist
from laplace_dist import cli_readers, cli_training, load_trained
from laplace_dist.errors import Interrupted, RunFailed, SettingsError
from laplace_dist.execution import signals
from laplace_dist.execution.inline import Inline, InlinePool
from laplace_dist.marglik import marglik_train
from laplace_dist.report.html import task
from laplace_dist.report.html.facts import facts
from laplace_dist.report.html.page import page
from laplace_dist.report.html.subject import is_up_to_date
from laplace_dist.report.html.task import write_report
from laplace_dist.run import trained, training
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished training of a regression with a prior for every layer; tests read or copy it."""
    place = tmp_path_factory.mktemp("training") / "run"
    chosen = small(place, skip_report=False, prior_structure="layerwise")
    return marglik_train(chosen, settings(n_epochs=4, n_epochs_burnin=1), Inline)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole.checkpoint, tmp_path / "run")


@pytest.fixture(scope="module")
def opened():
    """Return what opens a page in a browser that is started once."""
    with browser.started() as chromium:
        yield partial(browser.opened, chromium)


def numbers(url):
    return json.loads((Path(url) / "report/numbers.json").read_text())


def test_the_numbers_are_those_of_the_training_and_of_its_posterior(whole):
    found = numbers(whole.checkpoint)["training"]
    assert [epoch["loss"] for epoch in found["epochs"]] == whole.losses
    evidences = [epoch["log_marginal_likelihood"] for epoch in found["epochs"]]
    assert evidences == [None, *(-value for value in whole.margliks[1::2])], (
        "the last of two steps, none while burning in"
    )
    la = load_trained(whole.checkpoint, drawn())
    best = found["best"]
    assert found["best_epoch"] == best["epoch"] == whole.best_epoch and best["values"] == 4
    assert best["prior_precision"] == la.prior_precision.tolist() and best["sigma_noise"] == float(la.sigma_noise)
    assert best["log_marginal_likelihood"] == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-12)
    assert found["epochs"][0]["prior_precision"] == [1.0] * 4 and found["prior_structure"] == "layerwise"
    assert whole.report == f"{whole.checkpoint}/report.html" and found["weights"] == whole.weights
    (job,) = numbers(whole.checkpoint)["running"]["jobs"]
    assert (job["job"], job["state"], job["stages"][0]["done"]) == ("marglik_train", "done", 4)
    assert laplace_dist.verify(whole.checkpoint).ok


def test_the_command_of_the_page_repeats_the_training(run, whole, tmp_path):
    words = shlex.split(numbers(run)["fitted"]["command"])
    assert words[:2] == ["python", "jobs/marglik_train.py"] and words[words.index("--n-epochs") + 1] == "4"
    words[words.index("--checkpoint") + 1] = str(tmp_path / "again")
    assert cli_training.marglik_main([*words[2:], "--ray-address", "inline"]) == 0
    stores = [Checkpoint(str(url)) for url in (whole.checkpoint, tmp_path / "again")]
    first, again = (training.epochs(store, read_plan(store)) for store in stores)
    assert first == again


def test_the_page_fits_a_phone_and_a_desk_asks_for_nothing_and_shows_every_curve(whole, opened):
    for width, scheme in ((375, "light"), (1200, "dark")):
        with opened(Path(whole.report), width=width, scheme=scheme) as seen:
            seen.page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
            found = seen.page.evaluate(browser.OVERFLOWING)
            assert (found["page"], found["width"], found["wrong"]) == (width, width, [])
            assert seen.page.locator("#epochs figure svg").count() == 4
            assert seen.page.locator("#epochs tbody tr").count() == 4
            assert f"{whole.best_epoch} chosen" in seen.page.locator("#epochs tbody").inner_text()
            assert json.loads(seen.page.locator("#numbers").text_content()) == numbers(whole.checkpoint)
            assert (seen.console, seen.requests) == ([], [])


def test_html_in_any_text_of_the_numbers_is_escaped(whole, opened, tmp_path):
    path = tmp_path / "planted.html"
    path.write_text(page(planted(numbers(whole.checkpoint))), encoding="utf-8")
    with opened(path) as seen:
        assert seen.page.locator("img").count() == 0 and seen.page.locator("script").count() == 1
        for name in ("training_cases:drawn", "adam", "marglik_train", "0.weight"):
            assert f"{name}{HTML}" in seen.page.locator("main").text_content(), name
        assert seen.page.evaluate("document.scrollingElement.scrollWidth") == 375
        assert (seen.console, seen.requests) == ([], [])


def test_it_is_made_again_from_the_checkpoint_alone_and_after_more_epochs(run, capsys, monkeypatch):
    (run / "report.html").unlink()
    (run / "report/numbers.json").unlink()
    assert cli_readers.report_main([str(run)]) == 0
    assert f"report: {run}/report.html" in capsys.readouterr().out and len(numbers(run)["training"]["epochs"]) == 4
    assert is_up_to_date(Checkpoint(str(run)))
    longer = settings(n_epochs=5, n_epochs_burnin=1)
    marglik_train(small(run, prior_structure="layerwise"), longer, Inline)
    assert not is_up_to_date(Checkpoint(str(run)))
    assert cli_readers.report_main([str(run), "--evaluation", "evaluation/x.json"]) == 2
    assert "which has no evaluations" in capsys.readouterr().err
    found = marglik_train(small(run, prior_structure="layerwise", skip_report=False), longer, Inline)
    assert found.report and len(numbers(run)["training"]["epochs"]) == 5
    with monkeypatch.context() as patch:
        patch.setattr(InlinePool, "submit", lambda *_: pytest.fail("a task was submitted"))
        marglik_train(small(run, prior_structure="layerwise", skip_report=False), longer, Inline)


def test_a_report_that_cannot_be_made_is_no_reason_to_fail(run, monkeypatch, caplog):
    def broken(*_):
        raise SettingsError("as a test has it")

    monkeypatch.setattr(task, "write_report", broken)
    longer = settings(n_epochs=5, n_epochs_burnin=1)
    with caplog.at_level("INFO", "laplace_dist"):
        found = marglik_train(small(run, prior_structure="layerwise", skip_report=False), longer, Inline)
    assert found.report is None and len(found.losses) == 5 and "report: not written (" in caplog.text


def test_what_a_training_has_not_come_to_is_said(tmp_path):
    changes = {"hessian_structure": "diag", "prior_structure": "diag", "batch_size": 300}
    chosen = config(tmp_path / "run", "digits", **changes)
    marglik_train(chosen, settings(n_epochs=1, n_epochs_burnin=1), Inline)
    store = Checkpoint(str(tmp_path / "run"))
    write_report(store)
    text, found = (tmp_path / "run" / "report.html").read_text(), facts(store)
    assert found["training"]["best"] is None and "The evidence was not estimated in any epoch" in text
    assert "Of 1,898 prior precisions the smallest, the quartiles and the largest." in text
    assert found["training"]["epochs"][0]["sigma_noise"] is None and "observation noise" not in text
    shutil.rmtree(tmp_path / "run" / "training")
    assert "No epoch is committed yet" in page(facts(store))


def diverging(place):
    marglik_train(small(place), settings(optimizer="sgd", optimizer_args={"lr": 1e200}), Inline)


def interrupted(place):
    marglik_train(small(place), settings(n_epochs=1), Inline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlinePool, "submit", lambda *_: signal.raise_signal(signal.SIGTERM))
        with signals.heeded():
            marglik_train(small(place), settings(n_epochs=2), Inline)


def without_evidence(place):
    marglik_train(small(place), settings(lr_hyp=1e6, n_hypersteps=50), Inline)


def fit(place):
    nan = {"data": "dist_cases:with_nan", "data_args": {"at": 21}}
    laplace_dist.fit(dist_cases.config(place, **nan), executor=Inline)


@pytest.mark.parametrize("job", [diverging, interrupted, without_evidence, fit])
def test_a_job_that_failed_says_how_its_report_is_made_and_it_is(job, tmp_path, caplog):
    with caplog.at_level("INFO", "laplace_dist"), pytest.raises((RunFailed, Interrupted)) as failed:
        job(tmp_path / "run")
    (said,) = [line for line in caplog.messages if line.startswith("report:")]
    words = shlex.split(said.partition("; ")[2])
    assert words[:2] == ["python", "jobs/report.py"] and cli_readers.report_main([words[2]]) == 0
    ended = [(found["state"], found["why"]) for found in numbers(tmp_path / "run")["running"]["jobs"]]
    why = str(failed.value).splitlines()[0][:500]
    assert (("interrupted", None) if job is interrupted else ("failed", why)) in ended


def test_a_job_that_was_refused_before_it_began_says_nothing_of_a_report(tmp_path, caplog):
    with caplog.at_level("INFO", "laplace_dist"), pytest.raises(SettingsError):
        marglik_train(small(tmp_path / "run", data="training_cases:none"), settings(), Inline)
    assert "report" not in caplog.text


def test_an_epoch_of_before_priors_were_kept_is_shown_without_them(whole):
    found = numbers(whole.checkpoint)
    for epoch in found["training"]["epochs"]:
        epoch |= {"prior_precision": [], "values": None, "sigma_noise": None}
    text = page(found)
    assert "Prior precision by epoch" not in text and "Log marginal likelihood by epoch" in text


def test_of_very_many_prior_precisions_an_epoch_keeps_the_quartiles():
    la = type("La", (), {"likelihood_object": type("L", (), {"has_noise": False})})
    la.prior_precision = torch.arange(1001.0).flip(0)
    assert trained.hyper_of(la) == {
        "prior_precision": [0.0, 250.0, 500.0, 750.0, 1000.0],
        "values": 1001,
        "sigma_noise": None,
    }
    la.prior_precision = torch.tensor([3.0, 1.0])
    assert trained.hyper_of(la)["prior_precision"] == [3.0, 1.0]
