"""A job from the command line: its arguments, its exit status, what is printed at the end."""

from __future__ import annotations

import argparse
import gc
import math
import signal
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from laplace_dist.execution.imports import uncollected

with uncollected():
    from laplace_dist import cli_settings
    from laplace_dist.config import command
    from laplace_dist.config.command_line import load_config
    from laplace_dist.config.settings import Config
    from laplace_dist.data.sources import load_split
    from laplace_dist.errors import CheckpointError, Interrupted, RunFailed, SettingsError
    from laplace_dist.execution import signals
    from laplace_dist.job import evaluate_posterior, fit, tune_posterior
    from laplace_dist.planning import estimate
    from laplace_dist.recalibration import recalibrate, rollback
    from laplace_dist.report import planned
    from laplace_dist.report.console import printed
    from laplace_dist.report.loading import loading_lines
    from laplace_dist.report.metrics import show_recalibration, show_result
    from laplace_dist.report.verification import lines, verify
    from laplace_dist.run import settings_file
    from laplace_dist.run.checkpoint import open_store
    from laplace_dist.run.combination import place_of
    from laplace_dist.run.ownership import read_plan

gc.freeze()  # who imports this is a job's own process, which keeps what it has imported: a look at all of that takes 0.2 s

JOBS = {"fit": fit, "tune": tune_posterior, "evaluate": evaluate_posterior}


