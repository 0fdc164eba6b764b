"""How Ray is reached: which cluster, who may talk to it, and how a process joins it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laplace_dist.errors import Interrupted, SettingsError
from laplace_dist.execution import signals
from laplace_dist.execution.private_cluster import LOOPBACK

SERVICES = (
    "Ray's client (ray://) and job service (http://) do not carry the driver, which has to be a process of the cluster: run "
    "`ray job submit --working-dir . -- python jobs/…` with that address as RAY_ADDRESS, or give the head's own host:port on a "
    "machine of the cluster, or 'local'"
)
_process_token: str | None = None  # Ray reads the token once per process, so it cannot change within one


# ------------------------------------------------------------------ which cluster


def find_address(wanted: str) -> tuple[str | None, str]:
    """Resolve a `--ray-address` to the address of a running cluster, or to None for a private local one.

    Args:
        wanted: `auto`, `local`, or an address such as `10.0.0.1:6379`.

    Returns:
        The address or None, and a phrase that says why.

    Raises:
        SettingsError: It is the address of another service than a cluster's own.
    """
    given, why = wanted, "as asked"
    if wanted == "auto" and os.environ.get("RAY_ADDRESS"):
        given, why = os.environ["RAY_ADDRESS"], "from RAY_ADDRESS"
    if "://" in given:
        raise SettingsError(f"--ray-address: got {given!r} ({why}); {SERVICES}")
    if given == "local":
        return None, why
    if given != "auto":
        return given, why
    running = _running_here()
    return (running, "already running on this machine") if running else (None, "none is running on this machine")


def _running_here() -> str | None:
    """Return the address that the last `ray start` on this machine left behind, if something still answers there."""
    note = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        address = note.read_text().strip()
    except OSError:
        return None
    return address if answers(address) is None else None


def answers(address: str) -> str | None:
    """Return None if something listens at `host:port`, else why not; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return None
    except (OSError, ValueError, OverflowError) as error:  # as of a port that is no number, or too large a one
        return str(error)


# ------------------------------------------------------------------ who may talk to it


def _token_at_hand() -> bool:
    """Say whether the user has a Ray token that this process would find."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


@contextmanager
def authentication(local: bool) -> Iterator[None]:
    """Set Ray's token authentication for the duration of a connection, unless the user has chosen a mode.

    Other users of the machine reach loopback, so a private cluster always asks for a token. Left alone, Ray would write
    one to the home directory, which silently turns authentication on for whatever the user starts later; so a private
    cluster gets a token that lives in this process's environment only. A running cluster gets the user's token if there is
    one: clusters without authentication ignore it, and those with it turn away whoever sends none.
    """
    global _process_token
    if "RAY_AUTH_MODE" in os.environ or not (local or _token_at_hand()):
        yield
        return
    added = {"RAY_AUTH_MODE": "token"}
    if not _token_at_hand():
        _process_token = _process_token or secrets.token_hex(32)
        added["RAY_AUTH_TOKEN"] = _process_token
    os.environ.update(added)
    _reread_authentication()
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        _reread_authentication()


def _reread_authentication() -> None:
    """Make Ray look at the environment again if it was imported before, since it reads the mode at import."""
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have whatever Ray starts meanwhile listen on loopback alone; on Linux it would listen on every interface.

    Ray reads its switch for this at import and its processes when they start, so both are told; afterwards this process may
    join a cluster of several machines again.
    """
    from ray._private import ray_constants

    before, constant = os.environ.get(LOOPBACK), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[LOOPBACK], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        os.environ.pop(LOOPBACK)
        os.environ.update({} if before is None else {LOOPBACK: before})
        ray_constants.ENABLE_RAY_CLUSTER = constant


# ------------------------------------------------------------------ the connection


def is_connected() -> bool:
    """Say whether this process has joined a cluster."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def join(ray: Any, address: str) -> None:
    """Connect to a cluster; the handlers of signals stay as they are, but for the moment that it takes.

    Raises:
        Interrupted: SIGTERM came in this moment, in which Ray's own handler exits.
    """
    namespace = f"laplace-{secrets.token_hex(4)}"
    try:
        with signals.kept():
            ray.init(address, logging_level="error", log_to_driver=True, namespace=namespace)
    except SystemExit as error:
        ray.shutdown()
        raise Interrupted(signal.SIGTERM) from error
