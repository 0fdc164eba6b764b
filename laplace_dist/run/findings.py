"""What a verification finds, and how it goes on after an object that is bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laplace_dist.errors import CheckpointError, ForeignError, SettingsError, StorageError
from laplace_dist.run import layout
from laplace_dist.storage.store import Store


@dataclass
class Findings:
    """What was found of some objects.

    Attributes:
        problems: `(key, what is wrong and what to do)` for every bad object.
        notes: `(key, what is still to do)` where a run ended before a step that the same command takes.
        environments: How many partials, tunings and evaluations were made with which versions, device and flags.
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    environments: Counter[str] = field(default_factory=Counter)

    def add(self, other: Findings) -> None:
        """Append what was found of other objects."""
        self.problems += other.problems
        self.notes += other.notes
        self.environments += other.environments

    def problem(self, key: str, text: str) -> None:
        """Write down that an object is bad."""
        self.problems.append((key, text))

    def came_from(self, manifest: Mapping[str, Any]) -> None:
        """Count the environment that a committed object was made in, whichever node of its kind it was."""
        made = manifest.get("environment") or {"version": "0.1, which recorded none"}
        kind = ", ".join(f"{name} {value}" for name, value in sorted(made.items()) if name not in ("node", "precision"))
        flags = [f"{name}={value}" for name, value in sorted(made.get("precision", {}).items()) if value != ""]
        self.environments["; ".join([kind, *flags])] += 1


class Checker:
    """Checks objects of a run: what is bad is written down and the rest is still checked.

    Args:
        store: The checkpoint.
        found: Where it is written down.
        keys: The objects that were listed; none where nobody listed them.
        shallow: Look that arrays are there, without reading them.

    Attributes:
        foreign: Manifests of other runs.
    """

    def __init__(self, store: Store, found: Findings, keys: Collection[str] = (), *, shallow: bool = False) -> None:
        self.store, self.found, self.keys, self.shallow = store, found, frozenset(keys), shallow
        self.foreign: set[str] = set()

    def attempt(self, key: str, call: Callable[[], Any]) -> Any:
        """Return what a call returns, or None after noting that the object with this key is bad."""
        try:
            return call()
        except StorageError:
            raise
        except ForeignError as error:
            self.foreign.add(key)
            self.found.notes.append(
                (key, f"{error} A job that is deleted while it is at work (--fresh) may leave that.")
            )
        except CheckpointError as error:
            self.found.problem(key, str(error))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, SettingsError):
                raise
            self.found.problem(key, f"{key} is altered: it has not the fields of its kind ({error!r})")
        return None

    def missing(self, key: str) -> bool:
        """Say whether an object is neither among those listed first nor there now, as a job beside this may write it."""
        return key not in self.keys and not self.store.exists(key)

    def array(self, prefix: str, name: str, entry: Mapping[str, Any]) -> np.ndarray | None:
        """Check an array that a manifest names and return it; a shallow verification only looks that it is there."""
        self.groups(prefix, [name])
        key = f"{prefix}/{name}"
        if not self.shallow:
            return self.attempt(key, lambda: self.store.read_array(prefix, name, entry))
        wanted = [[f"{key}/zarr.json"], [] if 0 in entry["shape"] else list(_first_chunk(key))]
        if any(names and all(self.missing(name) for name in names) for names in wanted):
            self.found.problem(key, f"{key} is missing. {layout.remedy(key)}")
        return None

    def groups(self, prefix: str, names: Collection[str]) -> None:
        """Check the metadata of the Zarr groups that hold arrays; reading the arrays alone does not need it."""
        for key in () if self.shallow else self.store.group_keys(prefix, names):
            self.attempt(key, lambda k=key: self.store.check_group(k))


def _first_chunk(key: str) -> Iterator[str]:
    """Yield what the first chunk of an array may be called, by its number of dimensions."""
    yield f"{key}/c"
    yield from ("/".join([f"{key}/c", *["0"] * n]) for n in range(1, 8))
