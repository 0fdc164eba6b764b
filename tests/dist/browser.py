"""A headless Chromium that opens one page and reports what it did."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [  # quiet: without them the browser itself asks hosts of its maker's
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OVERFLOWING = """() => {
  const width = document.documentElement.clientWidth, wrong = [];
  const inside = element => element.closest('.scroll, svg, details:not([open])');
  for (const element of document.body.querySelectorAll('*')) {
    const box = element.getBoundingClientRect();
    if (box.width && !inside(element) && (box.right > width + 0.5 || box.left < -0.5))
      wrong.push(element.tagName + '.' + element.className + ' ' + element.textContent.slice(0, 40));
  }
  return {page: document.scrollingElement.scrollWidth, width, wrong};
}"""


@dataclass
class Seen:
    """What a page did while it was open.

    Attributes:
        page: Playwright's page.
        console: Lines of the console that are errors or warnings, and uncaught errors.
        requests: URLs that were asked for, the page's own left out.
    """

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def executable() -> str:
    """Return the path of the browser."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise AssertionError(
            "The report is tested in a browser, and there is no Chromium on this machine: `make test` installs Debian's where "
            "it may (apt-get install chromium); elsewhere install it, or put it on the PATH."
        )
    return found


@contextmanager
def started() -> Iterator[Browser]:
    """Start a browser; every page that it opens has a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=FLAGS, headless=True)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = 375, scheme: str = "light") -> Iterator[Seen]:
    """Open a file with a fresh profile, in so many pixels of width."""
    url = path.resolve().as_uri()
    with browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme) as profile:
        page = profile.new_page()
        seen = Seen(page)
        page.on("console", lambda line: seen.console.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.console.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url) if request.url != url else None)
        page.goto(url)
        yield seen
