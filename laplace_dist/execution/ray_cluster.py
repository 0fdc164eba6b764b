"""How Ray is reached: which cluster, and who may talk to it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from laplace.linalg.memory import free_bytes
from laplace_dist.config.settings import Config
from laplace_dist.errors import Interrupted, SettingsError
from laplace_dist.execution import signals
from laplace_dist.execution.counters import Counters
from laplace_dist.execution.pool import Pool
from laplace_dist.execution.private_cluster import LOOPBACK, PrivateCluster
from laplace_dist.execution.scaling import Placement, how_many, nodes_of

OBJECT_STORE_BYTES = 128 * 2**20  # receipts only: no factor ever enters Ray's object store
_SERVICES = (
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
        raise SettingsError(f"--ray-address: got {given!r} ({why}); {_SERVICES}")
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
    return address if _answers(address) is None else None


def _answers(address: str) -> str | None:
    """Return None if something listens at `host:port`, else why not; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return None
    except (OSError, ValueError) as error:
        return str(error)


# ------------------------------------------------------------------ who may talk to it


def _token_at_hand() -> bool:
    """Say whether the user has a Ray token that this process would find."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


@contextmanager
def _authentication(local: bool) -> Iterator[None]:
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
def _on_loopback() -> Iterator[None]:
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


def _connected() -> bool:
    """Say whether this process has joined a cluster."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@dataclass
