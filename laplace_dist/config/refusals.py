"""What is said of settings that are refused: the field, its value, and what is accepted instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

_NOT_SUMS = ("gp", "functional")
_WORDS = {
    "Input should be": "expected",
    "String should have": "expected",
    "a valid integer": "a whole number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid dictionary": "a mapping",
    "a valid ": "a ",
}
CREDENTIALS = re.compile(r"://[^/@]*@")


def problems_of(
    error: ValidationError, values: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> list[tuple[str, str]]:
    """Return one `(field, text)` per field that was refused; the text says the value and what is accepted."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        name = str(item["loc"][0])
        if name in found:
            continue
        if item["type"] == "missing":
            found[name] = f"is required: {fields[name].description}"
        elif item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, fields, n=3)
            found[name] = f"no such setting. {close_matches(close)}".strip()
        else:
            found[name] = _refusal(fields[name], name, values[name], item)
    return list(found.items())


def _refusal(field: FieldInfo, name: str, value: Any, item: Mapping[str, Any]) -> str:
    """Return the value and what is accepted instead, for one value that was refused."""
    secret = name.endswith("storage_options") or (isinstance(value, str) and CREDENTIALS.search(value))
    got = f"a {type(value).__name__}" if secret else repr(value)
    choices = choices_of(field)
    if name == "hessian_structure" and value in _NOT_SUMS:
        accepted = (
            "this structure is not a sum over examples, so segments cannot be merged; use kron, diag, full or lowrank"
        )
    elif choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        path = ", or an import path module:callable" if str in plain_types(field.annotation) else ""
        accepted = f"expected one of {', '.join(choices)}{path}. {close_matches(close)}".strip()
    elif item["type"] == "value_error":
        accepted = f"expected {item['msg'].removeprefix('Value error, ')}"
        accepted = accepted.removeprefix("expected ") if secret else accepted
    else:
        accepted = item["msg"]
        for theirs, ours in _WORDS.items():
            accepted = accepted.replace(theirs, ours)
        optional = type(None) in get_args(field.annotation)
        accepted += ", or null" if optional else ""
    return f"got {got}; {accepted}"


def message_of(problems: Sequence[tuple[str, str]], labels: Mapping[str, str]) -> str:
    """Join the problems, each under the name by which the user gave the field."""
    lines = [f"{labels.get(name, f'--{name}'.replace('_', '-'))}: {text}" for name, text in problems]
    return "\n".join(lines)


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a setting takes, whether or not it may be left out."""
    annotation = field.annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal]
    return get_args(kinds[0]) if kinds else ()


def plain_types(annotation: Any) -> set[Any]:
    """Return every plain type inside an annotation, through unions and `Annotated`."""
    inner = get_args(annotation)
    return {t for a in inner for t in plain_types(a)} if inner else {annotation}


def close_matches(matches: Sequence[str]) -> str:
    """Ask for each of several names whether it was meant; nothing where there is none."""
    return f"Did you mean {' or '.join(dict.fromkeys(matches))}? " if matches else ""
