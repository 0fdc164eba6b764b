"""The cluster that a job runs on: what it has, and how many workers of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from laplace.linalg.memory import free_bytes
from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.execution.counters import Counters
from laplace_dist.execution.pool import Pool
from laplace_dist.execution.private_cluster import PrivateCluster
from laplace_dist.execution.ray_access import (
    SERVICES,
    answers,
    authentication,
    find_address,
    is_connected,
    join,
    on_loopback,
)
from laplace_dist.execution.scaling import Placement, how_many, nodes_of

OBJECT_STORE_BYTES = 128 * 2**20  # receipts only: no factor ever enters Ray's object store


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
        gpus = torch.cuda.device_count() if self._starts_its_own() else self.resources().get("GPU", 0)
        return "cuda" if gpus >= 1 else "cpu"

    def admit(self, device: str) -> None:
        """Refuse a worker that is larger than any node, where no other node is to be expected.

        Of a private cluster that is not started yet, this machine is the only node that it will have.
        """
        if private := self._starts_its_own():
            totals: list[Mapping[str, float]] = [
                {"CPU": self._resources_here()["num_cpus"], "GPU": torch.cuda.device_count()}
            ]
        else:
            self.connect()
            import ray

            private, totals = self._private, [node.total for node in nodes_of(ray)]
        need = self._need(device)
        if any(how_many(have, need) > 0 for have in totals) or (not private and self.config.num_workers is not None):
            return
        have = {name: sum(total.get(name, 0) for total in totals) for name in need}
        if private or all(have[name] > 0 for name, amount in need.items() if amount > 0):
            raise SettingsError(
                f"{self._asked(need, totals)}; no worker fits on any node of the cluster, which has {have['CPU']:g} CPUs and "
                f"{have['GPU']:g} GPUs in all. Ask for less, or "
                + ("give the --ray-address of a larger one" if private else "--num-workers to wait for nodes that join")
            )

    def _asked(self, need: Mapping[str, float], totals: Sequence[Mapping[str, float]]) -> str:
        """Return which setting asks for more than any of these nodes has."""
        config = self.config
        if max((have.get("GPU", 0) for have in totals), default=0) >= need["GPU"]:
            return f"--cpus-per-worker: got {config.cpus_per_worker}"
        if config.gpus_per_worker:
            return f"--gpus-per-worker: got {config.gpus_per_worker:g}"
        return "--device: got 'cuda'" if config.device == "cuda" else "--device: the run has begun on GPUs"

    def _starts_its_own(self) -> bool:
        """Say whether a private cluster would be started now."""
        return self._stack is None and not is_connected() and find_address(self.config.ray_address)[0] is None

    def memory(self, device: str) -> int | None:
        """Return the memory of the largest node that holds a worker, if there is one yet.

        Of a private cluster it is what is free here, shared by the workers asked for.
        That of GPUs is not known before a worker is there, but what is summed there passes through the node's memory.
        """
        if self._starts_its_own():
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
            if is_connected():
                if sys.modules["ray"].util.client.ray.is_connected():
                    raise SettingsError(f"this process is connected through Ray's client; {SERVICES}")
                self.say("Ray: the cluster that this process is already connected to")
            else:
                self._join(stack)
            self._stack = stack.pop_all()

    def _join(self, stack: ExitStack) -> None:
        address, why = find_address(self.config.ray_address)
        stack.enter_context(authentication(local=address is None))
        if address is None:
            self.say(f"Ray: starting a private cluster on this machine ({why})")
            started = stack.enter_context(PrivateCluster(self._resources_here(), self.say))
            stack.enter_context(on_loopback())  # imports Ray meanwhile
            address, self._private = started.address(), True
        else:
            self.say(f"Ray: the cluster at {address} ({why})")
        import ray

        refusal = answers(address)
        try:
            if refusal is None:
                join(ray, address)
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
        config = self.config
        self.connect()
        self.admit(device)
        import ray

        need = self._need(device)
        demand = None if self._private else self._demand(need)
        need |= self._memory_of(expected, [node.total for node in nodes_of(ray) if how_many(node.total, need) > 0])
        placement = Placement(lambda: nodes_of(ray), need, config.num_workers, demand)
        placement.refresh(time.monotonic())
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
