"""Which group each example of a split belongs to, where the data say so: what a report shows apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from laplace_dist.errors import SettingsError

MOST = 200  # groups of one split: a report shows one line for each


def groups_of(dataset: Any, split: str) -> tuple[str, ...]:
    """Return the group of every example of a split, by its attribute `group`; nothing where it has none.

    Args:
        dataset: Map-style. Its attribute `group` is a sequence, an array or a tensor with a name or number for each example.
        split: Its name, for messages.

    Raises:
        SettingsError: There is not one for each example, or there are more than `MOST` different ones.
    """
    given = getattr(dataset, "group", None)
    if given is None or callable(given):
        return ()
    values = given.tolist() if hasattr(given, "tolist") else list(given)
    if len(values) != len(dataset) or any(
        isinstance(value, Sequence) and not isinstance(value, str) for value in values
    ):
        raise SettingsError(
            f"--data: the attribute 'group' of the split {split!r} has {len(values)} entries for {len(dataset)} examples; "
            "expected one name or number for each"
        )
    names = tuple(str(value) for value in values)
    if (count := len(set(names))) > MOST:
        raise SettingsError(
            f"--data: the attribute 'group' of the split {split!r} names {count} different groups; expected at most {MOST}, "
            "since a report shows each of them"
        )
    return names


def digest_of(groups: Sequence[str]) -> str:
    """Return a digest of the groups of a split."""
    return hashlib.sha256(json.dumps(list(groups)).encode()).hexdigest()[:16]
