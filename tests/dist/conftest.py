"""One private Ray cluster and one S3 server for all tests that need them; they end with the session."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import forked
import pytest
import torch
from s3server import S3Server

from laplace_dist.report import console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Ray reads these when it is imported. A token of the session's own keeps other users of the machine out and leaves
# the user's home directory alone.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on loopback alone
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def cluster():
    """Join a fresh cluster of four (nominal) CPUs and return its address."""
    import ray

    with forked.workers():
        context = ray.init(
            "local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            namespace="laplace-dist-tests",
            _node_name="laplace-dist-tests",
            logging_level="error",
            log_to_driver=False,
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """Start a real S3 server on loopback, which ends with the session."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def printed():
    """Print what jobs in this process say, as the command line does, so that `capsys` has it."""
    with console.printed():
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Compute in this process with as many threads as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def environment():
    """Return the environment of a job that runs as a process of its own."""
    path = os.pathsep.join([str(ROOT), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable}
