"""The reduction in parts: the same bits wherever it is cut, killed or collected around; and what 0.1 left behind."""

from __future__ import annotations

import shutil
import tracemalloc
from types import SimpleNamespace

import crash_store
import dist_cases
import numpy as np
import pytest
import torch
from crash_store import CrashingStore, make_plan, start, state, whole_run, work
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_cases import Recording

import laplace_dist
from laplace.structures.sums import sum_in_order
from laplace_dist.errors import CheckpointError
from laplace_dist.plan.parts import PART_ENTRIES, Place, places, plan_parts
from laplace_dist.run import layout, partial_manifests, partials, windows
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.combination import Window
from laplace_dist.run.leases import Lease
from laplace_dist.run.vector import Vector, complete, write
from laplace_dist.stages import reduce
from laplace_dist.stages.reduce import SumPart
from laplace_dist.storage import arrays

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9)).map(lambda s: ((s[0], s[0]), True)),
    st.tuples(st.integers(1, 3), st.integers(1, 5)).map(lambda s: ((s[0], s[1], s[1]), True)),
    st.lists(st.integers(0, 4), max_size=3).map(lambda s: (tuple(s), False)),
)


@settings(max_examples=100, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=5), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_cutting_and_putting_together_is_the_identity(shapes, size, seed):
    rng = np.random.default_rng(seed)
    spec = {"factors": {f"f{i}": {"shape": list(s), "symmetric": sym} for i, (s, sym) in enumerate(shapes)}}
    arrays = {f"f{i}": rng.standard_normal(s) for i, (s, _) in enumerate(shapes)}
    arrays = {n: a + a.swapaxes(-1, -2) if spec["factors"][n]["symmetric"] else a for n, a in arrays.items()}
    where = places(spec)
    found = {place.name: np.full(place.shape, np.nan) for place in where}
    parts = plan_parts(spec, size)
    assert [part.start for part in parts] == list(range(0, where[-1].stop, size))
    vector = Vector(where, arrays)
    for part in parts:
        whole = vector.read(part.start, part.stop)
        sliced = vector.part(part.start, part.stop)
        assert sliced.shape == whole.shape and sliced.nbytes == whole.nbytes
        half = len(whole) // 2
        assert np.array_equal(np.concatenate([sliced[slice(0, half)], sliced[slice(half, len(whole))]]), whole)
        write(where, found, part.start, whole)
    complete(where, found)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_a_symmetric_factor_takes_a_triangle():
    spec = {"factors": {"a": {"shape": [3, 3], "symmetric": True}, "b": {"shape": [], "symmetric": False}}}
    assert places(spec) == [Place("a", (3, 3), True, 0, 6, (0, 3)), Place("b", (), False, 6, 7, (0, 1))]


def in_parts(monkeypatch, entries):
    monkeypatch.setattr("laplace_dist.plan.plan.PART_ENTRIES", entries)


def test_a_kill_after_any_part_redoes_the_parts_after_it_alone(tmp_path, monkeypatch):
    in_parts(monkeypatch, 20)
    whole = dist_cases.config(tmp_path / "whole")
    dist_cases.run_inline(whole)
    expected = laplace_dist.load_posterior(str(tmp_path / "whole"), dist_cases.convnet()).sums.to_tensors()
    parts = sorted(key for key in Checkpoint(str(tmp_path / "whole")).list("parts", recursive=False))
    assert len(parts) > 3
    for done in range(len(parts)):
        url = tmp_path / str(done)
        shutil.copytree(tmp_path / "whole", url)
        store = Checkpoint(str(url))
        for name in ("CURRENT.json", "posteriors", "window.json", *parts[done:]):
            store.delete_tree(name)
        config = dist_cases.config(url)
        with dist_cases.inline_job(config) as job:
            job.session.pool = pool = Recording(job.config)
            job.open()
            job.map()
            job.reduce()
        assert [task.part.id for task in pool.done(SumPart)] == [key[6:-5] for key in parts[done:]]
        found = laplace_dist.load_posterior(str(url), dist_cases.convnet()).sums.to_tensors()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_part_of_partials_that_were_computed_again_is_summed_again(tmp_path):
    """Whoever deletes a bad partial may get other bits for it on other hardware: no sum of the old ones survives in between."""
    store, plan = Checkpoint(str(tmp_path / "run")), make_plan()
    start(store, plan)
    for segment in plan.segments:
        work(store, plan, segment)
    context = SimpleNamespace(store=store, plan=plan, window_of=lambda digest: Window(store, plan), device="cpu")
    (task,) = reduce.part_tasks(store, plan, list(partial_manifests.manifests(store, plan)))
    task.run(context)
    assert reduce.part_tasks(store, plan, list(partial_manifests.manifests(store, plan))) == []
    store.delete_tree(layout.partial_key("000001"))
    sums = {name: 2 * value for name, value in crash_store.sums_of(plan.segments[1]).items()}
    partials.commit_partial(store, plan, plan.segments[1], sums, 4, "again", **crash_store.ORIGIN)
    manifests = list(partial_manifests.manifests(store, plan))
    with pytest.raises(CheckpointError, match=r"parts/00000.json is the sum of other partials"):
        windows.commit_window(store, plan, manifests)
    (task,) = reduce.part_tasks(store, plan, manifests)
    task.run(context)
    windows.commit_window(store, plan, manifests)
    assert [key for key, _ in laplace_dist.verify(store.url).problems] == ["weights.safetensors"], (
        "which are a stand-in"
    )


