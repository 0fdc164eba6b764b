"""What a window was read from: of every segment the digest of its bytes and where it was computed, kept when partials go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from laplace_dist.plan.plan import Plan
from laplace_dist.plan.sketch import merged

Manifest = Mapping[str, Any]


def readings(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return what the manifest of a window's sum keeps of its partials, given their manifests in plan order.

    Returns:
        `read`: `data_sha256` and, under `made`, the number of its environment among `environments`, of every segment;
        `examples`: the `plan.sketch.Sketch` of the window's examples, or None.
    """
    environments: list[Any] = []
    made = []
    for manifest in manifests:
        own = manifest.get("environment")
        if own not in environments:
            environments.append(own)
        made.append(environments.index(own))
    digests = [manifest.get("data_sha256") for manifest in manifests]
    sketch = merged(manifest.get("examples") for manifest in manifests)
    read = {"environments": environments, "made": made, "data_sha256": digests}
    return {"read": read, "examples": None if sketch is None else sketch.to_values()}


def of_segments(plan: Plan, window: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield, of every segment that the window's sum says it of, its id, and `data_sha256` and `environment`.

    Args:
        plan: Of the window.
        window: The manifest of its sum; one of before this was kept says nothing.
    """
    read = window.get("read")
    if read is not None:
        for segment, digest, number in zip(plan.segments, read["data_sha256"], read["made"], strict=True):
            yield segment.id, {"data_sha256": digest, "environment": read["environments"][number]}
