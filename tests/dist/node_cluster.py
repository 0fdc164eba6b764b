"""A Ray cluster of several nodes on this machine, in a process of its own that takes orders line by line.

    python node_cluster.py NODES [DASHBOARD AGENT]   -> {"address": "127.0.0.1:6379"}; takes jobs at these ports, if given
    lose PID    the node of that worker is gone, without a word      -> {"lost": "<node id>"}, or {"none": PID}
    mute PID    its processes are stopped: nothing is closed, nothing answers  -> {"muted": "<node id>"}
    wake        all that is stopped goes on      -> {"woken": <number of processes>}
    add         another node joins                                   -> {"added": "<node id>"}

The head has no CPU, so that no worker runs there; it ends when its input does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# The head asks every node each second whether it lives, and gives it up after four answers that take more than two seconds.
# Ray's own values (3 s, 5 answers of 10 s) need a minute for a node that falls silent without closing its connections.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
SMALL = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
DASHBOARD = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}


class NodeCluster:
    """The cluster's process, seen from a test.

    Args:
        nodes: Number of nodes with one CPU each, beside the head.
        environment: Of its processes: Ray's token and its settings.
        *ports: Of the head's dashboard, on loopback, and of its agent, if it is to take jobs.
    """

    def __init__(self, nodes: int, environment: dict[str, str], *ports: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="nodes-")  # Ray's sockets need a short path
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, [nodes, *ports])],
            env={**environment, **HEALTH, "RAY_TMPDIR": self.folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._answer()["address"]

    def ask(self, order: str) -> dict[str, str]:
        """Give an order and return the answer, which comes when it is done."""
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, str]:
        line = self.process.stdout.readline()
        assert line, "the cluster's process is gone"
        return json.loads(line)

    def close(self) -> None:
        """End all nodes."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> NodeCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parent(pid: int) -> int:
    """Return the parent of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


def send(pid: int, number: int) -> bool:
    """Send a signal to a process if there is one."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def main(nodes: int, *ports: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints is no answer
    from ray.cluster_utils import Cluster

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    def raylet(node):
        return node.all_processes["raylet"][0].process.pid

    jobs = {**DASHBOARD, "dashboard_port": ports[0], "dashboard_agent_listen_port": ports[1]} if ports else {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL, **jobs})
    members = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(nodes)]
    answer(address=cluster.address)
    muted = []
    for line in sys.stdin:
        order, _, pid = line.strip().partition(" ")
        if order == "add":
            members.append(cluster.add_node(num_cpus=1, **SMALL))
            answer(added=members[-1].node_id)
            continue
        if order == "wake":
            answer(woken=sum(send(process, signal.SIGCONT) for process in muted))
            continue
        found = [node for node in members if raylet(node) == parent(int(pid))]
        if not found:
            answer(none=pid)
            continue
        [node] = found
        members.remove(node)
        if order == "lose":
            cluster.remove_node(node, allow_graceful=False)
            answer(lost=node.node_id)
        else:
            children = Path(f"/proc/{raylet(node)}/task/{raylet(node)}/children").read_text().split()
            stopped = [process for process in [raylet(node), *map(int, children)] if send(process, signal.SIGSTOP)]
            muted.extend(stopped)
            answer(muted=node.node_id)
    for process in muted:
        send(process, signal.SIGKILL)
    cluster.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
