"""What holds of every file of YAML, whatever it says: nothing empty, nothing twice, no white space around a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

_SCRIPT = re.compile(r"(^|\.)(data|args|entrypoint|\w+_commands)(\.|$)")  # what a shell or a job reads
_NAMES = ("name", "groupName", "mountPath", "DeviceName")  # by which the items of a list are told apart


class _Loader(yaml.SafeLoader):
    """Refuses a field that is given twice, of which YAML itself would take the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key}: is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def load(text: str) -> list[Any]:
    """Return the documents of a file; what YAML says of it if it cannot be read."""
    try:
        return [document for document in yaml.load_all(text, _Loader) if document is not None]  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        return [error]


def check(value: Any, where: str = "") -> Iterator[str]:
    """Yield what no field may be, with its path.

    Args:
        value: A document, or what lies in it.
        where: The path of it.
    """
    if isinstance(value, yaml.YAMLError):
        yield " ".join(str(value).split())
    elif value is None:
        yield f"{where}: is empty; give it a value or leave it out"
    elif isinstance(value, str) and value != value.strip() and not _SCRIPT.search(where):
        yield f"{where}: {value!r} has white space around it"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from check(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        yield from _check_items(value, where)


def _check_items(items: list[Any], where: str) -> Iterator[str]:
    """Yield what is wrong with a list: items that are the same, or of the same name."""
    for place, item in enumerate(items):
        yield from check(item, f"{where}.{place}")
        if item in items[:place]:
            yield f"{where}: {item!r} is there twice"
    for name in _NAMES:
        given = [item[name] for item in items if isinstance(item, dict) and name in item]
        if twice := sorted({str(value) for value in given if given.count(value) > 1}):
            yield f"{where}: the {name} {', '.join(twice)} is there twice"
