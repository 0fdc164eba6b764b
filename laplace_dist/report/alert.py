"""Hand a record to the command of `--alert-cmd`: to whoever wakes somebody."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from laplace_dist.errors import SettingsError

SECONDS = 60.0  # after which the command is ended: a recalibration does not wait for a pager


def arguments(command: str) -> list[str]:
    """Return the words of a command as a shell would split them; no shell is started, so that nothing in it is expanded.

    Raises:
        SettingsError: A quotation has no end, or there is no word.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SettingsError(
            f"--alert-cmd: cannot be split into words ({error}); expected a command and its arguments"
        ) from None
    if not words:
        raise SettingsError("--alert-cmd: holds no word; expected a command and its arguments")
    return words


def send(command: str, record: Mapping[str, Any], say: Callable[[str], None], seconds: float = SECONDS) -> bool:
    """Run the command with the record as JSON on its standard input; a failure is a line, and changes nothing else.

    Returns:
        Whether it ended with status 0.
    """
    words = arguments(command)
    text = json.dumps(record, indent=1)
    try:
        done = subprocess.run(words, input=text, text=True, capture_output=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        why = f"it did not end within {seconds:g} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        say(f"--alert-cmd: {words[0]} was not told: {why}")
        return False
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        say(f"--alert-cmd: {words[0]} ended with status {done.returncode}: {last[:200]}")
        return False
    say(f"--alert-cmd: {words[0]} was told")
    return True