class Collecting(CrashingStore):
    """Has everything collected that looks like an orphan, however young, before each of its operations."""

    busy = False

    def _do(self, name, key, act, half=lambda: None):
        if not self.busy:
            Collecting.busy = True
            try:
                if Checkpoint.exists(Checkpoint(self.url), layout.PLAN):
                    report = laplace_dist.verify(self.url, collect_orphans_older_than=0)
                    self.collected += report.collected
            finally:
                Collecting.busy = False
        return super()._do(name, key, act, half)


def test_collecting_orphans_at_any_moment_of_any_stage_destroys_nothing(tmp_path):
    """While a job is at work, nothing that it has written counts as an orphan."""
    plan = make_plan()
    whole_run(Checkpoint(str(tmp_path / "whole")), plan)
    store = Collecting(str(tmp_path / "run"))
    store.collected = []
    start(store, plan)
    lease = Lease(Checkpoint(store.url))
    lease.show()
    whole_run(store, plan)
    assert len(store.operations) > 50 and store.collected == []
    assert state(Checkpoint(store.url), plan) == state(Checkpoint(str(tmp_path / "whole")), plan)
    Checkpoint(store.url).create("partials/000000/crashed/x", b"")
    assert laplace_dist.verify(store.url, collect_orphans_older_than=0).collected == []
    lease.end()
    assert laplace_dist.verify(store.url, collect_orphans_older_than=0).collected == ["partials/000000/crashed"]


def test_a_job_shows_that_it_is_at_work_and_takes_the_sign_away(tmp_path, monkeypatch):
    seen = []
    create = Checkpoint.create

    def watched(self, key, data):
        if key.startswith(("partials/", "parts/", "posteriors/", "tuning/", "evaluation/")):
            seen.append((key, len(Checkpoint(self.url).list("jobs"))))
        return create(self, key, data)

    monkeypatch.setattr(Checkpoint, "create", watched)
    dist_cases.run_inline(dist_cases.config(tmp_path, skip_tune=False, skip_evaluate=False))
    assert len(seen) > 10 and all(count == 1 for _, count in seen)
    assert Checkpoint(str(tmp_path)).list("jobs") == []