class Cluster:
    """A connection to Ray, opened on first use, so that a run with nothing left to do starts nothing.

    Attributes:
        config: The job's settings.
        say: Where lines for people go.
    """

    config: Config
    say: Any = print
    _stack: ExitStack | None = field(default=None, repr=False)
    _private: bool = field(default=False, repr=False)

    def device_type(self) -> str:
        """Return `cuda` or `cpu`, the type of device that the workers will use."""
        if self.config.gpus_per_worker is not None:
            return "cuda" if self.config.gpus_per_worker > 0 else "cpu"
        private = self._stack is None and not _connected() and find_address(self.config.ray_address)[0] is None
        gpus = torch.cuda.device_count() if private else self.resources().get("GPU", 0)
        return "cuda" if gpus >= 1 else "cpu"

    def memory(self, device: str) -> int | None:
        """Return the memory of the largest node that holds a worker, if there is one yet.

        Of a private cluster it is what is free here, shared by the workers asked for.
        That of GPUs is not known before a worker is there, but what is summed there passes through the node's memory.
        """
        if self._stack is None and not _connected() and find_address(self.config.ray_address)[0] is None:
            free = free_bytes("cpu")
            return None if free is None else free // (self.config.num_workers or 1)
        self.connect()
        import ray

        need = self._need(device)
        usable = [node for node in nodes_of(ray) if how_many(node.total, need) > 0]
        return max((int(node.total.get("memory", 0)) for node in usable), default=0) or None

    def _need(self, device: str) -> dict[str, float]:
        """Return what one worker reserves, by Ray's names."""
        gpus = 0.0 if device == "cpu" else self.config.gpus_per_worker or 1.0
        return {"CPU": float(self.config.cpus_per_worker), "GPU": float(gpus)}

    def resources(self) -> dict[str, float]:
        """Return the cluster's total resources by Ray's names."""
        self.connect()
        import ray

        return ray.cluster_resources()

    def connect(self) -> None:
        """Join the cluster that `ray_address` means, or start a private one; does nothing when already connected.

        Raises:
            SettingsError: No cluster answers at the address, or one of other versions of Ray or Python.
        """
        if self._stack is not None:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with ExitStack() as stack:
            if _connected():
                if sys.modules["ray"].util.client.ray.is_connected():
                    raise SettingsError(f"this process is connected through Ray's client; {_SERVICES}")
                self.say("Ray: the cluster that this process is already connected to")
            else:
                self._join(stack)
            self._stack = stack.pop_all()

    def _join(self, stack: ExitStack) -> None:
        address, why = find_address(self.config.ray_address)
        stack.enter_context(_authentication(local=address is None))
        if address is None:
            self.say(f"Ray: starting a private cluster on this machine ({why})")
            started = stack.enter_context(PrivateCluster(self._resources_here(), self.say))
            stack.enter_context(_on_loopback())  # imports Ray meanwhile
            address, self._private = started.address(), True
        else:
            self.say(f"Ray: the cluster at {address} ({why})")
        import ray

        refusal = _answers(address)
        try:
            if refusal is None:
                _join(ray, address)
        except (ConnectionError, ray.exceptions.RayError, ValueError, RuntimeError) as error:  # other versions, too
            refusal = str(error)
        if refusal is not None:
            raise SettingsError(
                f"--ray-address: cannot connect to {address!r} ({why}): {refusal}. Give host:port of a running "
                "cluster, or 'local' for a private one; if the cluster asks for a token, set RAY_AUTH_MODE=token."
            )
        stack.callback(ray.shutdown)

    def _resources_here(self) -> dict[str, Any]:
        """Return the arguments of `ray.init` for a private cluster."""
        asked = (self.config.num_workers or 0) * self.config.cpus_per_worker
        cores = max(os.cpu_count() or 1, asked)
        return {"num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}

    def close(self) -> None:
        """Leave the cluster; a private one stops with it."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pool(self, device: str, expected: int | None = None) -> Pool:
        """Return the workers, as many as the settings say or the cluster holds; none is started yet.

        Where the cluster has none of what a worker needs, such as a head without CPUs, the workers wait for nodes to join. The
        memory that a worker is expected to take is reserved, so that no node is given more workers than it holds, if there is
        a node that has so much: what Ray counts as a node's memory is less than the machine has, and a reservation that no
        node can give would never start.

        Args:
            device: `cpu` or `cuda`: where they compute.
            expected: Bytes that a worker is expected to take, if that is known.

        Raises:
            SettingsError: One worker is larger than any node, and no node is to be expected.
        """
        config, have = self.config, self.resources()
        import ray

        need = self._need(device)
        joining = not self._private and config.num_workers is not None
        demand = None if self._private else self._demand(need)
        need |= self._memory_of(expected, [node.total for node in nodes_of(ray) if how_many(node.total, need) > 0])
        placement = Placement(lambda: nodes_of(ray), need, config.num_workers, demand)
        placement.refresh(time.monotonic())
        lacking = [name for name, amount in need.items() if amount > 0 and have.get(name, 0) == 0]
        if placement.fits < 1 and not joining and (self._private or not lacking):
            raise SettingsError(
                f"cpus_per_worker={config.cpus_per_worker}, gpus_per_worker={need['GPU']:g}: no worker fits on any node of the "
                f"cluster, which has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs in all. Ask for less, or "
                "set num_workers to wait for nodes that are still to join."
            )
        if placement.fits < 1:
            self.say(f"Ray: waiting for nodes to join ({placement.describe()})")
        return Pool(config, placement, self.say, counters=Counters())

    def _memory_of(self, expected: int | None, usable: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the memory that a worker reserves, by Ray's name; nothing where no node that could hold one has as much."""
        largest = int(max((have.get("memory", 0.0) for have in usable), default=0.0))
        if expected is None or not largest:
            return {}
        if expected > largest:
            self.say(
                f"Ray: a worker is expected to take {expected:,} bytes, and no node has more than {largest:,} for workers as "
                "Ray counts it: none is reserved. If workers run out of it, give --module-groups, fewer --num-workers, or "
                "larger nodes"
            )
            return {}
        if (wanted := self.config.num_workers) is not None:
            need = {"CPU": float(self.config.cpus_per_worker), "memory": float(expected)}
            if (fits := sum(how_many(have, need) for have in usable)) < wanted:
                self.say(
                    f"Ray: the nodes have room for {fits} of {wanted} workers, each of which is expected to take {expected:,} "
                    "bytes of memory; the others wait for nodes to join"
                )
        return {"memory": float(expected)}

    def _demand(self, need: dict[str, float]) -> Callable[[int], None]:
        """Return what tells an autoscaler how many workers there is to be room for; where there is none, nobody listens."""
        from ray.autoscaler.sdk import request_resources

        bundle = {name: amount for name, amount in need.items() if amount > 0}

        self._stack.callback(request_resources, bundles=[])  # a request would outlive this job
        return lambda workers: request_resources(bundles=[bundle] * workers)


def _join(ray: Any, address: str) -> None:
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
