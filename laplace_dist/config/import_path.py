"""From an import path to the callable that it names, and to what that returns."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from laplace_dist.errors import CallFailed, CheckpointError, SettingsError

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_callable(path: str, field: str = "--model") -> Callable[..., Any]:
    """Import `module:attribute`, looking in the current directory too.

    Args:
        path: Import path; the attribute may be dotted.
        field: Name of the setting, for messages.

    Raises:
        SettingsError: Bad form, no such module or attribute, not callable, or the module cannot be imported.
    """
    if not IMPORT_PATH.fullmatch(path):
        raise SettingsError(f"{field}: got {path!r}; expected an import path of the form module:callable")
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise SettingsError(f"{field}: got {path!r}; that module needs {error.name!r}, which is missing") from error
        raise SettingsError(
            f"{field}: got {path!r}; there is no module {error.name!r} in {os.getcwd()} or on the Python path"
        ) from error
    except OSError:  # of a disk or network, which may be back later
        raise
    except Exception as error:  # noqa: BLE001 - whatever the user's module does
        raise SettingsError(
            f"{field}: got {path!r}; importing {module_name!r} raises {type(error).__name__}: {error}{_where(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = ", ".join(name for name in dir(found) if not name.startswith("_"))
            raise SettingsError(f"{field}: got {path!r}; {module_name!r} has no {attribute!r}, it has: {names[:300]}")
        found = getattr(found, part)
    if not callable(found):
        raise SettingsError(f"{field}: got {path!r}, which is a {type(found).__name__}; expected a callable")
    return found


def _where(error: Exception) -> str:
    """The line of the user's that raised an error; a syntax error says it itself."""
    if isinstance(error, SyntaxError):
        return ""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f" ({last.filename}, line {last.lineno})"


def call(path: str, field: str, arguments: Mapping[str, Any]) -> Any:
    """Call what an import path names, after checking that it takes these arguments."""
    function = load_callable(path, field)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise SettingsError(
            f"{field}: {path!r} cannot be called with {', '.join(arguments) or 'no arguments'} ({error}); "
            f"change its signature {inspect.signature(function)} or {field}-args"
        ) from error
    try:
        return function(**arguments)
    except (SettingsError, CheckpointError, OSError, MemoryError):  # of a disk or network, which may be back later
        raise
    except Exception as error:  # whatever the user's function does
        if isinstance(error, RuntimeError) and re.search("memory|CUDA|allocat", str(error)):
            raise  # of this machine, which others need not share
        raise CallFailed(f"{field}: {path!r} raises {type(error).__name__}: {error}{_where(error)}") from error
