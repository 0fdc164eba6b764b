"""The report's page in a browser: quiet, alone, as wide as a phone, legible in light and dark, and proof against names."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import browser
import pytest
import report_cases

from laplace_dist.report.html.facts import facts
from laplace_dist.report.html.page import page
from laplace_dist.run.checkpoint import Checkpoint

HTML = report_cases.HTML


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the pages of a month of recalibrations, of a regression with groups, and of one whose names hold HTML."""
    top = tmp_path_factory.mktemp("pages")
    report_cases.month(top / "month")
    report_cases.inline(report_cases.regression(top / "regression"))
    hostile = {"data_args": {"hostile": True}, "model_args": {"note": HTML}}
    report_cases.inline(report_cases.regression(top / f"{HTML.replace('/', '')} run", **hostile))
    found = {path.parent.name.partition(" ")[0]: path for path in top.glob("*/report.html")}
    assert len(found) == 3
    return {"hostile" if name.startswith("<") else name: path for name, path in found.items()}


@pytest.fixture(scope="module")
def opened():
    """Return what opens a page in a browser that is started once."""
    with browser.started() as chromium:
        yield partial(browser.opened, chromium)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["month", "regression", "hostile"])
def test_nothing_overflows_a_phone_nothing_is_asked_for_and_the_console_is_quiet(opened, pages, name, scheme):
    with opened(pages[name], width=375, scheme=scheme) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
        found = seen.page.evaluate(browser.OVERFLOWING)
        assert (found["page"], found["width"], found["wrong"]) == (375, 375, [])
        assert seen.page.locator("figure svg").count() >= 5
        assert (seen.console, seen.requests) == ([], [])


def test_text_in_figures_stands_out_from_the_page_in_light_and_dark(opened, pages):
    """WCAG's ratio of luminances is at least 4.5 for small text."""
    colours = """() => [...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill)
        .concat([getComputedStyle(document.querySelector('section')).backgroundColor])"""
    for scheme in ("light", "dark"):
        with opened(pages["month"], width=1000, scheme=scheme) as seen:
            *texts, surface = seen.page.evaluate(colours)
        assert texts and all(contrast(text, surface) >= 4.5 for text in set(texts)), (scheme, set(texts), surface)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours such as `rgb(1, 2, 3)`."""
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_is_that_of_the_standard():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)


def test_the_json_in_the_page_is_that_beside_it(opened, pages):
    for path in pages.values():
        with opened(path) as seen:
            inside = json.loads(
                seen.page.locator("#numbers").inner_text() or seen.page.locator("#numbers").text_content()
            )
        assert inside == json.loads((path.parent / "report" / "numbers.json").read_text())


def test_what_was_not_looked_at_for_drift_is_said_on_the_page(pages):
    """The demo's fresh examples are the same every week."""
    text, numbers = pages["month"].read_text(), json.loads((pages["month"].parent / "report/numbers.json").read_text())
    assert "Nothing was looked at." in text and "Nothing was noticed" not in text
    assert "Not looked at entropy, features, nll, labels: the examples of test are no new ones." in text
    assert len(numbers["fitted"]["recalibrations"]) == 2 and text.count("python jobs/recalibrate.py") >= 2


def test_names_with_html_in_them_are_shown_as_they_are_and_never_run(opened, pages):
    """Of the run, its model's arguments and a group, as a user can give them."""
    with opened(pages["hostile"]) as seen:
        assert seen.page.locator("img").count() == 0 and seen.page.locator("script").count() == 1
        text = seen.page.locator("main").inner_text()
        assert HTML in text and f"outside {HTML}" in seen.page.locator("#slices").inner_text()
        assert json.loads(seen.page.locator("#numbers").text_content())["fitted"]["model"]["args"] == {"note": HTML}
        assert (seen.console, seen.requests) == ([], [])


def planted(values, path=()):
    """Return the numbers of a report with HTML in place of, or behind, every text and name in them."""
    if isinstance(values, dict):
        return {name: planted(value, (*path, name)) for name, value in values.items()}
    if isinstance(values, list):
        return [planted(value, path) for value in values]
    fixed = ("style", "kind", "state", "verdict", "at", "begun")  # words of our own
    return f"{values}{HTML}" if isinstance(values, str) and path[-1] not in fixed else values


def test_html_in_any_text_of_the_numbers_is_escaped(opened, pages, tmp_path):
    """In a split's name, a model's, a window's, a factor's, a reason: whatever a checkpoint may be made to hold."""
    found = planted(facts(Checkpoint(str(pages["month"].parent))))
    split = f"inverted{HTML}"
    for column in found["calibration"]["columns"]:
        for name in ("outside", "roc"):
            column[name][split] = column[name].pop("inverted")
            column[name][f"shuffled{HTML}"] = column[name].pop("shuffled")
    assert split in found["calibration"]["splits"]
    path = Path(tmp_path / "planted.html")
    path.write_text(page(found), encoding="utf-8")
    with opened(path) as seen:
        assert seen.page.locator("img").count() == 0 and seen.page.locator("script").count() == 1
        for name in (split, f"laplace_dist.demo:network{HTML}", f"week-1{HTML}"):
            assert name in seen.page.locator("main").inner_text(), name
        assert seen.page.evaluate("document.scrollingElement.scrollWidth") == 375
        assert json.loads(seen.page.locator("#numbers").text_content()) == found
        assert (seen.console, seen.requests) == ([], [])


def test_a_page_that_was_not_escaped_would_be_found_out(opened, pages, tmp_path):
    """The checks above see a script that runs, a request, and what overflows."""
    bad = '<img src="https://example.org/x.png"><script>console.error("ran")</script><p style="width: 900px">wide</p>'
    text = pages["regression"].read_text().replace("<main>", f"<main>{bad}")
    policy = text.index('<meta http-equiv="Content-Security-Policy"')
    path = tmp_path / "bad.html"
    path.write_text(text[:policy] + text[text.index(">", policy) + 1 :])
    with opened(path) as seen:
        assert "ran" in seen.console and "https://example.org/x.png" in seen.requests
        assert seen.page.evaluate(browser.OVERFLOWING)["wrong"]


def test_a_run_without_a_posterior_has_a_page_too(opened, tmp_path):
    store = Checkpoint(str(tmp_path / "run"))
    with report_cases.job(report_cases.regression(store.url)) as job:
        job.open()
        job.map()
    found = copy.deepcopy(facts(store))
    assert found["metrics"] is None and "no posterior yet" in found["notes"][0]
    path = tmp_path / "early.html"
    path.write_text(page(found))
    with opened(path) as seen:
        assert "no posterior yet" in seen.page.locator(".note").inner_text()
        assert (seen.console, seen.requests) == ([], [])


def test_a_missing_browser_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssertionError, match=r"there is no Chromium on this machine: `make test` installs Debian's"):
        browser.executable()
