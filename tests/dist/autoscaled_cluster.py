"""Ray's own autoscaler over nodes that are processes of this machine: a head without CPUs, and others as they are asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from s3server import free_ports

_HEAD = "f" * 51 + "00000"  # which the provider takes for the head
_EMPTY_LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
_START = ("head_start_ray_commands", "worker_start_ray_commands")
_SYNC = ("cluster_synced_files", "rsync_exclude", "rsync_filter")


class AutoscaledCluster:
    """The head with its autoscaler, in processes of its own, which end with the block.

    Args:
        most: Nodes of one CPU that the autoscaler may start.
        environment: Of its processes: Ray's token.
    """

    def __init__(self, most: int, environment: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="as-"))  # Ray's sockets need a short path
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        settings = self.folder / "cluster.json"
        settings.write_text(json.dumps(self._settings(most)))
        there = {
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
            "RAY_CLOUD_INSTANCE_ID": _HEAD,
            "RAY_TMPDIR": str(self.folder),
        }
        self._head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"),
                *("--node-ip-address=127.0.0.1", f"--port={self.address.rpartition(':')[2]}"),
                *(
                    f"--autoscaling-config={settings}",
                    "--include-dashboard=false",
                    f"--object-store-memory={80 * 2**20}",
                ),
            ],
            env={**environment, **there, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert any("Ray runtime started" in line for line in self._head.stdout), "the head did not start"

    def _settings(self, most: int) -> dict[str, object]:
        small = {"CPU": 1, "object_store_memory": 80 * 2**20}
        return {
            **{
                "cluster_name": "here",
                "max_workers": most,
                "idle_timeout_minutes": 5,
                "head_node_type": "ray.head.default",
            },
            "provider": {"type": "fake_multinode", "gcs_address": self.address, "launch_multiple": True},
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "small": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": most},
            },
            **{"auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False},
            **dict.fromkeys((*_EMPTY_LISTS, *_START, *_SYNC), []),
        }

    def _client(self) -> object:
        from ray._raylet import GcsClient

        return GcsClient(address=self.address)

    @property
    def asked(self) -> list[dict[str, float]]:
        """What the autoscaler is asked to have room for now."""
        from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL

        found = self._client().internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL, None)
        return json.loads(found or b"null")

    @property
    def nodes(self) -> int:
        """How many nodes have been started beside the head."""
        return len(self._client().get_all_node_info()) - 1

    def __enter__(self) -> AutoscaledCluster:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes whose command line names the cluster's folder; nobody else's does."""
        for process in [*Path("/proc").glob("[0-9]*")]:
            try:
                if str(self.folder).encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended by itself
        self._head.kill()
        self._head.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)
