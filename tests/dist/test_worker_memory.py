"""A worker holds its model, a batch and at most two copies of the sums, however many segments it has done."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

# Peak of each of twelve segments above what the worker holds before its first, after one small one has loaded everything.
SCRIPT = """
import resource, sys
import torch
from torch import nn
from laplace_dist.config.settings import Config
from laplace_dist.job import Job
from laplace_dist.execution.worker import Worker
from laplace_dist.stages.map import MapSegment

width, url = int(sys.argv[1]), sys.argv[2]

class Data:
    def __len__(self): return 96
    def __getitem__(self, i):
        if i >= 96: raise IndexError(i)
        return torch.full((width,), float(i % 5)), torch.tensor(i % 4)

def data(split): return Data()
def model(): return nn.Sequential(nn.Linear(width, 4))

sys.modules["toy"] = sys.modules["__main__"]
config = Config(model="toy:model", data="toy:data", checkpoint=url, batch_size=8, segment_size=8, ray_address="local",
                skip_tune=True, skip_evaluate=True)

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

with Job(config) as job:
    job.open()
    worker = Worker(job.config, [], ".", False)
    worker.start()
    worker._context.la, worker._context.store
    before = status("VmRSS")
    for segment in job.plan.segments:
        worker.run(MapSegment(job.plan.digest, segment))
    worker.finish()
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_worker_holds_at_most_two_copies_of_the_sums(tmp_path, environment):
    megabytes = 5120**2 * 8 / 2**20  # the one large factor in float64, 200 MB
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, "5120", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert megabytes < float(done.stdout.split()[-1]) < 2 * megabytes


# The same of dense curvature over 7,204 weights, a matrix of 400 MB, in eight groups of 32 MB.
DENSE = (
    SCRIPT.replace(
        "skip_tune=True, skip_evaluate=True)",
        "skip_tune=True, skip_evaluate=True, hessian_structure='full', module_groups=8)",
    )
    .replace("return 96\n", "return 16\n")
    .replace("i >= 96", "i >= 16")
    .replace("job.plan.segments", "job.plan.units")
)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_worker_of_a_run_in_groups_never_holds_the_whole_matrix(tmp_path, environment):
    megabytes = (4 * 1801) ** 2 * 8 / 2**20
    command = [sys.executable, "-W", "ignore", "-c", DENSE, "1800", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert len([*(tmp_path / "run" / "partials").glob("*.json")]) == 16
    assert 0.08 * megabytes < float(done.stdout.split()[-1]) < 0.6 * megabytes


# Page faults of ten rounds that each take and give back 96 MB, as batches do, after a first one.
FAULTS = """
import resource
import torch
from laplace_dist.execution import worker

worker._settle_allocator()

def batch():
    return [torch.ones(2 << 20) for _ in range(12)]

batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are those of Linux, habits those of glibc")
def test_a_batch_is_not_given_memory_that_the_kernel_has_to_clear_again(environment):
    command = [sys.executable, "-W", "ignore", "-c", FAULTS]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 0.05 * 10 * (96 * 2**20 / resource.getpagesize())
