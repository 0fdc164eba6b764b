"""A training by empirical Bayes from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from laplace_dist.cli import exit_status
from laplace_dist.cli_settings import keep_config_file, refuse_idle, say_idle
from laplace_dist.config.command import OF_RECALIBRATIONS, RECALIBRATE
from laplace_dist.config.command_line import load_config_and
from laplace_dist.config.plain_yaml import parse_yaml
from laplace_dist.config.training import Training
from laplace_dist.errors import SettingsError
from laplace_dist.marglik import Trained, marglik_train


def marglik_main(argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Train weights and hyperparameters together from the command line.

    Args:
        argv: Arguments without the program's name; those of this process if not given.
        **defaults: The job's own settings, by field name.

    Returns:
        The exit status: 0 done; 2 the settings or the state refuse; 1 the run failed; 130 and 143 interrupted.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    if "--help" in rest or "-h" in rest:
        parser.print_help()

    def carry_out() -> int:
        refuse_idle(rest, OF_RECALIBRATIONS, RECALIBRATE)
        own = defaults
        if not any(argument.partition("=")[0] in ("--model", "--config") for argument in rest):
            from laplace_dist import demo

            own = {**demo.settings(), "ood": [], **defaults}
        config, filed = load_config_and(Training.model_fields, rest, defaults=own)
        keep_config_file(rest, config)
        say_idle(rest, config, OF_RECALIBRATIONS, RECALIBRATE)
        flags = {name: _value(name, text) for name, text in vars(given).items()}
        found = marglik_train(config, Training(**{**{n: _number(n, value) for n, value in filed.items()}, **flags}))
        print("\n".join(lines(found)))
        return 0

    return exit_status(carry_out, "Every committed epoch is kept: run the same command again to go on.")


def lines(found: Trained) -> list[str]:
    """Return what a training came to, for people."""
    shown = [
        f"epochs     {len(found.losses)}, training loss {found.losses[0]:.6g} at first, {found.losses[-1]:.6g} at last"
    ]
    if found.best_epoch is None:
        shown.append("evidence   was not estimated")
    else:
        shown.append(f"evidence   {-found.margliks[-1]:.6g} at last; the best posterior is of epoch {found.best_epoch}")
    shown.append(f"weights    {found.weights}")
    shown.append(f"posterior  laplace_dist.load_trained({found.checkpoint!r}, model)")
    if found.report is not None:
        shown.append(f"report     {found.report}")
    return shown


def _parser() -> argparse.ArgumentParser:
    """Return a parser of the training's own flags, whose values `Training` checks."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("of the training")
    for name, field in Training.model_fields.items():
        flag, shown = f"--{name.replace('_', '-')}", "" if field.default in (None, {}) else f" ({field.default})"
        text = f"{field.description}{shown}".replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=field.description)
        else:
            group.add_argument(flag, metavar=name.upper(), help=text)
    return parser


def _value(name: str, text: Any) -> Any:
    """Turn a flag's text into a value; what does not fit is left to the validation."""
    if not isinstance(text, str) or name in ("optimizer", "scheduler"):
        return text
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"--{name.replace('_', '-')}: got {text!r}; it {error}") from None
    return _number(name, value)


def _number(name: str, value: Any) -> Any:
    """Take a whole number for a field of real ones."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if Training.model_fields[name].annotation is float and whole else value
