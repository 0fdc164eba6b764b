"""A recalibration watches for drift, and says so to whoever wants to be told."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys

import pytest
import torch
from recalibration_cases import SIZES, begin, day, decision
from window_cases import config, fit_inline

import laplace_dist
from laplace_dist.errors import SettingsError
from laplace_dist.recalibration import recalibrate, rollback
from laplace_dist.report import alert
from laplace_dist.run import layout, pointer
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages.evaluate import _per_example
from laplace_dist.storage.sealed_json import seal_json


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with a fit and one recalibration; tests copy it."""
    return begin(tmp_path_factory.mktemp("recalibration") / "run")


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------ drift


def test_nothing_is_noticed_while_nothing_changes(run):
    for number in range(2, 6):
        found = day(run, number)
        shown = decision(run, f"day-{number}")["drift"]
        assert found.noticed == () and shown["noticed"] == {}
        assert set(shown["streams"]) == {"entropy", "features", "nll", "labels"} and shown["false_alarms"] == 0.05
        assert shown["reference"]["number"] == number, "every promotion is a new reference"
        assert all(stream["looks"] == 1 for stream in shown["streams"].values())
        change = shown["changes"]["nll"]
        assert change["change"] == pytest.approx(change["now"] - change["before"])
        assert change["now"] == pytest.approx(found.metrics["current"]["nll"], abs=1e-9)


def test_the_first_look_compares_with_what_the_fit_has_evaluated(kept):
    shown = decision(kept, "day-1")["drift"]
    first = pointer.read_current(Checkpoint(str(kept)))["history"][0]["version"]
    assert shown["reference"]["number"] == 1 and shown["reference"]["version"] == first and not shown["passed_over"]


@pytest.mark.parametrize(
    "data, streams",
    [({"shift": 1.0}, {"features"}), ({"share": 0.9}, {"labels"}), ({"change": True}, {"nll"})],
    ids=["other inputs", "other shares of labels", "other labels for the same inputs"],
)
def test_drift_is_noticed_by_the_stream_that_shows_it_and_stays_so(run, data, streams, capsys):
    found = day(run, 2, **data, gate=["nll<=-10"])
    assert streams <= set(found.noticed), decision(run, "day-2")["drift"]["streams"]
    assert "is not what it was when the current posterior was accepted" in capsys.readouterr().out
    day(run, 3, gate=["nll<=-10"])
    shown = decision(run, "day-3")["drift"]
    assert all(shown["noticed"][name] == "day-2" for name in streams)
    assert day(run, 4).promoted and day(run, 5).noticed == (), "a promotion is a new reference"


def test_a_window_is_looked_at_once(run):
    state = layout.DRIFT
    store = Checkpoint(str(run))
    day(run, 2, gate=["nll<=-10"])
    before = store.read(state)
    day(run, 2, gate=["nll<=-11"])
    assert store.read(state) == before
    day(run, 2, gate=["nll<=-12"], dry_run=True)
    day(run, 3, dry_run=True)
    assert store.read(state) == before, "a dry run is no look"


def test_dropping_a_window_that_is_not_in_is_no_new_reference(run):
    day(run, 2, gate=["nll<=-10"])
    version = pointer.read_current(Checkpoint(str(run)))["version"]
    assert day(run, 3, drop_window="day-2").version == version
    day(run, 4, gate=["nll<=-10"])
    first, last = (decision(run, name)["drift"] for name in ("day-2", "day-4"))
    assert first["reference"] == last["reference"]
    assert [found["streams"]["nll"]["looks"] for found in (first, last)] == [1, 3]


def test_examples_that_were_seen_are_no_new_evidence_and_that_is_said(run, capsys):
    day(run, 2, gate=["nll<=-10"], data="recalibration_cases:old_examples")
    shown = decision(run, "day-2")["drift"]
    assert set(shown["passed_over"]) == {"entropy", "features", "nll", "labels"}
    assert {stream["looks"] for stream in shown["streams"].values()} == {0} and "changes" not in shown
    said = "drift: not looked at entropy, features, nll, labels: the examples of test are no new ones"
    assert said in capsys.readouterr().out


def test_examples_without_labels_are_watched_and_what_they_will_cost_is_estimated(run):
    found = day(run, 2, data="recalibration_cases:without_labels", unlabelled="recent", gate=["nll<=-10"])
    shown = decision(run, "day-2")["drift"]
    assert "features" in found.noticed and not {"nll", "labels"} & set(found.noticed)
    assert set(shown["estimated_without_labels"]) == {"test", "recent"}
    assert set(shown["estimated_without_labels"]["recent"]) == {"accuracy_atc", "accuracy_doc", "nll_doc"}
    assert math.isclose(sum(shown["labels"]["estimated_without_labels"]), 1)
    assert "ood_auroc/recent" not in found.metrics["current"]


