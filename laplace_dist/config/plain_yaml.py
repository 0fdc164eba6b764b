"""YAML as people who write settings mean it: plain values, every name once, dates as text, and 1e-3 as a number, as in JSON."""

from __future__ import annotations

import re
from typing import Any

import yaml

_NUMBER = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
)  # of YAML 1.2; PyYAML's asks for a dot and a sign
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Twice(yaml.YAMLError):
    """A name that a mapping has more than once."""


class _Loader(yaml.SafeLoader):
    """Plain values only; of a name that is given several times YAML itself lets the last one win without a word."""

    yaml_implicit_resolvers = dict(_RESOLVERS)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in names:
                    raise _Twice(f"{key.value} is given twice, again at line {key.start_mark.line + 1}; keep one")
                names.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what the loader, or another program's, would take for more than text."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{_NUMBER.pattern})$"), list("-+.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds: plain values only, whatever tags it carries.

    Raises:
        ValueError: It is not YAML, asks for something other than plain values, or gives a name twice.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except _Twice as error:
        raise ValueError(str(error)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"is not YAML{where} ({getattr(error, 'problem', 'syntax')})") from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # of PyYAML's constructors
        raise ValueError(f"holds a value that YAML cannot build ({type(error).__name__})") from None


def dump_yaml(values: Any) -> str:
    """Return the text from which `parse_yaml` reads these plain values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
