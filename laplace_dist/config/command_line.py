"""From a command line and a YAML file to settings; flags win."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from laplace_dist.config.plain_yaml import parse_yaml
from laplace_dist.config.refusals import choices_of, close_matches, message_of, plain_types
from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError


def load_config(argv: Sequence[str], *, defaults: Mapping[str, Any] | None = None, note: str | None = None) -> Config:
    """Build the settings from a command line; flags win over the `--config` file, which wins over the defaults.

    Args:
        argv: Arguments without the program's name.
        defaults: The job's own defaults, by field name.
        note: What `--help` says before the flags.

    Raises:
        SettingsError: Naming the field as it was typed, its value, and what is accepted.
    """
    return load_config_and((), argv, defaults=defaults, note=note)[0]


def load_config_and(
    others: Collection[str], argv: Sequence[str], *, defaults: Mapping[str, Any] | None = None, note: str | None = None
) -> tuple[Config, dict[str, Any]]:
    """Build the settings as `load_config` does, and return with them what the file holds of a job's further settings.

    Args:
        others: Names of the further settings.
        argv: As of `load_config`, as what follows.
        defaults: See there.
        note: See there.
    """
    flags = vars(_parser(defaults or {}, note).parse_args(list(argv)))
    path = flags.pop("config", None)
    values, labels, further = dict(defaults or {}), {}, {}
    if path is not None:
        for key, value in _read_yaml(path).items():
            name = str(key).replace("-", "_")
            own = name not in others
            name = _field(str(key), f"in {path}") if own else name
            if labels.get(name):
                raise SettingsError(f"{key} in {path}: given twice; keep one")
            (values if own else further)[name], labels[name] = value, f"{key} (in {path})"
    for name, text in flags.items():
        labels[name] = f"--{name.replace('_', '-')}"
        values[name] = _from_text(name, text, labels[name])
    try:
        return Config(**values), further
    except SettingsError as error:
        raise SettingsError(message_of(error.problems, labels), error.problems) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        known = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        close = [match for flag in unknown for match in difflib.get_close_matches(flag, known, n=3)]
        # What was typed may hold a secret: of an unrecognised argument only the name of the flag is repeated.
        text = f"unrecognized argument {', '.join(unknown)}" if unknown else "an argument that belongs to no flag"
        text = message if message.startswith("argument ") else text
        raise SettingsError(f"{text}. {close_matches(close)}See --help.")


def _parser(defaults: Mapping[str, Any], note: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with one dashed flag per field; what is not given is absent from its result."""
    parser = _Parser(description=note, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings, by the names of these flags; flags win")
    for name, field in Config.model_fields.items():
        default = defaults.get(name, None if field.is_required() else field.get_default())
        shown = "" if default is None or default in ({}, []) or isinstance(default, bool) else f" ({default})"
        choices = choices_of(field)
        text = f"{field.description}{': ' + ', '.join(choices) if choices else ''}{shown}".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif name == "ood":
            parser.add_argument(flag, nargs="*", metavar="SPLIT", help=text)
        elif name == "outputs":
            parser.add_argument(flag, nargs="+", metavar="INDEX", help=text)
        elif name == "prior_range":
            parser.add_argument(flag, nargs=2, metavar=("LOW", "HIGH"), help=text)
        elif name == "gate":
            parser.add_argument(flag, action="append", metavar="THRESHOLD", help=text)
        else:
            parser.add_argument(flag, metavar=name.upper(), help=text)
    return parser


def _from_text(name: str, text: Any, label: str) -> Any:
    """Turn a flag's text into what the field expects; text that does not fit is left for the validation."""
    annotation = Config.model_fields[name].annotation
    if get_origin(annotation) is dict:
        try:
            value = parse_yaml(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            got = "" if name.endswith("storage_options") else f"got {text!r}; "  # which may hold a secret
            raise SettingsError(
                f'{label}: {got}expected a mapping as JSON or YAML text, such as \'{{"name": "value"}}\''
            )
        return value
    if name == "prior_range":
        return [_from_text("decay", part, label) for part in text]  # two numbers
    if name == "outputs":
        return [_from_text("batch_size", part, label) for part in text]  # whole numbers
    kinds = [kind for kind in (int, float) if kind in plain_types(annotation)]
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read_yaml(path: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"--config {path}: cannot be read ({error}); give a YAML file") from None
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"--config {path}: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise SettingsError(
            f"--config {path}: holds a {type(value).__name__}; expected lines of the form 'name: value'"
        )
    return value or {}


def _field(key: str, where: str) -> str:
    """Return the field for a key of the YAML file, with dashes or underscores."""
    name = key.replace("-", "_")
    if name not in Config.model_fields:
        dashed = [n.replace("_", "-") for n in Config.model_fields]
        close = difflib.get_close_matches(name.replace("_", "-"), dashed, n=3)
        raise SettingsError(f"{key} {where}: no such setting. {close_matches(close)}See --help for all of them.")
    return name