def main(job: str, argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Carry out a job from the command line.

    Args:
        job: `fit`, `tune` or `evaluate`.
        argv: Arguments without the program's name; those of this process if not given.
        **defaults: The job's own settings, by field name.

    Returns:
        The exit status: 0 done; 2 the settings or the state refuse; 1 the run failed; 130 and 143 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    def carry_out() -> int:
        cli_settings.refuse_idle(argv, command.OF_RECALIBRATIONS, command.RECALIBRATE)
        if job != "fit":
            cli_settings.refuse_idle(argv, command.OF_MAPS, "the fit's job")
        config = cli_settings.settings_of_job(job, argv, defaults)
        cli_settings.keep_config_file(argv, config)
        cli_settings.say_idle(argv, config, command.OF_RECALIBRATIONS, command.RECALIBRATE)
        result = JOBS[job](config)
        show_result(result, loading_lines(config, result.checkpoint))
        return 0

    return exit_status(carry_out, "Everything committed so far is kept: run the same command again to go on.")


def recalibrate_main(argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Add a window of data to a run from the command line, or drop one, and promote the result if it is no worse.

    Args:
        argv: Arguments without the program's name; those of this process if not given.
        **defaults: The job's own settings, by field name.

    Returns:
        The exit status: 0 promoted, or nothing to do; 3 the current posterior stays; 2 the settings or the state refuse; 1 the
        run failed; 130 and 143 interrupted.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--drop-window", metavar="NAME", help="add nothing, and leave this window out")
    parser.add_argument("--dry-run", action="store_true", help="decide, and promote nothing")
    parser.add_argument("--rollback", metavar="VERSION", help="make a version current again that was so before")
    given, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    if "--help" in rest or "-h" in rest:
        parser.print_help()

    def carry_out() -> int:
        if given.rollback is not None and (given.dry_run or given.drop_window is not None):
            other = "--dry-run" if given.dry_run else "--drop-window"
            raise SettingsError(
                f"--rollback: given with {other}, which it would not heed; give one of them. Nothing was changed"
            )
        if given.drop_window is not None and any(text.partition("=")[0] == "--window" for text in rest):
            raise SettingsError(
                "--drop-window: given with --window, which it would not heed, since it adds nothing; give one of them. Nothing "
                "was changed"
            )
        cli_settings.refuse_idle(rest, command.OF_FITS, "the fit's job")
        config = cli_settings.settings_of_job("recalibrate", rest, defaults)
        cli_settings.say_idle(rest, config, command.OF_FITS, "the fit's job")
        if given.rollback is not None:
            rollback(config.checkpoint, given.rollback, storage_options=config.storage_options)
            print(f"{config.checkpoint}: version {given.rollback} is current again")
            return 0
        found = recalibrate(config, drop_window=given.drop_window, dry_run=given.dry_run)
        if found is not None:
            show_recalibration(found)
        return 0 if found is None or found.promoted else 3

    return exit_status(carry_out, "Everything committed so far is kept: run the same command again to go on.")


def plan_main(argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Say from the command line what a fit will take.

    Args:
        argv: Arguments without the program's name, those of the fit; those of this process if not given.
        **defaults: The job's own settings, by field name.

    Returns:
        The exit status: 0 done; 2 the settings or the state refuse; 1 it cannot fit into memory; 130 and 143 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    def carry_out() -> int:
        cli_settings.refuse_idle(argv, command.OF_RECALIBRATIONS, command.RECALIBRATE)
        print("\n".join(planned.lines(estimate(cli_settings.settings_of_job("fit", argv, defaults)))))
        return 0

    return exit_status(carry_out, "Nothing was changed.")


def verify_main(argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Verify a run from the command line: in this process, or on a pool of workers if `ray-address` is among the settings.

    Args:
        argv: Arguments without the program's name; those of this process if not given.
        **defaults: The job's own settings, by field name.

    Returns:
        The exit status: 0 everything is whole; 1 something is bad; 2 the settings or the state refuse; 130 and 143
        interrupted.
    """
    text = "Check every object of a run, on a pool of workers with --ray-address, in this process without."
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="the settings of the run's jobs; flags win")
    parser.add_argument("--checkpoint", help=f"directory or URL of the run ({defaults.get('checkpoint')})")
    parser.add_argument("--storage-options", help="endpoint and credentials, as JSON or YAML")
    parser.add_argument("--collect-orphans-older-than", metavar="HOURS", help="delete attempts that no manifest names")
    parser.add_argument("--shallow", action="store_true", help="check that arrays are there, without reading them")
    parser.add_argument(
        "--data", action="store_true", help="read the run's training data again and compare them with what was read"
    )
    given, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(given).items()}
    hours, shallow, data = (flags.pop(f"--{name}") for name in ("collect-orphans-older-than", "shallow", "data"))
    typed = [f"{flag}={value}" for flag, value in flags.items() if value is not None]

    def check() -> int:
        config = load_config([*typed, *rest], defaults={"model": "-", "data": "-", **defaults})
        pool = "ray_address" in config.model_fields_set and not shallow
        of_run = cli_settings.settings_for_data(config) if data else config
        report = verify(
            config.checkpoint,
            config.storage_options,
            collect_orphans_older_than=None if hours is None else _hours(hours),
            shallow=shallow,
            data=None if not data else True if pool else _opener(of_run),
            workers=of_run if pool else None,
        )
        print("\n".join(lines(report)))
        return 0 if report.ok else 1

    return exit_status(check, "Nothing was changed, but for orphans that were collected.")


# ------------------------------------------------------------------ helpers of the jobs above


def exit_status(carry_out: Callable[[], int], interrupted: str) -> int:
    """Do what a job does, and return its exit status; errors and interruptions are lines on stderr.

    Args:
        carry_out: The job.
        interrupted: What a person is told of the state after an interruption.
    """
    try:
        with signals.heeded(), printed():
            return carry_out()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunFailed, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"interrupted by {signal.Signals(error.number).name}. {interrupted}", file=sys.stderr)
        return signals.status(error.number)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 <= hours < math.inf:
        raise SettingsError(f"--collect-orphans-older-than: got {text!r}; expected hours, at least 0")
    return hours


def _opener(config: Config) -> Callable[[str], Any]:
    """Return what opens the training split of a window of a run, of which the last one is kept."""
    store = open_store(config)
    plan = read_plan(store)

    @lru_cache(maxsize=1)
    def opened(window: str) -> Any:
        place = place_of(store, plan, window)
        return load_split(config if place is store else settings_file.data_of(config, place), "train")

    return opened
