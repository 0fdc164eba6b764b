"""Command lines of manifests, read by the parsers that would get them: those of Ray and of the jobs; nothing is run."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
WORKDIR = "/opt/laplace-dist"
DAY = "2026-01-31"  # in place of what `date` would say
_DATE = re.compile(r"\$\(date (-u -d yesterday|-u) \+%F\)")
_WINDOWS = r"all|last:[1-9]\d*|[\w-][\w.-]*(,[\w-][\w.-]*)*"
_ASSIGNMENT = re.compile(r"([a-z_]+)=(\S+)")


class _Parsed(BaseException):
    """Carries the settings out of a job before it does anything."""

    def __init__(self, config: Any = None) -> None:
        self.config = config


def check_script(text: str, files: Mapping[str, str], *, address: str | None = None) -> Iterator[str]:
    """Yield what is wrong with a shell script of assignments and calls of `ray`.

    Args:
        text: The script.
        files: What the job's files hold where it runs, by their absolute path.
        address: What `ray job submit` has to be given as its address, if that is known.
    """
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not any(" job submit " in f" {line} " for line in lines):
        yield "submits nothing: expected a line with `ray job submit`"
    known = {"@": ""}
    for line in lines:
        line = _DATE.sub(DAY, line)
        line = re.sub(r"\"\$@\"|\$(\w+)", lambda m: known.get(m[1] or "@", m[0]), line)
        if found := _ASSIGNMENT.fullmatch(line):
            known[found[1]] = found[2]
        elif line.startswith(("set ", "export ")):
            yield from _check_settings(line)
        else:
            for part in re.split(r"\|\||&&|;", re.sub(r"2?> ?(/dev/null|&1)", "", line)):
                yield from check_ray(part.strip().removeprefix("exec "), files, address=address)


def check_ray(line: str, files: Mapping[str, str], *, address: str | None = None) -> Iterator[str]:
    """Yield what is wrong with one call of `ray`, which may have settings of the environment before it."""
    import click
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts import scripts

    words = _split(line)
    while words and "=" in words[0]:
        yield from _check_setting(words.pop(0))
    calls = {"start": scripts.start, "stop": scripts.stop, "status": scripts.status}
    if words[:3] == ["ray", "job", "submit"]:
        command, arguments = submit, words[3:]
    elif words[:1] == ["ray"] and words[1:2] == ["get-auth-token"]:
        command, arguments = scripts.get_auth_token, words[2:]
    elif words[:1] == ["ray"] and words[1:2] and words[1] in calls:
        command, arguments = calls[words[1]], words[2:]
    else:
        yield f"{line!r}: no command that is known here; expected ray job submit, start, stop, status or get-auth-token"
        return
    if "$" in line.replace("$RAY_HEAD_IP", ""):
        yield f"{line!r}: holds a $ that is neither a day nor a variable that was set before"
    try:
        parsed = command.make_context("ray", list(arguments))
    except click.exceptions.Exit:
        yield f"{line!r}: only asks for help"
    except click.ClickException as error:
        yield f"{line!r}: {error.format_message()}"
    else:
        if command is scripts.start and parsed.params["dashboard_host"] not in ("127.0.0.1", "localhost"):
            yield f"--dashboard-host: got {parsed.params['dashboard_host']!r}; expected 127.0.0.1, and a tunnel to it"
        if command is submit:
            if address is not None and parsed.params["address"] != address:
                yield f"--address: got {parsed.params['address']!r}; the cluster of these manifests is {address!r}"
            yield from check_job(
                list(parsed.params["entrypoint"]), files, in_image=parsed.params["working_dir"] is None
            )


def check_entrypoint(line: str, files: Mapping[str, str], *, through_shells: int) -> Iterator[str]:
    """Yield what is wrong with the entrypoint of a RayJob.

    Args:
        line: The entrypoint.
        files: What the job's files hold where it runs, by their absolute path.
        through_shells: How many shells read the line before the job gets it; more than one takes quotes off twice.
    """
    if through_shells > 1 and re.search(r"[^\w\s./:=,@%+-]", line):
        yield f"{line!r}: two shells read this line, so it may hold plain words only; in HTTPMode one does"
    line = _DATE.sub(DAY, line)
    if re.search(r"[$`;&|<>]", line):
        yield f"{line!r}: more than one command with its arguments"
    yield from check_job(_split(line), files, in_image=True)


def check_job(words: Sequence[str], files: Mapping[str, str], *, in_image: bool) -> Iterator[str]:
    """Yield what is wrong with a call of one of the jobs, as its own parser says it."""
    prefix = f"{WORKDIR}/jobs/" if in_image else "jobs/"
    script = words[1].removeprefix(prefix) if len(words) > 1 and words[1].startswith(prefix) else ""
    if words[:1] != ["python"] or not re.fullmatch(r"\w+\.py", script):
        yield f"{shlex.join(words)!r}: expected python {prefix}<job>.py and its flags"
    elif not (ROOT / "jobs" / script).is_file():
        yield f"{script}: there is no such job"
    else:
        yield from _ask_job(script, tuple(words[2:]), tuple(sorted(files.items())), in_image)


@cache
def _ask_job(script: str, arguments: tuple[str, ...], files: tuple[tuple[str, str], ...], remote: bool) -> list[str]:
    """Return what a job's own parser says of its arguments; the job ends where its work would begin."""
    from laplace_dist import cli

    held, said, config = dict(files), io.StringIO(), None

    def stop(config: Any = None, *_: Any, **__: Any) -> None:
        raise _Parsed(config)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given, problems = list(arguments), []
        for place, argument in enumerate(given):
            before = given[place - 1] if place else ""
            path = argument.removeprefix("--config=") if before != "--config" else argument
            if before != "--config" and path == argument:
                continue
            if path not in held:
                return [f"--config {path}: no manifest puts a file there"]
            (folder / "run.yaml").write_text(held[path])
            given[place] = argument.replace(path, str(folder / "run.yaml"))
        if remote and not any(flag.startswith("--config") for flag in given):
            problems.append(f"{script}: without --config it would fit the demo")
        stops = dict.fromkeys(("recalibrate", "rollback", "verify", "load_split"), stop)
        stack.enter_context(mock.patch.multiple(cli, JOBS=dict.fromkeys(cli.JOBS, stop), **stops))
        stack.enter_context(mock.patch.object(sys, "argv", [script, *given]))
        stack.enter_context(mock.patch("laplace_dist.demo.train", stop))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            runpy.run_path(str(ROOT / "jobs" / script), run_name="__main__")
        except _Parsed as parsed:
            config = parsed.config
        except SystemExit:
            problems.append(f"{script}: {said.getvalue().strip() or 'only asks for help'}")
    if not re.fullmatch(_WINDOWS, getattr(config, "windows", "all")):
        problems.append(f"--windows: got {config.windows!r}; expected all, last:K, or names with commas between them")
    if config is not None and remote and "://" not in getattr(config, "checkpoint", "://"):
        problems.append(f"--checkpoint: got {config.checkpoint!r}; expected a URL that every node reaches")
    return problems


def at(value: Any, *path: Any) -> Any:
    """Return what lies at a path of keys and places, or None if it ends before."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _check_settings(line: str) -> Iterator[str]:
    """Yield what is wrong with a line that sets options or exports variables."""
    words = _split(line)
    if words[0] == "set" and words[1:] != ["-eu"]:
        yield f"{line!r}: expected set -eu"
    for word in words[1:] if words[0] == "export" else ():
        yield from _check_setting(word)


def _check_setting(word: str) -> Iterator[str]:
    from checks.pods import check_variable

    name, _, value = word.partition("=")
    yield from check_variable(name, value)


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return [line]
