"""`ray job submit` against a head node that asks for a token: SUCCEEDED, with the bytes of a run in one process."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from node_cluster import NodeCluster
from ray.job_submission import JobStatus, JobSubmissionClient
from s3server import free_ports
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from laplace_dist.cli import main
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.pointer import read_current
from laplace_dist.run.versions import read_version

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def factor_digests(url):
    """Return the sha256 of every factor of the current posterior."""
    store = Checkpoint(str(url))
    version = read_current(store)["version"]
    factors = read_version(store, read_plan(store), version)["factors"]
    return {name: place["entry"]["sha256"] for name, place in factors.items()}


@retry(stop=stop_after_delay(90), wait=wait_fixed(1), retry=retry_if_exception_type((ConnectionError, RuntimeError)))
def wait_for_agent(address):
    """Return once the cluster takes jobs: its agent comes to life some seconds after the head."""
    JobSubmissionClient(address).submit_job(entrypoint="true")


@pytest.fixture(scope="module")
def plain_environment():
    """The environment of a user's terminal: no path to this repository, this Python first."""
    names = ("PYTHONPATH", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def head(plain_environment):
    """Start a head node as `ray start --head` does, on loopback, and return the address of its jobs."""
    folder = tempfile.mkdtemp(prefix="ld-head-")  # short: sockets lie in it
    port, dashboard, agent = free_ports(3)
    flags = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    flags += [f"--dashboard-agent-listen-port={agent}"]  # which takes the jobs; Ray's own number may be in use
    flags += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]
    with open(f"{folder}/head.log", "w") as log:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", *flags],
            env={**plain_environment, "RAY_TMPDIR": folder},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_agent(f"http://127.0.0.1:{dashboard}")
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            process.terminate()  # ends the processes that it started, and no others
            process.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(plain_environment):
    """Start a head without a CPU and two nodes with one each, and return the address of its jobs."""
    port, agent = free_ports(2)
    with NodeCluster(2, plain_environment, port, agent):
        wait_for_agent(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"


def submit(head, environment, *arguments):
    command = [BIN / "ray", "job", "submit", "--address", head, "--working-dir", ".", "--", "python", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Return the digests of the factors of the demo in this process."""
    url = tmp_path_factory.mktemp("local")
    given = ["--ray-address=inline", "--skip-tune", "--skip-evaluate", f"--checkpoint={url}"]
    assert main("fit", given, hessian_structure="kron") == 0
    return factor_digests(url)


def test_a_submitted_job_reaches_the_bytes_of_a_local_run(head, local, plain_environment, tmp_path):
    done = submit(head, plain_environment, "jobs/fit_kron.py", "--checkpoint", str(tmp_path / "submitted"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert "Ray: the cluster at" in done.stdout
    assert "accuracy" in done.stdout
    assert factor_digests(tmp_path / "submitted") == local


def test_a_job_on_several_nodes_reaches_the_same_bytes(nodes, local, tmp_path):
    """Without a working directory to upload, since these nodes share one disk, where Ray would keep one copy for all."""
    client = JobSubmissionClient(nodes)
    job = client.submit_job(
        entrypoint=f"{sys.executable} {ROOT}/jobs/fit_kron.py --checkpoint={tmp_path / 'run'} --skip-tune --skip-evaluate",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )

    async def until_it_ends():
        async for _ in client.tail_job_logs(job):
            pass

    asyncio.run(asyncio.wait_for(until_it_ends(), 200))
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    assert factor_digests(tmp_path / "run") == local


def test_a_job_whose_settings_refuse_is_failed_with_the_message_in_its_log(head, plain_environment, tmp_path):
    done = submit(head, plain_environment, "jobs/fit_kron.py", "--checkpoint", str(tmp_path), "--batch-size=0")
    assert done.returncode == 1
    assert "--batch-size: got 0" in done.stdout
    assert "exit code 2" in done.stdout


def test_a_job_without_the_token_is_turned_away(head, plain_environment, tmp_path):
    changed = {"RAY_AUTH_TOKEN": "0" * 64}
    done = submit(head, {**plain_environment, **changed}, "jobs/fit_kron.py", "--checkpoint", str(tmp_path / "run"))
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
