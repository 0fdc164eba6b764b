"""Digests of values: different values give different input to the hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def feed(digest: Any, value: Any) -> None:
    """Add a value to a digest so that different values give different input.

    Args:
        digest: A hash of `hashlib`, updated in place.
        value: Tensors, arrays, numbers, strings, bytes, None, and mappings and sequences of them.

    Raises:
        TypeError: It holds anything else; the message is the type's name.
    """
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        digest.update(f"array {value.dtype} {list(value.shape)} ".encode() + value.tobytes())
    elif isinstance(value, bool | int | float | str | bytes | None):
        content = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(f"{type(value).__name__} {len(content)} ".encode() + content)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)} ".encode())
        for key in sorted(value):
            feed(digest, key)
            feed(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)} ".encode())
        for item in value:
            feed(digest, item)
    else:
        raise TypeError(f"a {type(value).__module__}.{type(value).__name__}")


def canonical(values: Any) -> bytes:
    """Return the one JSON text of plain values that digests are taken of."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(values: Mapping[str, Any]) -> str:
    """Return a short name for settings: results under it were made with exactly these."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]
