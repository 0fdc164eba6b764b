"""A soak of a minute: every kind of fault at random moments and on random workers, over S3 and three nodes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import dist_cases
import pytest
from node_cluster import NodeCluster

from laplace_dist.run.checkpoint import Checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SEGMENTS = 50
# The driver first, since another one makes up for what one forgets.
FAULTS = ("driver", "worker", "s3", "node", "worker", "silence")


@pytest.fixture
def module(monkeypatch):
    """Return the module of the soak, which a run's processes import too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    yield soak
    del sys.modules["soak"]


@pytest.mark.timeout(600)
def test_a_run_survives_random_faults_of_every_kind_and_changes_no_bit(module, s3, tmp_path, environment):
    environment["PYTHONPATH"] += os.pathsep + str(BENCHMARKS)
    with NodeCluster(3, environment) as nodes:
        soak = module.Soak(s3, nodes, tmp_path, environment, segments=SEGMENTS, seconds=1.0, seed=1, every=(0.5, 3.0))
        found = soak.run(minutes=0, least=FAULTS)
    print("\n".join(soak.report.lines()))
    assert soak.report.faults == Counter(FAULTS)
    assert soak.report.recomputed > 0, "they met work"
    assert soak.report.recomputed <= 3 * soak.report.faults.total(), "a fault costs the segments in flight, no more"

    url, notes = tmp_path / "undisturbed", tmp_path / "notes"
    notes.mkdir()
    same = {"model": "soak:network", "data": "soak:Slow", "batch_size": module.SIZE, "segment_size": module.SIZE}
    data_args = {"folder": str(notes), "segments": SEGMENTS, "seconds": 0.0}
    dist_cases.run_inline(dist_cases.config(url, **same, data_args=data_args))
    soak.compare(module.digests(Checkpoint(str(url))), found)
    assert soak.report.problems == []
    assert (soak.report.bytes_lost, soak.report.failures) == (0, [])
