"""Kinds of values that settings take, each with its check; and settings as a class, which name what they refuse."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from laplace_dist.config import chosen_windows, gates
from laplace_dist.config.chosen_windows import LONGEST
from laplace_dist.config.refusals import CREDENTIALS, message_of, problems_of
from laplace_dist.errors import SettingsError

_OWN_SPLITS = ("train", "val", "test")
_OF_SPLITS = f"of letters, digits, '_', '-' or '.', at most {LONGEST} bytes, other than train, val and test"


class Checked(BaseModel):
    """Settings, checked and immutable.

    Raises:
        SettingsError: Naming each field that is refused, its value, and what is accepted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = tuple(problems_of(error, values, type(self).model_fields))
            raise SettingsError(message_of(problems, {}), problems) from None


def _no_credentials(value: str) -> str:
    if CREDENTIALS.search(value):
        raise ValueError("credentials in a URL would be stored; give them as storage options")
    return value


def _json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("values that JSON can hold, since they are stored with the run") from None
    return value


def _is_new_split(name: str) -> bool:
    return name not in _OWN_SPLITS and chosen_windows.is_short(name) and re.fullmatch(r"[\w.-]+", name) is not None


def _new_split(value: str) -> str:
    if not _is_new_split(value):
        raise ValueError(f"a name {_OF_SPLITS}")
    return value


def _new_splits(value: list[str]) -> list[str]:
    if not all(_is_new_split(name) and value.count(name) == 1 for name in value):
        raise ValueError(f"distinct names {_OF_SPLITS}")
    return value


def _distinct(value: list[int]) -> list[int]:
    if len(set(value)) < len(value):
        raise ValueError("distinct indices of outputs")
    return sorted(value)


def _range(value: list[float]) -> list[float]:
    if not 0 < value[0] < value[1] < float("inf"):
        raise ValueError("two positive numbers, the lower one first")
    return value


def _gates(value: list[str]) -> list[str]:
    for text in value:
        gates.parse(text)
    return value


Count = Annotated[int, Field(ge=1, lt=2**31)]  # what libraries below count with
Name = Annotated[str, Field(min_length=1)]
Location = Annotated[str, AfterValidator(_no_credentials)]
RunLocation = Annotated[Name, AfterValidator(_no_credentials)]
Arguments = Annotated[dict[str, Any], AfterValidator(_json)]
NewSplit = Annotated[Name, AfterValidator(_new_split)]
NewSplits = Annotated[list[str], AfterValidator(_new_splits)]
Outputs = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), AfterValidator(_distinct)]
PriorRange = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_range)]
WindowName = Annotated[str, AfterValidator(chosen_windows.checked_name)]
Windows = Annotated[Name, AfterValidator(chosen_windows.checked)]
Gates = Annotated[list[str], AfterValidator(_gates)]
