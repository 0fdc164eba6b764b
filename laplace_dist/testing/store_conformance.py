"""What every store must do, as tests to inherit: supply a `store` fixture and let pytest collect the subclass.

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self):
            return Store("proto://bucket/" + uuid.uuid4().hex, {"key": ...})

The fixture's store must be empty. Nothing here knows which file system is behind it.
"""

from __future__ import annotations

import copy
import itertools
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from laplace_dist.config.secrets import leaves
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.run.layout import PLAN, partial_key
from laplace_dist.run.partial_manifests import read_manifest
from laplace_dist.run.partials import commit_partial, read_factors
from laplace_dist.run.provenance import environment
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store
from laplace_dist.testing.array_conformance import ArrayConformance

BAD_KEYS = ("", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\\b", "a\nb", "a/")


def _at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Return what `call(0)`, `call(1)`, ... return when they run at the same time, in the order of finishing."""
    start, results = threading.Barrier(count), []

    def run(number: int) -> None:
        start.wait()
        results.append(call(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count, "a thread failed"
    return results


def _plan() -> Plan:
    spec = {"factors": {name: {"shape": [2, 2], "symmetric": True} for name in ("w/A", "w/B")}}
    data, settings = {"length": 8, "sha256": "d"}, {"batch_size": 4, "segment_size": 4}
    return build_plan(settings, data=data, weights="w", model={"path": "m:f", "args": {}}, spec=spec)


def _begun(store: Store) -> Plan:
    """Return the plan of a run, after putting it into the store: whoever commits looks that it is still its own."""
    plan = _plan()
    assert store.create(PLAN, seal_json(plan.to_values()))
    return plan


def _commit(store: Store, plan: Plan, number: int, attempt: str, scale: float = 1.0) -> Any:
    import torch

    sums = {name: scale * (number + 1) * torch.eye(2) for name in plan.spec["factors"]}
    sums["loss"] = torch.tensor(1.0, dtype=torch.float64)
    store.create(PLAN, seal_json(plan.to_values()))
    origin = {"data_sha256": "0" * 64, "environment": environment("cpu")}
    return commit_partial(store, plan, plan.segments[number], sums, 4, attempt, **origin)


class StoreConformance(ArrayConformance):
    """The tests of objects and commits, and those of arrays; a subclass supplies the fixture `store`."""

    # -------------------------------------------------------------- objects

    def test_an_object_is_created_once(self, store: Store) -> None:
        """The first creator wins, and what it wrote stays."""
        assert not store.exists("a/b.json")
        assert store.create("a/b.json", b"one")
        assert not store.create("a/b.json", b"two")
        assert store.read("a/b.json") == b"one"
        assert (store.size("a/b.json"), store.exists("a/b.json"), store.exists("a")) == (3, True, False)

    def test_exactly_one_of_several_creators_wins(self, store: Store) -> None:
        """Whatever the timing, one says that it created the object, and the object is that one's."""
        for race in range(2):
            key = f"m{race}.json"
            answers = _at_once(4, lambda n, key=key: (store.create(key, b"attempt %d" % n), b"attempt %d" % n))
            assert [data for created, data in answers if created] == [store.read(key)]

    def test_exactly_one_of_several_swaps_wins(self, store: Store) -> None:
        """Of those who have read the same bytes; or the storage says that it cannot do this."""
        store.create("s.json", b"old")
        try:
            assert not store.swap("s.json", b"another", b"new") and store.read("s.json") == b"old"
        except SettingsError as error:
            assert "cannot replace an object on the condition that it has not changed" in str(error)  # noqa: PT017
            return
        answers = _at_once(4, lambda n: (store.swap("s.json", b"old", b"swap %d" % n), b"swap %d" % n))
        assert [data for swapped, data in answers if swapped] == [store.read("s.json")]
        with pytest.raises(MissingObjectError):
            store.swap("missing.json", b"old", b"new")

    def test_exactly_one_of_two_attempts_at_a_segment_wins(self, store: Store) -> None:
        """The attempt id in the manifest says which, both are told, and the loser's arrays are gone."""
        plan = _begun(store)
        receipts = _at_once(2, lambda n: _commit(store, plan, 1, f"a{n}"))
        manifest = read_manifest(store, plan, plan.segments[1])
        assert {receipt.attempt for receipt in receipts} == {manifest["attempt"]}
        assert sorted(receipt.won for receipt in receipts) == [False, True]
        left = {key.split("/")[2] for key in store.list("partials") if key.count("/") > 1}
        assert left == {manifest["attempt"]}
        assert read_factors(store, plan, manifest)["w/A"].tolist() == [[2.0, 0.0], [0.0, 2.0]]

    def test_a_reader_sees_the_old_or_the_new_bytes(self, store: Store) -> None:
        """Replacing is atomic: never a mixture, never nothing."""
        values = [bytes([digit]) * 300_000 for digit in (1, 2)]
        store.replace("CURRENT.json", values[0])
        done = threading.Event()

        def write(_: int) -> set[bytes]:
            try:
                for value in itertools.islice(itertools.cycle(values[::-1]), 12):
                    store.replace("CURRENT.json", value)
            finally:
                done.set()
            return set()

        def read(_: int) -> set[bytes]:
            seen = {store.read("CURRENT.json")}
            while not done.is_set():
                seen.add(store.read("CURRENT.json"))
            return seen

        seen = set().union(*_at_once(2, lambda n: (write, read)[n](n)))
        assert seen <= set(values)

    def test_what_was_written_is_listed_at_once_and_what_was_deleted_is_not(self, store: Store) -> None:
        """Another client's writes and deletions show without delay, by whole parts of a path."""
        other = copy.deepcopy(store)  # from its arguments, as in another process
        assert other.list() == store.list("p") == []
        keys = ["p/1.json", "p/1/x", "p/1/y/z", "pp/2", "top"]
        for key in reversed(keys):
            store.create(key, key.encode())
        assert other.list() == keys
        assert sorted(other.modified()) == keys
        assert other.list("p") == keys[:3]
        assert other.list("p", recursive=False) == ["p/1.json"]
        assert dict(other.read_many(keys)) == {key: key.encode() for key in keys}
        store.delete_tree("p/1")
        store.delete_tree("p/none")
        assert other.list("p") == ["p/1.json"]
        assert not other.exists("p/1/x")
        store.delete_tree("p/1.json")
        assert other.list() == ["pp/2", "top"]
        assert other.create("p/1.json", b"again")

    def test_keys_are_exact_and_never_patterns(self, store: Store) -> None:
        """What a shell would expand is an object like any other, and its neighbours, which would match, stay."""
        odd = ["q/[ab]/x*", "q/a?", "q/run[1]", "q/x*"]
        near = ["q/a", "q/aa", "q/ab", "q/run1", "q/xy"]
        for key in (*odd, *near):
            assert store.create(key, key.encode())
            assert not store.create(key, b"again")
        assert store.list() == sorted([*odd, *near]) == list(store.modified())
        assert dict(store.read_many(odd)) == {key: key.encode() for key in odd}
        assert [store.size(key) for key in odd] == [len(key) for key in odd]
        assert (store.list("q/[ab]"), store.list("q/[a*")) == (["q/[ab]/x*"], [])
        with pytest.raises(MissingObjectError, match=r"q/\[1\] is missing"):
            list(store.read_many(["q/[1]", "q/a"]))
        store.delete_tree("q/*")
        store.delete_tree("q/[ab]/x?")
        assert store.list() == sorted([*odd, *near])
        for key in ("q/[ab]", "q/a?", "q/run[1]", "q/x*"):
            store.delete_tree(key)
        assert store.list() == near
        store.delete_tree("q")
        assert store.list() == []

    def test_a_url_is_exact_and_never_a_pattern(self, store: Store) -> None:
        """A run in `run[1]` is neither found in `run1` nor deleted with it."""
        odd, near = (type(store)(f"{store.url}/run{end}", store._options) for end in ("[1]*?", "1ab"))
        for one in (odd, near):
            one.check_writable()
            assert one.list() == one.entries() == []
            entries = one.write_arrays("p/0", {"x": np.arange(3.0)})
            one.create("p/1.json", one.url.encode())
            assert one.entries() == ["p/"]
            assert one.read_array("p/0", "x", entries["x"]).tolist() == [0, 1, 2]
            assert dict(one.read_many(["p/1.json", "p/0/zarr.json"]))["p/1.json"] == one.url.encode()
        odd.delete_tree("p")
        assert odd.list() == []
        assert near.list("p") == ["p/0/x/c/0", "p/0/x/zarr.json", "p/0/zarr.json", "p/1.json"]

    def test_empty_objects_are_objects(self, store: Store) -> None:
        """Zero bytes are neither missing nor overwritten."""
        assert store.create("empty", b"")
        assert (store.read("empty"), store.size("empty"), store.list()) == (b"", 0, ["empty"])
        assert not store.create("empty", b"x")
        store.replace("empty", b"")
        assert store.exists("empty")

    def test_a_missing_object_is_named(self, store: Store) -> None:
        """One at a time and many at once."""
        store.check_writable()
        assert store.list() == []
        for call in (store.read, store.size, lambda key: list(store.read_many([key, key]))):
            with pytest.raises(MissingObjectError, match=r"partials/000001.json is missing.*recomputes that segment"):
                call("partials/000001.json")

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_no_key_leaves_the_checkpoint(self, store: Store, key: str) -> None:
        """Every operation refuses a key that could."""
        calls: list[Callable[[str], Any]] = [store.read, store.exists, store.size, store.delete_tree]
        calls += [lambda k: store.create(k, b""), lambda k: store.replace(k, b"")]
        calls += [lambda k: store.read_array("p", k, {}), lambda k: store.write_arrays("p", {k: np.ones(1)})]
        calls += [lambda k: list(store.read_many([k, k]))]
        for call in calls:
            with pytest.raises(CheckpointError, match="not a key inside the checkpoint"):
                call(key)

    def test_no_message_shows_a_storage_option(self, store: Store) -> None:
        """Neither the store's own text nor the whole traceback of an error."""
        secrets = list(leaves(store._options))
        texts = [repr(store), str(store), store.url]
        for call in (store.read, store.size, lambda key: store.read_array("p", key, {})):
            try:
                call("nothing/here")
            except CheckpointError as error:
                texts += traceback.format_exception(error)
        assert len(texts) > 6
        assert not [secret for secret in secrets for text in texts if secret in text]

    # -------------------------------------------------------------- partials

    def test_swapped_partials_are_noticed(self, store: Store) -> None:
        """Whether their manifests or their numbers change places, each is valid where it was and nowhere else."""
        plan = _begun(store)
        for number in range(2):
            _commit(store, plan, number, "a")
        first, second = (partial_key(segment.id) for segment in plan.segments)
        whole = read_manifest(store, plan, plan.segments[0])
        good = store.read(first)
        store.replace(first, store.read(second))
        with pytest.raises(CheckpointError, match=f"{first} does not belong to this run: its segment is '000001'"):
            read_manifest(store, plan, plan.segments[0])
        store.replace(first, good)
        for key in store.list("partials/000000/a/00000"):
            store.replace(key, store.read(key.replace("000000", "000001")))
        with pytest.raises(CheckpointError, match="partials/000000/a/00000.*altered.*sha256"):
            read_factors(store, plan, whole)

    def test_an_older_manifest_leads_nowhere(self, store: Store) -> None:
        """One that was kept from before its segment was recomputed names arrays that are gone: an error, not zeros."""
        plan = _begun(store)
        _commit(store, plan, 0, "old")
        key = partial_key("000000")
        old = store.read(key)
        store.delete_tree(key)
        store.delete_tree("partials/000000")
        _commit(store, plan, 0, "new", scale=3.0)
        store.replace(key, old)
        with pytest.raises(MissingObjectError, match="partials/000000/old/00000/zarr.json is missing"):
            read_factors(store, plan, read_manifest(store, plan, plan.segments[0]))
