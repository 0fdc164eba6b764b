"""A training by empirical Bayes from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from laplace_dist.cli import exit_status
from laplace_dist.config.command_line import load_config, parse_yaml
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
        if not any(argument.partition("=")[0] in ("--model", "--config") for argument in rest):
            from laplace_dist import demo

            config = load_config(rest, defaults={**demo.settings(), "ood": [], **defaults})
        else:
            config = load_config(rest, defaults=defaults)
        found = marglik_train(config, Training(**{name: _value(name, text) for name, text in vars(given).items()}))
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
    return shown


def _parser() -> argparse.ArgumentParser:
    """Return a parser of the training's own flags, whose values `Training` checks."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("of the training")
    for name, field in Training.model_fields.items():
        flag, text = f"--{name.replace('_', '-')}", f"{field.description} ({field.default})".replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=field.description)
        else:
            group.add_argument(flag, metavar=name.upper(), help=text)
    return parser


def _value(name: str, text: Any) -> Any:
    """Turn a flag's text into a value; what does not fit is left to the validation."""
    if not isinstance(text, str) or name == "optimizer":
        return text
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"--{name.replace('_', '-')}: got {text!r}; it {error}") from None
    kind = Training.model_fields[name].annotation
    return float(value) if kind is float and isinstance(value, int) else value
