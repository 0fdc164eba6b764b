"""A cluster scaled to zero, whose nodes a real autoscaler starts when a job asks for them."""

from __future__ import annotations

import dist_cases
import fault_cases
from autoscaled_cluster import AutoscaledCluster

from laplace_dist.run.checkpoint import Checkpoint


def test_a_cluster_scaled_to_zero_grows_to_its_limit_and_is_asked_for_nothing_afterwards(tmp_path, environment):
    whole, url = tmp_path / "whole", tmp_path / "run"
    dist_cases.run_inline(dist_cases.config(whole))
    with AutoscaledCluster(2, environment) as nodes:
        assert nodes.nodes == 0 and nodes.asked is None
        chosen = dist_cases.config(url)
        assert chosen.num_workers is None
        process = fault_cases.start_job(tmp_path / "job.json", environment, chosen=chosen, ray_address=nodes.address)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert nodes.nodes == 2 and nodes.asked == []
    assert "Ray: waiting for nodes to join" in out
    assert fault_cases.factors(Checkpoint(str(url))) == fault_cases.factors(Checkpoint(str(whole)))
