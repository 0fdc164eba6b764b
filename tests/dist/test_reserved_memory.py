"""Workers reserve the memory that they are expected to take, so that no node is given more of them than it holds."""

from __future__ import annotations

import time
from collections import Counter

import dist_cases
import pytest
import torch
from torch import nn

import laplace_dist
from laplace.capture.saved import saved_bytes
from laplace_dist.execution.inline import Inline
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.execution.scaling import Node, Placement
from laplace_dist.execution.timeouts import Limit
from laplace_dist.plan.worker_memory import BESIDE, PROCESS_BYTES, RAY_BYTES, expected_bytes
from laplace_dist.stages import batch_memory, resolving

GB = 10**9


def test_what_a_worker_is_expected_to_take():
    """Its process, the model, the largest group's sums, and small ones twice, since they are committed beside others."""
    small = {"factors": {"a": {"shape": [100, 100], "symmetric": True}, "b": {"shape": [10], "symmetric": False}}}
    assert expected_bytes(small, 1, 5) == PROCESS_BYTES + RAY_BYTES + 5 + 2 * 8 * 10_010
    assert expected_bytes(small, 2, 5) == PROCESS_BYTES + RAY_BYTES + 5 + 2 * 8 * 10_000
    wide = {"factors": {"full": {"shape": [6000, 6000], "symmetric": True}}}
    assert BESIDE < 8 * 6000**2
    assert expected_bytes(wide, 1, 0) == PROCESS_BYTES + RAY_BYTES + 8 * 6000**2


def node(name, cpus, memory, free=None):
    total = {"CPU": cpus, "memory": memory}
    return Node(name, "h:1", total, {**total, "memory": memory if free is None else free})


def test_a_node_is_given_as_many_as_its_memory_holds():
    nodes = [node("small", 8, 3 * GB), node("large", 8, 10 * GB), node("busy", 8, 10 * GB, free=GB)]
    need = {"CPU": 1.0, "GPU": 0.0, "memory": 2.0 * GB}
    placement = Placement(lambda: nodes, need)
    placement.refresh(0.0)
    assert placement.fits == 1 + 5 + 5
    placed = Counter(placement.places(99, Counter(), Counter(), lambda name: True))
    assert placed == {"small": 1, "large": 5}, "what others have reserved is not there"
    assert "2,000,000,000 bytes of memory" in placement.describe()


class Told:
    """The lines that a connection says."""

    def __init__(self):
        self.lines = []

    def __call__(self, text):
        self.lines.append(text)


@pytest.fixture
def joined(cluster, tmp_path):
    """Return a function from settings to a connection, and what it says."""
    opened = []

    def join(**changes):
        told = Told()
        opened.append(Cluster(dist_cases.config(tmp_path, ray_address=cluster, **changes), say=told))
        opened[-1].connect()
        return opened[-1], told

    yield join
    for one in opened:
        one.close()


def memory_of_node():
    import ray

    return int(ray.nodes()[0]["Resources"]["memory"])


def alive(pool, count):
    end = time.monotonic() + 60
    while pool.alive < count and time.monotonic() < end:
        pool.wait(0.2, Limit(None))
    return pool.alive


def reserved_in_the_end(expected):
    """Return what Ray counts as reserved, when that is what is expected or a minute has gone by: nodes report it some time later."""
    import ray

    end, reserved = time.monotonic() + 60, None
    while time.monotonic() < end:
        reserved = memory_of_node() - ray.available_resources().get("memory", 0.0)
        if reserved == pytest.approx(expected, rel=1e-3):
            break
        time.sleep(0.05)
    return reserved


def test_on_a_cluster_only_so_many_start_and_ray_knows_what_they_take(joined):
    connection, told = joined(num_workers=4)
    expected = memory_of_node() * 2 // 3
    assert reserved_in_the_end(0) == 0, "earlier workers have left"
    pool = connection.pool("cpu", expected)
    try:
        pool.top_up(4)
        assert alive(pool, 1) == 1, "there are CPUs for four, and memory for one"
        pool.top_up(4)
        assert pool.alive == 1 and not pool._flight
        assert reserved_in_the_end(expected) == pytest.approx(expected, rel=1e-3)
    finally:
        pool.close()
    assert [line for line in told.lines if "room for 1 of 4 workers" in line and f"{expected:,} bytes" in line]


def test_what_no_node_has_is_not_reserved_and_a_line_says_so(joined):
    """Ray counts less than a machine has; such a job runs as it did, and what cannot run at all is refused by the fit."""
    connection, told = joined(num_workers=2)
    pool = connection.pool("cpu", memory_of_node() + 1)
    assert "memory" not in pool._options and pool.size == 2
    [line] = [line for line in told.lines if "is expected to take" in line]
    assert f"no node has more than {memory_of_node():,}" in line and "none is reserved" in line
    connection, told = joined()
    assert "memory" not in connection.pool("cpu")._options and told.lines == [told.lines[0]]


CONVNET = 4 * (
    36 + 3 * 36 + 27
)  # of an example: inputs of the convolution, what tanh gives, inputs of the linear layer
MLP = 8 * (3 + 4)  # inputs, and what tanh gives, which are the last layer's inputs


class Encoded(nn.Module):
    """Adds what does not grow with the batch, and what two layers share."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.register_buffer("table", torch.randn(1000, 3))

    def forward(self, x):
        return self.layers(x) * (self.table @ torch.ones(3, 2).double()).exp().mean(0)


def test_what_autograd_keeps_of_an_example_is_counted_once_and_without_the_model():
    model, x = Encoded().double().eval(), torch.randn(6, 3).double()
    kept = [saved_bytes(model, x[:count].clone()) for count in (1, 2, 6)]
    assert kept[1] - kept[0] == MLP and kept[2] - kept[1] == 4 * MLP
    frozen = model.requires_grad_(False)
    assert saved_bytes(frozen, x) == 0


@pytest.mark.parametrize(
    "changes",
    [{"subset_of_weights": "last_layer"}, {"backend": "curvlinops"}, {"precision": "bf16"}, {"batch_size": 1000}],
    ids=str,
)
def test_a_batch_is_counted_where_it_is_whole_in_memory(tmp_path, changes):
    chosen = dist_cases.config(tmp_path, **changes)
    resolved = resolving.resolve(chosen)
    counted = batch_memory.batch_bytes(chosen, resolved, "cpu")
    assert counted == (dist_cases.N * CONVNET if "batch_size" in changes else 0)
    assert batch_memory.batch_bytes(chosen, resolved, "cuda") == 0


def test_a_fit_tells_its_executor_what_a_worker_takes(tmp_path):
    asked = []

    class Asked(Inline):
        def pool(self, device, expected=None):
            asked.append(expected)
            return super().pool(device, expected)

    laplace_dist.fit(dist_cases.config(tmp_path), executor=Asked)
    sums = 8 * (9**2 + 3**2 + 27**2 + 3**2)
    batch = 4 * CONVNET
    assert asked == [PROCESS_BYTES + RAY_BYTES + 4 * 114 + 2 * sums + batch]
