"""Names that are safe as keys and as names of arrays."""

from __future__ import annotations

from collections.abc import Collection

from laplace_dist.errors import CheckpointError


def check_key(key: str) -> str:
    """Return the key if it is a plain relative path that cannot leave the checkpoint.

    Raises:
        CheckpointError: For an absolute path, an empty part, `.`, `..`, a backslash or a control character.
    """
    bad = any(part in ("", ".", "..") for part in key.split("/"))
    if bad or "\\" in key or not key.isprintable():
        raise CheckpointError(
            f"{key!r} is not a key inside the checkpoint: expected parts joined by single slashes, without '..', "
            "backslashes or control characters. If it comes from a manifest, that manifest was altered; delete it."
        )
    return key


def check_names(names: Collection[str]) -> None:
    """Check that factor names can all be arrays of one Zarr group.

    Raises:
        CheckpointError: For a name that is no safe path, is reserved by Zarr, or lies inside another one.
    """
    for name in names:
        for part in check_key(name).split("/"):
            if part.startswith("__") or part == "zarr.json" or not part.strip(".") or len(part.encode()) > 255:
                raise CheckpointError(f"factor name {name!r}: Zarr reserves the part {part!r}; rename the parameter")
    for first, second in zip(ordered := sorted(n + "/" for n in names), ordered[1:], strict=False):
        if second.startswith(first):
            raise CheckpointError(f"factor name {second[:-1]!r} lies inside the array {first[:-1]!r}; rename one")
