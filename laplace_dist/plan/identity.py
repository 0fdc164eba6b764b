"""What tells that a data set is the one of the plan: its length and a digest of examples."""

from __future__ import annotations

import hashlib
from typing import Any

from laplace_dist.data.loader import read_example
from laplace_dist.errors import SettingsError
from laplace_dist.plan.digests import feed

_SAMPLE = 64


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Return `length`, and `sha256` over the length and up to 64 evenly spaced examples, first and last included.

    Raises:
        SettingsError: An example differs from one reading to the next, or holds something other than tensors, arrays,
            numbers, strings and containers of these.
        ExampleError: An example cannot be read.
    """
    length = len(dataset)
    count = min(length, _SAMPLE)
    digest = hashlib.sha256(str(length).encode())
    for index in sorted({i * (length - 1) // max(count - 1, 1) for i in range(count)}):
        digest.update(_example_digest(dataset, index))
    if _example_digest(dataset, 0) != _example_digest(dataset, 0):
        raise SettingsError(
            "--data: example 0 of a split differs between two readings; switch random augmentation off, "
            "since a run that is resumed must meet the same examples"
        )
    return {"length": length, "sha256": digest.hexdigest()}


def _example_digest(dataset: Any, index: int) -> bytes:
    digest = hashlib.sha256()
    try:
        feed(digest, read_example(dataset, index))
    except TypeError as error:
        raise SettingsError(f"--data: example {index} holds {error}; expected tensors, arrays or numbers") from error
    return digest.digest()
