"""The jobs that only look at a run, from the command line: how far it is, and its report. They need no Ray and no model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live

from laplace_dist.cli import exit_status
from laplace_dist.config.command_line import load_config
from laplace_dist.config.settings import Config
from laplace_dist.report.html.task import write_report
from laplace_dist.report.status import at_work, lines, observed
from laplace_dist.run.checkpoint import open_store

EVERY = 2.0  # seconds between two looks
UNCHANGED = "Nothing was changed."


def status_main(argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Say how far a run is, from its checkpoint alone; with `--watch` until its newest job has ended.

    Args:
        argv: Arguments without the program's name; those of this process if not given.
        **defaults: The job's own settings, by field name.

    Returns:
        The exit status: 0 said; 2 there is no run; 1 something of it is damaged; 130 and 143 interrupted.
    """
    parser = _parser("Say how far a run is, from anywhere that reaches its checkpoint.", defaults)
    parser.add_argument(
        "--watch", action="store_true", help="look again every two seconds, until its newest job has ended"
    )
    given = parser.parse_args(list(sys.argv[1:] if argv is None else argv))

    def look() -> int:
        config = _config(given, defaults)

        def shown() -> tuple[str, bool]:
            found = observed(config.checkpoint, config.storage_options)
            return "\n".join(lines(found)), given.watch and at_work(found)

        _show(shown)
        return 0

    return exit_status(look, UNCHANGED)


def report_main(argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Make the report of a run again, from its checkpoint alone; arguments as of `status_main`.

    Returns:
        The exit status: 0 written; 2 there is no run; 1 something that the report shows is damaged; 130 and 143 interrupted.
    """
    parser = _parser("Make the report of a run again, from its checkpoint alone, in this process.", defaults)
    parser.add_argument(
        "--evaluation", metavar="KEY", help="the evaluation to show, such as evaluation/….json (the latest)"
    )
    given = parser.parse_args(list(sys.argv[1:] if argv is None else argv))

    def write() -> int:
        print(f"report: {write_report(open_store(_config(given, defaults)), given.evaluation)}")
        return 0

    return exit_status(write, UNCHANGED)


def _parser(text: str, defaults: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False)
    parser.add_argument("url", nargs="?", metavar="URL", help="the checkpoint, as --checkpoint")
    parser.add_argument("--checkpoint", help=f"directory or URL of the run ({defaults.get('checkpoint')})")
    parser.add_argument("--storage-options", help="endpoint and credentials, as JSON or YAML")
    parser.add_argument("--config", metavar="FILE.yaml", help="the settings of the run's jobs; flags win")
    return parser


def _config(given: argparse.Namespace, defaults: dict[str, Any]) -> Config:
    checkpoint = given.url if given.url is not None else given.checkpoint
    named = {"--config": given.config, "--checkpoint": checkpoint, "--storage-options": given.storage_options}
    typed = [f"{flag}={value}" for flag, value in named.items() if value is not None]
    return load_config(typed, defaults={"model": "-", "data": "-", **defaults})


def _show(shown: Any) -> None:
    """Print what is shown; while there is more to come, in a terminal in place of the text before, elsewhere if it changed."""
    text, more = shown()
    if not more or not sys.stdout.isatty():
        print(text, flush=True)
    if more and sys.stdout.isatty():
        with Live(text, console=Console(), auto_refresh=False) as display:
            while more:
                time.sleep(EVERY)
                text, more = shown()
                display.update(text, refresh=True)
        return
    while more:
        time.sleep(EVERY)
        before, (text, more) = text, shown()
        if text != before:
            print(text, flush=True)