def test_the_segment_of_a_large_network_costs_at_most_half_of_the_requests_that_it_did():
    """A ViT-B, 150 factors and 2 GiB of sums: 826 where each factor was an array of its own."""
    names = [("patch", 768, 768), ("head", 768, 1000)]
    for block in range(12):
        sizes = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
        names += [(f"{block}.{name}", *size) for name, size in sizes.items()]
    sides = {f"{name}/{i}": side for name, a, b in names for i, side in enumerate((a, b, b))}
    spec = {"factors": {name: {"shape": [side, side], "symmetric": True} for name, side in sides.items()}}
    assert len(spec["factors"]) == 150
    parts = plan_parts(spec, PART_ENTRIES)
    chunks = sum(-(-(part.stop - part.start) * 8 // arrays.CHUNK_BYTES) for part in parts)
    requests = (
        2 * (chunks + len(parts)) + 2
    )  # chunks and metadata, written and read back; the group's, and the manifest
    assert requests <= 826 // 2


def test_small_factors_share_their_requests(tmp_path):
    """150 factors in one segment: a few objects of one array, not some five for each of them."""
    spec = {"factors": {f"layer{i}/A": {"shape": [8, 8], "symmetric": True} for i in range(150)}, "dtype": "float32"}
    plan = crash_store.build_plan(
        {"batch_size": 4, "segment_size": 4}, data={"length": 4, "sha256": "d"}, weights="w",
        model={"path": "m:f", "args": {}}, spec=spec,
    )  # fmt: skip
    store = CrashingStore(str(tmp_path / "run"))
    start(store, plan)
    before = len(store.operations)
    sums = {name: torch.eye(8) for name in spec["factors"]} | {"loss": torch.tensor(1.0)}
    partials.commit_partial(store, plan, plan.segments[0], sums, 4, "a", **crash_store.ORIGIN)
    assert len(store.operations) - before < 10


# ------------------------------------------------------------------ piece by piece


def committed_run(tmp_path, monkeypatch, entries, segments=4, chunk=2**13):
    """Return a store and a plan of one part of several chunks, with what each segment has committed."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
    spec = {"factors": {"w": {"shape": [entries], "symmetric": False}}, "dtype": "float32"}
    settings = {"batch_size": 1, "segment_size": 1}
    plan = crash_store.build_plan(
        settings, data={"length": segments, "sha256": "d"}, weights="w", model={"path": "m:f", "args": {}}, spec=spec
    )
    store, sums = Checkpoint(str(tmp_path / "run")), []
    start(store, plan)
    for segment in plan.segments:
        generator = torch.Generator().manual_seed(segment.start)
        values = torch.randn(entries, generator=generator, dtype=torch.float64) * 10.0**segment.start
        values[:2] = torch.tensor([-0.0, 0.0 if segment.start else -0.0])
        tensors = {"w": values, "loss": torch.tensor(1.0)}
        partials.commit_partial(store, plan, segment, tensors, 1, "a", **crash_store.ORIGIN)
        sums.append(values)
    return store, plan, sums


def test_adding_piece_by_piece_gives_the_bits_of_adding_whole_parts(tmp_path, monkeypatch):
    """Signs of zeros too: the sum of negative zeros is one."""
    store, plan, sums = committed_run(tmp_path, monkeypatch, 5000)
    manifests = list(partial_manifests.manifests(store, plan))
    (part,) = plan.parts
    assert len(store.list(f"{manifests[0]['prefix']}/{part.id}/c")) == 5
    wanted = sum_in_order(sums).numpy()
    assert windows.sum_part(store, plan, manifests, part).tobytes() == wanted.tobytes()
    assert np.signbit(wanted[0]) and not np.signbit(wanted[1])
    assert windows.sum_part(store, plan, manifests[::-1], part).tobytes() != wanted.tobytes()


@pytest.mark.parametrize("bad", ["c/3", "c/0", "zarr.json"])
def test_a_bad_part_ends_the_sum_and_is_named_and_verify_names_each(tmp_path, monkeypatch, bad):
    store, plan, _ = committed_run(tmp_path, monkeypatch, 5000)
    manifests = list(partial_manifests.manifests(store, plan))
    (part,) = plan.parts
    keys = [f"{manifests[number]['prefix']}/{part.id}/{bad}" for number in (1, 3)]
    for key in keys:
        store.replace(key, store.read(key)[:-1])
    with pytest.raises(CheckpointError, match=f"{keys[0]} is truncated or altered.*recomputes that segment"):
        windows.sum_part(store, plan, manifests, part)
    found = [text for key, text in laplace_dist.verify(store.url).problems if key.startswith("partials/")]
    assert [key for key in keys for text in found if key in text] == keys and len(found) == 2


def test_numbers_that_were_exchanged_between_partials_are_no_sum(tmp_path, monkeypatch):
    """Every chunk is whole by its own crc32c; the sha256 over all of them says that they are another's."""
    store, plan, _ = committed_run(tmp_path, monkeypatch, 5000)
    manifests = list(partial_manifests.manifests(store, plan))
    (part,) = plan.parts
    one, other = (f"{manifests[number]['prefix']}/{part.id}/c/4" for number in (0, 2))
    store.replace(one, store.read(other))
    with pytest.raises(CheckpointError, match=f"{manifests[0]['prefix']}/{part.id} is .*sha256"):
        windows.sum_part(store, plan, manifests, part)


def test_memory_of_a_sum_is_the_part_and_a_few_chunks_however_many_partials_there_are(tmp_path, monkeypatch):
    chunk = 2**18
    store, plan, sums = committed_run(tmp_path, monkeypatch, 8 * chunk // 8, segments=12, chunk=chunk)
    manifests = list(partial_manifests.manifests(store, plan))
    (part,) = plan.parts
    windows.sum_part(store, plan, manifests, part)
    for ahead, chunks in ((store.ahead, 3), (arrays.Ahead(32, 32, 3 * chunk), 7)):
        monkeypatch.setattr(Checkpoint, "ahead", ahead)
        tracemalloc.start()
        try:
            windows.sum_part(store, plan, manifests, part)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert 8 * chunk < peak < (8 + chunks + 0.5) * chunk, peak / chunk
