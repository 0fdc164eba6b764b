"""What checkpointing costs: commits beside the map phase, the start of a resume, reading 10,000 manifests.

    python benchmarks/costs.py [commit] [resume] [manifests] [ahead] [reduction]

One process, one thread. `resume` needs no Ray: it measures what the driver does before it submits the first task of the
reduction. The S3 server is that of the tests (SeaweedFS), on loopback, so that its two processes share the cores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "dist"), str(HERE)]

import reduction  # noqa: E402
from map_phase import BATCH  # noqa: E402
from s3server import S3Server  # noqa: E402

from laplace_dist.config.settings import Config  # noqa: E402
from laplace_dist.job import Job  # noqa: E402
from laplace_dist.plan.plan import Plan, build_plan  # noqa: E402
from laplace_dist.plan.segments import Segment  # noqa: E402
from laplace_dist.run import attempts, layout, lifecycle, partial_manifests, partials  # noqa: E402
from laplace_dist.run.checkpoint import Checkpoint  # noqa: E402
from laplace_dist.run.provenance import environment  # noqa: E402
from laplace_dist.stages import reduce  # noqa: E402
from laplace_dist.stages.context import Context  # noqa: E402
from laplace_dist.stages.map import MapSegment  # noqa: E402
from laplace_dist.storage.sealed_json import seal_json  # noqa: E402

SEGMENTS, MANIFESTS = 500, 10_000


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def tiny_data(split: str, n: int = SEGMENTS * 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 16, generator=generator), torch.randint(0, 4, (n,), generator=generator))


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def commit(places: dict[str, tuple[str, dict]], segments: int = 3) -> None:
    """Print the share of commits in the time of segments of the default size: 60,000 images, a CNN, exact-GGN Kron."""
    for where, (url, options) in places.items():
        spent, total, size = commit_seconds(url, options, segments)
        print(
            f"commit, {where}: {spent / segments:.3f} s of {total / segments:.2f} s per segment of {size} examples: "
            f"{100 * spent / (total - spent):.2f} % of the map time",
            flush=True,
        )


def commit_seconds(url: str, options: dict, segments: int) -> tuple[float, float, int]:
    """Return the seconds that some segments' commits take, those of the segments with them, and the size of a segment."""
    config = Config(
        model="map_phase:network",
        data="map_phase:examples",
        checkpoint=f"{url}/commit",
        storage_options=options,
        batch_size=BATCH,
        gpus_per_worker=0.0,
        ray_address="local",
        skip_tune=True,
        skip_evaluate=True,
    )
    with Job(config, say=lambda text: None) as job:
        job.open()
        context, plan = Context(job.config), job.plan
        MapSegment(plan.digest, plan.segments[0]).run(context)()  # loads the model, and every library once
        tasks = [MapSegment(plan.digest, segment) for segment in plan.segments[1 : 1 + segments]]
        total, receipts = timed(lambda: [task.run(context)() for task in tasks])
        return sum(receipt["seconds"] for receipt in receipts), total, plan.segments[0].stop


def resuming(places: dict[str, tuple[str, dict]]) -> None:
    """Print how long a run of 500 committed segments takes from the command's settings to the first sum."""
    for where, (url, options) in places.items():
        config = Config(
            model="costs:tiny",
            data="costs:tiny_data",
            checkpoint=f"{url}/resume",
            storage_options=options,
            batch_size=4,
            segment_size=4,
            gpus_per_worker=0.0,
            skip_tune=True,
            skip_evaluate=True,
        )
        with Job(config, say=lambda text: None) as job:
            job.open()
            plan, context = job.plan, Context(job.config)
            sums = context.la.zero_sums()
            for offset, x, y in context.batches("train", plan.data, 0, 4):
                context.la.accumulate(sums, x, y, offset=offset)
            for segment in plan.segments:
                tensors = {name: tensor + segment.start for name, tensor in sums.to_tensors().items()}
                partials.commit_partial(
                    job.store,
                    plan,
                    segment,
                    tensors,
                    4,
                    attempts.new_attempt(),
                    data_sha256="0" * 64,
                    environment=environment("cpu"),
                )

        def until_the_first_task() -> list[reduce.SumPart]:
            with Job(config, say=lambda text: None) as job:  # noqa: B023
                job.open()
                assert not lifecycle.remaining(job.plan, lifecycle.committed(job.store, job.plan, arrays=False))
                return reduce.part_tasks(job.store, job.plan, list(partial_manifests.manifests(job.store, job.plan)))

        seconds, tasks = timed(until_the_first_task)
        context, task = Context(config), tasks[0]
        first, _ = timed(lambda: task.run(context))  # noqa: B023
        print(
            f"resume, {where}: {seconds:.2f} s until the reduction of {SEGMENTS} segments is submitted; the task that sums "
            f"one of {len(tasks)} parts of {SEGMENTS} partials takes {first:.1f} s",
            flush=True,
        )