def test_a_split_without_labels_may_have_been_one_out_of_distribution(run):
    """Of which less is kept: an evaluation of before does not stand in for one with it."""
    day(run, 2, data="recalibration_cases:without_labels", ood=["recent"], gate=["nll<=-10"])
    found = day(run, 2, data="recalibration_cases:without_labels", unlabelled="recent", gate=["nll<=-10"])
    assert "features" in found.noticed


def test_an_evaluation_of_an_older_version_is_no_reference(run):
    """It has nothing that is watched: the first look becomes the reference, and the second one compares with it."""
    store = Checkpoint(str(run))
    key = pointer.read_current(store)["history"][-1]["evaluation"]
    for name in store.list(key.removesuffix(".json"), recursive=False):
        shard = open_json(store.read(name), name)
        kept = {array: entry for array, entry in shard["arrays"].items() if not array.startswith("monitor/")}
        store.replace(name, seal_json({**shard, "arrays": kept}))
    day(run, 2, gate=["nll<=-10"])
    first = decision(run, "day-2")["drift"]
    assert len(first["passed_over"]) == 4 and first["reference"]["evaluation"] != key
    assert day(run, 3, shift=1.0, gate=["nll<=-10"]).noticed
    assert decision(run, "day-3")["drift"]["reference"] == first["reference"]


@pytest.mark.parametrize("name", ["test", "a b", ""])
def test_a_name_that_no_unlabelled_split_can_have_is_refused(run, name):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    with pytest.raises(SettingsError, match=f"--unlabelled: got {name!r}"):
        day(run, 2, unlabelled=name)
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


def test_a_split_without_labels_that_the_data_do_not_have_is_refused_before_anything_is_computed(run):
    before = Checkpoint(str(run)).list()
    with pytest.raises(SettingsError, match="--data: .* gives no split 'yesterday'"):
        day(run, 2, unlabelled="yesterday", skip_evaluate=False)
    assert Checkpoint(str(run)).list() == before


def test_what_stands_for_the_labels_that_there_are_not_is_said(run):
    message = r"expected a pair \(x, y\).*\(split 'recent', whose targets are not used: any will do, such as 0\)"
    with pytest.raises(SettingsError, match=message):
        day(run, 2, data="recalibration_cases:inputs_alone", unlabelled="recent")


def test_spectra_of_the_new_window_are_compared_with_the_current_posterior(run):
    day(run, 2)
    same = decision(run, "day-2")["drift"]["spectra"]["relative_distance"]
    day(run, 3, shift=3.0)
    other = decision(run, "day-3")["drift"]["spectra"]["relative_distance"]
    assert set(same) == set(read_plan(Checkpoint(str(run))).spec["factors"])
    assert other["0.weight/A"] > 5 * same["0.weight/A"]


def test_a_regression_is_watched_too(tmp_path):
    given = {"data": "recalibration_cases:numbers", "likelihood": "regression", "margin_nll": 10.0, **SIZES}
    fit_inline(config(tmp_path / "run", window="0", **{**given, "data_args": {"day": 0}}))
    for number, shift in ((1, 0.0), (2, 4.0)):
        found = recalibrate(
            config(tmp_path / "run", window=f"day-{number}", **given, data_args={"day": number, "shift": shift}),
            laplace_dist.Inline,
        )
        assert found.notes == tuple(
            f"The NLL of {who} is that under an observation noise that nobody has tuned, 1."
            for who in ("MAP and of the candidate", "the current one")
        )
    shown = decision(tmp_path / "run", "day-2")["drift"]
    assert set(shown["streams"]) == {"entropy", "features", "nll"} and "features" in shown["noticed"]
    assert set(shown["changes"]) == {"nll"} and "labels" not in shown and "estimated_without_labels" not in shown


# ------------------------------------------------------------------ alerts


