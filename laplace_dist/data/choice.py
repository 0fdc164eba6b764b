"""Which columns of a table make an example, and in which form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError, listed

_OF_PANDAS = re.compile(r"__index_level_[0-9]+__$")  # an index that a table of pandas had
_DEFAULT_X = Config.model_fields["dict_key_x"].default
TWICE = "two columns of one name"
ARGUMENTS = ("columns", "group", "index")  # what --data-args may hold for files; `index` is of tar shards


@dataclass(frozen=True)
class Choice:
    """Columns that make an example.

    Attributes:
        names: Of the columns; inputs and targets of a pair.
        targets: Name of the targets.
        pair: Whether an example is a pair; else it is a mapping.
        group: Name of the column that says which group an example is of; None if there is none.
        weight: Name of the column that says how much an example counts; None if there is none.
    """

    names: tuple[str, ...]
    targets: str
    pair: bool
    group: str | None = None
    weight: str | None = None

    @property
    def used(self) -> list[str]:
        """Every column that is read."""
        others = [name for name in (self.group, self.weight) if name]
        return [*dict.fromkeys([*self.names, self.targets, *others])]

    def example(self, values: Mapping[str, Any]) -> Any:
        """Return the values of one or more rows as an example or a batch; targets that are whole numbers as int64."""
        y = values[self.targets]
        if isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex():
            y = y.long()
        return (
            (values[self.names[0]], y)
            if self.pair
            else {**{name: values[name] for name in self.names}, self.targets: y}
        )


def choose(config: Config, there: Mapping[str, str], where: str) -> Choice:
    """Return the columns that make an example.

    With `columns` under `--data-args`: a mapping of these. With `--dict-key-x`: a pair of that column and `--dict-key-y`'s.
    With columns `x` and `y`: a pair of these. Else a mapping of all columns but the group's, the weights' and pandas' index.

    Args:
        config: The settings.
        there: For each column that is there what torch cannot join about it, such as `strings`, or nothing.
        where: The files in a person's words.

    Raises:
        SettingsError: A column is not there, or cannot become a tensor and there is no `--collate`.
    """
    _check_arguments(config)
    given = config.data_args
    group = given.get("group", "group" if "group" in there else None)
    weight = config.example_weights if config.example_weights in there else None
    beside = group, weight
    y, flag_x = config.dict_key_y, "--dict-key-x"
    if "columns" in given:
        names, flag_x = tuple(dict.fromkeys(given["columns"])), "--data-args: columns"
        choice = Choice(names, y, False, *beside)
    elif config.dict_key_x != _DEFAULT_X:
        choice = Choice(tuple(dict.fromkeys([config.dict_key_x, y])), y, True, *beside)
    elif {"x", "y"} <= there.keys():
        choice = Choice(("x", "y"), "y", True, *beside)
    else:
        names = tuple(name for name in there if name not in beside and not _OF_PANDAS.match(name))
        choice = Choice(names, y, False, *beside)
    _check_there(choice, there, where, flag_x)
    if choice.targets not in choice.names:
        raise SettingsError(f"--data-args: columns lacks that of the targets, {y!r} (--dict-key-y); add it")
    if config.collate is None:
        _check_joinable(choice, there, where)
    return choice


def _check_arguments(config: Config) -> None:
    """Refuse arguments that files have no use for."""
    given = config.data_args
    if wrong := [name for name in given if name not in ARGUMENTS]:
        raise SettingsError(
            f"--data-args: {listed(wrong)} given, but {config.data!r} is no callable; for files there are "
            f"{listed(list(ARGUMENTS))}"
        )
    if not _names(given.get("columns", ["x"])) or not isinstance(given.get("group"), str | None):
        raise SettingsError(
            "--data-args: columns takes a list of names, such as '{columns: [input_ids, labels]}', group one name"
        )


def _check_there(choice: Choice, there: Mapping[str, str], where: str, flag_x: str) -> None:
    """Refuse columns that are not there, or twice, by the flags that name them."""
    wanted = {**dict.fromkeys(choice.names, flag_x), choice.targets: "--dict-key-y"}
    wanted |= {choice.group: "--data-args: group"} if choice.group else {}
    wanted |= {choice.weight: "--example-weights"} if choice.weight else {}
    for name, flag in wanted.items():
        if name not in there:
            raise SettingsError(f"{flag}: {where} has no column {name!r}; it has {listed(list(there))}")
        if there[name] == TWICE:
            raise SettingsError(f"{flag}: {where} has two columns {name!r}; rename one")


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(name, str) for name in value)


def _check_joinable(choice: Choice, there: Mapping[str, str], where: str) -> None:
    odd = [name for name in choice.names if there[name]]
    if odd:
        ways = ["make tensors of it with --collate"]
        if odd[0] == choice.targets:
            ways.insert(0, "give each class a number from 0")
        if not choice.pair:
            ways.insert(0, "leave it out with --data-args '{columns: [...]}'")
        raise SettingsError(f"--data: column {odd[0]!r} of {where} holds {there[odd[0]]}; {', or '.join(ways)}")