def reading_ahead(places: dict[str, tuple[str, dict]], arrays: int = 200, latency: float = 0.03) -> None:
    """Print how long small arrays take from an object store whose every answer is late, one at a time and read ahead."""
    url, options = places["S3"]
    store = Checkpoint(f"{url}/ahead", options)
    entries = store.write_arrays("group", {f"a{i}": np.ones((64, 64), np.float32) for i in range(arrays)})
    wanted = [("group", name, entry) for name, entry in entries.items()]
    answer = store._fs.cat_file

    def late(path: str) -> bytes:
        time.sleep(latency)
        return answer(path)

    store._fs.cat_file = late
    alone, _ = timed(lambda: [store.read_array(*one) for one in wanted])
    ahead, _ = timed(lambda: [list(pieces) for pieces in store.read_pieces(wanted)])
    del store._fs.cat_file
    print(
        f"ahead, S3: {arrays} arrays of 16 kB at {1000 * latency:.0f} ms per request: {alone:.1f} s one at a time, "
        f"{ahead:.1f} s read ahead",
        flush=True,
    )


def ten_thousand(places: dict[str, tuple[str, dict]]) -> None:
    """Print how long it takes to list 10,000 manifests and to verify every one of them against the plan."""
    factors = {f"layer{i}.weight/{side}": {"shape": [64, 64], "symmetric": True} for i in range(5) for side in "AB"}
    data, settings = {"length": MANIFESTS, "sha256": "0" * 64}, {"batch_size": 1, "segment_size": 1}
    model = {"path": "m:f", "args": {}}
    plan = build_plan(settings, data=data, weights="0" * 64, model=model, spec={"factors": factors, "dtype": "float32"})
    for where, (url, options) in places.items():
        store = Checkpoint(f"{url}/manifests", options)
        store.create(layout.PLAN, seal_json(plan.to_values()))
        contents = {layout.partial_key(segment.id): manifest(plan, segment) for segment in plan.segments}
        if store.is_local:
            for key, content in contents.items():
                store._put(key, content)
        else:
            store._fs.fs.pipe({f"{store._root}/{key}": content for key, content in contents.items()})
        size = sum(map(len, contents.values())) / len(contents)
        seconds, found = timed(lambda: lifecycle.committed(store, plan))  # noqa: B023
        assert len(found) == MANIFESTS
        print(f"manifests, {where}: {MANIFESTS} of {size:.0f} bytes listed and verified in {seconds:.1f} s", flush=True)


def manifest(plan: Plan, segment: Segment) -> bytes:
    """Return a manifest as a commit writes it."""
    entry = {"sha256": "0" * 64, "dtype": "float64", "packed": False, "metadata_sha256": "0" * 64, "stored_bytes": 9000}
    attempt = attempts.new_attempt()
    return seal_json(
        {
            "format_version": plan.format_version,
            "plan": plan.digest,
            "segment": segment.id,
            "start": segment.start,
            "stop": segment.stop,
            "attempt": attempt,
            "n_data": segment.stop - segment.start,
            "prefix": f"partials/{segment.id}/{attempt}",
            "arrays": {part.id: {**entry, "shape": [part.stop - part.start]} for part in plan.parts},
            "loss": 1.0,
            "data_sha256": "0" * 64,
            "environment": environment("cpu"),
        }
    )


def main() -> None:
    """Print the figures that were asked for, or all of them."""
    torch.set_num_threads(1)
    measures = {"commit": commit, "resume": resuming, "manifests": ten_thousand, "ahead": reading_ahead}
    measures["reduction"] = reduction.measure
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder)).start()
        try:
            places = {"directory": (f"{folder}/local", {}), "S3": (server.url(), server.options)}
            for name in sys.argv[1:] or measures:
                measures[name](places)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