def command(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def test_an_alert_is_given_the_record_when_something_has_drifted(run, tmp_path, capsys):
    told = command(f"import sys; open({str(tmp_path / 'told')!r}, 'a').write(sys.stdin.read())")
    day(run, 2, gate=["nll<=-10"], alert_cmd=told)
    assert not (tmp_path / "told").exists(), "nothing has drifted"
    day(run, 3, shift=1.0, gate=["nll<=-10"], alert_cmd=told)
    record = json.loads((tmp_path / "told").read_text())
    assert record["window"] == "day-3" and record["checkpoint"] == str(run)
    assert {name: record[name] for name in ("drift", "promoted", "why")} == {
        name: decision(run, "day-3")[name] for name in ("drift", "promoted", "why")
    }
    assert "--alert-cmd: " in capsys.readouterr().out
    assert "alert" not in (run / layout.CONFIG).read_text()


@pytest.mark.parametrize(
    "cmd, why",
    [
        (command("import sys; sys.exit('no such pager')"), "ended with status 1: no such pager"),
        ("/no/such/command", "was not told: .*No such file"),
        (command("import time; time.sleep(60)"), "did not end within 0.5 s"),
    ],
)
def test_an_alert_that_fails_is_reported_and_changes_nothing(run, cmd, why, capsys, monkeypatch):
    monkeypatch.setattr(alert.send, "__defaults__", (0.5,))
    wanted = day(run, 2, shift=1.0)
    current = Checkpoint(str(run)).read(layout.CURRENT)
    again = run.parent / "again"
    shutil.copytree(run, again)
    rollback(str(again), pointer.read_current(Checkpoint(str(run)))["history"][-2]["version"])
    found = day(again, 2, shift=1.0, alert_cmd=cmd, windows="day-0,day-1,day-2")
    assert re.search(why, capsys.readouterr().out)
    assert found.promoted and found.version == wanted.version and Checkpoint(str(run)).read(layout.CURRENT) == current


@pytest.mark.parametrize("cmd, message", [("mail 'ops", "cannot be split"), ("  ", "holds no word")])
def test_an_alert_command_that_is_none_is_refused_before_anything_is_done(run, cmd, message):
    before = Checkpoint(str(run)).list()
    with pytest.raises(SettingsError, match=f"--alert-cmd: {message}"):
        day(run, 2, alert_cmd=cmd)
    assert Checkpoint(str(run)).list() == before


# ------------------------------------------------------------------ several terms per example


def test_an_example_of_several_terms_counts_once():
    """Terms of one example are not exchangeable with those of another; where some were left out nobody knows whose they are."""
    outputs = torch.zeros(4, 3, 5)
    terms = torch.arange(12.0)
    torch.testing.assert_close(_per_example("loss", terms, outputs), terms.reshape(4, 3).mean(1))
    assert _per_example("label", terms, outputs) is None and _per_example("loss", terms[:8], outputs) is None
    torch.testing.assert_close(
        _per_example("entropy", torch.arange(60.0), outputs), torch.arange(60.0).reshape(4, 15).mean(1)
    )
    assert _per_example("label", terms[:4], torch.zeros(4, 5)).tolist() == [0, 1, 2, 3]


class Died(BaseException):
    """The process is gone."""


def test_a_death_at_any_write_around_the_promotion_loses_neither_drift_nor_alert_nor_decision(
    kept, tmp_path, monkeypatch
):
    """The same command does what was left undone, and promotes nothing twice."""
    alerts, deaths, left = [], 0, [None]
    monkeypatch.setattr(alert, "send", lambda command, record, say: alerts.append(record["promoted"]))
    real = {name: getattr(Checkpoint, name) for name in ("replace", "swap")}

    def deadly(name):
        def write(self, key, *given):
            if key in (layout.CURRENT, layout.METRICS, layout.DRIFT) or key.endswith("/decision.json"):
                left[0] -= 1
                if left[0] == -1:
                    raise Died
            return real[name](self, key, *given)

        return write

    for name in real:
        monkeypatch.setattr(Checkpoint, name, deadly(name))
    while True:
        place, left[0] = tmp_path / str(deaths), deaths
        shutil.copytree(kept, place)
        alerts.clear()
        try:
            day(place, 2, shift=2.0, alert_cmd="tell")
            break
        except Died:
            left[0] = 1000
            found = day(place, 2, shift=2.0, alert_cmd="tell")
            record = decision(place, "day-2")
            assert found.promoted and record["promoted"] and "pending" not in record and "features" in found.noticed, (
                deaths
            )
            assert record["candidate"]["version"] != record["current"]["version"] and alerts[-1:] == [True], deaths
            assert len(pointer.read_current(Checkpoint(str(place)))["history"]) == 3, deaths
            shown = json.loads(Checkpoint(str(place)).read(layout.METRICS))
            assert shown["version"] == record["candidate"]["version"]
            deaths += 1
    assert deaths == 5, "the drift, the decision before, CURRENT, the metrics, the decision after"
