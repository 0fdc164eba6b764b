"""Nodes that are gone without a word while a worker on them is inside a segment."""

from __future__ import annotations

import time

import dist_cases
import fault_cases
import pytest
from node_cluster import NodeCluster

from laplace_dist.run.checkpoint import Checkpoint

LOSSES = 3  # as many failures of a task on nodes that live on set it aside


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the version and the factors of a run to which nothing happens."""
    url = tmp_path_factory.mktemp("undisturbed")
    dist_cases.run_inline(dist_cases.config(url))
    return fault_cases.factors(Checkpoint(str(url)))


def test_a_node_lost_in_the_middle_of_a_segment_changes_no_byte(
    undisturbed, tmp_path, environment, record_testsuite_property
):
    """Two nodes of one worker each, and a head without any; the job goes on with the one that is left."""
    folder, url = tmp_path / "notes", tmp_path / "run"
    folder.mkdir()
    data_args = {"folder": str(folder), "trap": 21}  # in segment 000002
    chosen = dist_cases.config(url, data="dist_cases:Blocking", data_args=data_args, num_workers=2)
    with NodeCluster(2, environment) as nodes:
        process = fault_cases.start_job(tmp_path / "job.json", environment, chosen=chosen, ray_address=nodes.address)
        pid = int(dist_cases.wait_for(folder, "waiting-*").name.removeprefix("waiting-"))
        begun = time.monotonic()
        nodes.ask(f"lose {pid}")
        for line in process.stdout:
            if "segment 000002" in line:
                record_testsuite_property("seconds until the loss of a node was noticed", time.monotonic() - begun)
                break
        fault_cases.wait_until_gone(pid)
        (folder / "go").touch()
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "its node was lost; it is done again" in line
    store = Checkpoint(str(url))
    assert fault_cases.factors(store) == undisturbed
    assert fault_cases.reads(folder) == {i: 2 if 16 <= i <= 21 else 1 for i in range(1, 44)}, "nothing else was redone"
    assert fault_cases.readers(folder, 21) > fault_cases.readers(folder, 22) and pid not in fault_cases.readers(
        folder, 22
    )
    assert len(fault_cases.manifests(store)) == 6 and fault_cases.orphans(store) == set()


def test_a_segment_whose_nodes_are_lost_again_and_again_is_done_in_the_end(undisturbed, tmp_path, environment):
    """The cluster begins with a head without CPUs; each of the first nodes that join is lost with the worker in the segment."""
    folder, url = tmp_path / "notes", tmp_path / "run"
    folder.mkdir()
    data_args = {"folder": str(folder), "trap": 21}
    chosen = dist_cases.config(url, data="dist_cases:Blocking", data_args=data_args)
    with NodeCluster(0, environment) as nodes:
        process = fault_cases.start_job(tmp_path / "job.json", environment, chosen=chosen, ray_address=nodes.address)
        said = []
        while not said or "waiting for nodes to join" not in said[-1]:
            said.append(process.stdout.readline())
            assert said[-1], process.communicate()
        nodes.ask("add")
        for _ in range(LOSSES):
            waiting = dist_cases.wait_for(folder, "waiting-*")
            nodes.ask("add")  # so that somewhere it can be tried again
            nodes.ask(f"lose {waiting.name.removeprefix('waiting-')}")
            waiting.rename(folder / f"lost-{waiting.name}")
        dist_cases.wait_for(folder, "waiting-*")
        (folder / "go").touch()
        out, err = process.communicate()
    assert process.returncode == 0, err
    lines = [line for line in out.splitlines() if "segment 000002" in line]
    assert len(lines) == LOSSES and all("its node was lost; it is done again" in line for line in lines)
    assert len(fault_cases.readers(folder, 21)) == LOSSES + 1
    store = Checkpoint(str(url))
    assert fault_cases.factors(store) == undisturbed and fault_cases.orphans(store) == set()
