"""What a window was read from: of every partial the digest of its bytes and where it was computed, kept when partials go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from laplace_dist.plan.plan import Plan
from laplace_dist.plan.sketch import merged
from laplace_dist.run import partial_manifests

Manifest = Mapping[str, Any]


def readings(plan: Plan, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return what the manifest of a window's sum keeps of its partials.

    Args:
        plan: Of the window.
        manifests: Those of its partials, in plan order.

    Returns:
        `read`: `data_sha256` and, under `made`, the number of its environment among `environments`, of every partial;
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
    sketch = merged(manifest.get("examples") for manifest in partial_manifests.of_first_group(plan, manifests))
    read = {"environments": environments, "made": made, "data_sha256": digests}
    return {"read": read, "examples": None if sketch is None else sketch.to_values()}


def of_units(plan: Plan, window: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield, of every partial that the window's sum says it of, its id, and `data_sha256` and `environment`.

    Args:
        plan: Of the window.
        window: The manifest of its sum; one of before this was kept says nothing.
    """
    read = window.get("read")
    if read is not None:
        for unit, digest, number in zip(plan.units, read["data_sha256"], read["made"], strict=True):
            yield unit.id, {"data_sha256": digest, "environment": read["environments"][number]}
