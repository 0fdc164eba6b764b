"""A checkpoint in memory whose operations go wrong: arrays, seals, commits and all that is above are the real code.

What an object store may do to a client, and nothing that it does not: an answer is lost after the operation took effect, a
request fails, is carried out twice, or the process dies around it; objects that come or go while a listing is under way are in
it or not. A write is whole, and seen at once by everybody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from laplace_dist.errors import StorageError
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.storage.keys import check_key
from laplace_dist.storage.pieces import Ahead
from laplace_dist.testing.schedule import Actor

BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
# Decoding is a function of the bytes, and most of the time of a schedule: what was decoded once is kept.
_OPENED: dict[Any, Any] = {}
_DECODED: dict[Any, Any] = {}
FAULTS = ("crash before", "crash after", "crash in the middle", "fails", "answer lost", "twice")


@dataclass
class Objects:
    """What lies in the bucket.

    Attributes:
        data: Bytes by key.
        times: Seconds at which each was last written, by key.
        now: Returns the time in seconds.
        writers: Which job wrote an array, by key.
    """

    now: Callable[[], float]
    data: MutableMapping[str, bytes] = field(default_factory=dict)
    times: MutableMapping[str, float] = field(default_factory=dict)
    writers: MutableMapping[str, str] = field(default_factory=dict)

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        self.data[key], self.times[key] = data, self.now()

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        self.data.pop(key, None)
        self.times.pop(key, None)

    def under(self, prefix: str) -> list[str]:
        """Return the keys of the object with this key and of those under it."""
        return sorted(key for key in self.data if not prefix or key == prefix or key.startswith(f"{prefix}/"))

    def folder(self, prefix: str) -> Objects:
        """Return what lies under a prefix, by its key there; whoever changes the one changes the other."""
        return Objects(self.now, *(_Folder(of, f"{prefix}/") for of in (self.data, self.times, self.writers)))


class _Folder(MutableMapping[str, Any]):
    """The entries of a mapping whose keys have a prefix, without it."""

    def __init__(self, whole: MutableMapping[str, Any], prefix: str) -> None:
        self._whole, self._prefix = whole, prefix

    def __getitem__(self, key: str) -> Any:
        return self._whole[self._prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._whole[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._whole[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in list(self._whole) if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class SimulatedStore(Checkpoint):
    """One client of the bucket.

    Args:
        objects: The bucket.
        actor: Who it is; None for one that nothing happens to and that takes no time.
        faults: Probability of each of `FAULTS` at an operation.
        job: For which it works.
    """

    is_local = True
    ahead = Ahead(0, 0, 0)  # in no threads, whose order nobody could draw

    def __init__(
        self, objects: Objects, actor: Actor | None = None, faults: Mapping[str, float] | None = None, job: str = ""
    ) -> None:
        super().__init__("simulated://run")
        self.objects, self.actor, self.faults = objects, actor, dict(faults or {})
        self.job = job
        self._given: dict[str, bytes] = {}

    def under(self, prefix: str) -> SimulatedStore:
        """Return the store of what lies under a prefix, to which the same happens."""
        inner = object.__new__(type(self))
        inner.__dict__ |= self.__dict__
        inner.url, inner.objects, inner._given = f"{self.url}/{prefix}", self.objects.folder(prefix), {}
        return inner

    # -------------------------------------------------------------- what the store is made of

    def read(self, key: str) -> bytes:
        """Return an object's bytes."""

        def effect() -> bytes:
            if key not in self.objects.data:
                raise self._missing(key)
            return self.objects.data[key]

        return self._given.pop(key) if key in self._given else self._do("read", key, effect)

    def create(self, key: str, data: bytes) -> bool:
        """Create an object unless it exists; one with these very bytes counts as created, as the real store has it."""

        def effect() -> bool:
            if key not in self.objects.data:
                self.objects.put(key, data)
            return self.objects.data[key] == data

        return self._do("create", key, effect)

    def replace(self, key: str, data: bytes) -> None:
        """Write an object over the old one."""
        self._do("replace", key, lambda: self.objects.put(key, data))

    def swap(self, key: str, expected: bytes, data: bytes) -> bool:
        """Write an object over the old one if that has the expected bytes."""

        def effect() -> bool:
            if key not in self.objects.data:
                raise self._missing(key)
            if self.objects.data[key] == expected:
                self.objects.put(key, data)
            return self.objects.data[key] == data

        return self._do("swap", key, effect)

    def check_swaps(self) -> None:
        """Do nothing: objects in memory are compared and set."""

    def list(self, prefix: str = "", *, recursive: bool = True) -> list[str]:
        """Return the keys under a prefix."""
        keys = self._do("list", prefix, lambda: self._listed(prefix, prefix))
        depth = prefix.count("/") + 1 if prefix else 0
        return [key for key in keys if key != prefix and (recursive or key.count("/") == depth)]

    def modified(self, prefix: str = "") -> dict[str, datetime]:
        """Return when every object under a prefix was last written."""
        times = self.objects.times
        keys = self._do("list", prefix, lambda: {key: times.get(key, 0.0) for key in self._listed(prefix, "times")})
        return {key: BEGIN + timedelta(seconds=time) for key, time in keys.items()}

    def delete_tree(self, prefix: str) -> None:
        """Delete the object with this key and every object under it, one after the other."""
        check_key(prefix)

        def effect() -> None:
            keys = self.objects.under(prefix)
            for key in keys[: len(keys) // 2]:
                self.objects.delete(key)
            if len(keys) > 1:
                self._step(f"goes on deleting {prefix}")
            for key in self.objects.under(prefix):
                self.objects.delete(key)

        def half() -> None:
            for key in self.objects.under(prefix)[::2]:
                self.objects.delete(key)

        self._do("delete", prefix, effect, half)

    def now(self) -> datetime:
        """Return the storage's own time."""
        self._step("asks for the time")
        return BEGIN + timedelta(seconds=self.objects.now())

    def entries(self) -> list[str]:
        """Return what lies directly under the URL."""
        keys = self._do("list", "", lambda: self._listed("", "entries"))
        return sorted({head + ("/" if rest else "") for head, _, rest in (key.partition("/") for key in keys)})

    def _info(self, key: str) -> dict[str, Any] | None:
        def effect() -> dict[str, Any] | None:
            return {"size": len(self.objects.data[key])} if key in self.objects.data else None

        return self._do("find", key, effect)

    def _put(self, key: str, data: bytes) -> None:
        half = data[: len(data) // 2]
        self.objects.writers[key] = self.job
        self._do("put", key, lambda: self.objects.put(key, data), lambda: self.objects.put(key, half))

    def _flush(self, prefix: str) -> None:
        check_key(prefix)

    # -------------------------------------------------------------- what was decoded before

    def _open_array(self, key: str, entry: Mapping[str, Any]) -> Any:
        data = self.read(f"{key}/zarr.json")
        known = data, json.dumps(entry, sort_keys=True)
        if known not in _OPENED:
            self._given[f"{key}/zarr.json"] = data
            _OPENED[known] = super()._open_array(key, entry)
        return _OPENED[known]

    def _load_chunk(self, key: str, memory: dict, number: str, array: Any, rows: Any) -> Any:
        data = self.read(f"{key}/{number}")
        known = data, array.shape, array.dtype.name, number
        if known not in _DECODED:
            self._given[f"{key}/{number}"] = data
            _DECODED[known] = super()._load_chunk(key, memory, number, array, rows)
        return _DECODED[known].copy()

    # -------------------------------------------------------------- what happens to it

    def _listed(self, prefix: str, what: str) -> list[str]:
        """Return the keys under a prefix; of what comes or goes meanwhile it has some."""
        before = self.objects.under(prefix)
        if self.actor is None:
            return before
        self._step(f"goes on listing {what}")
        changed = set(before) ^ set(after := self.objects.under(prefix))
        keys = sorted(set(before) | set(after))
        return [key for key in keys if key not in changed or self.actor.schedule.random.random() < 0.5]

    def _step(self, what: str) -> None:
        if self.actor is not None:
            self.actor.step(what)

    def _do(self, name: str, key: str, effect: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Carry out an operation, with what the draw does to it."""
        if key:
            check_key(key)
        if self.actor is None:
            return effect()
        self.actor.step(f"{name} {key}")
        fault = self._draw(half is not None)
        if fault:
            self.actor.schedule.fired[f"{name}: {fault}"] += 1
            self.actor.schedule.trace.append(f"    {fault}")
        if fault == "crash in the middle":
            half()
        if fault in ("crash before", "crash in the middle"):
            self.actor.die()
        if fault == "fails":
            raise StorageError(f"{self._where(key)}: could not {name} it")
        found = effect()
        if fault == "twice":
            self.actor.step(f"{name} {key} again")
            found = effect()
        if fault == "crash after":
            self.actor.die()
        if fault == "answer lost":
            raise StorageError(f"{self._where(key)}: the answer was lost")
        return found

    def _draw(self, halves: bool) -> str | None:
        drawn = self.actor.schedule.random.random()
        for fault, probability in self.faults.items():
            drawn -= probability
            if drawn < 0:
                return None if fault == "crash in the middle" and not halves else fault
        return None
