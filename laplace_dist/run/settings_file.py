"""The snapshot of a run's settings: YAML with its own sha256 in a comment at its end."""

from __future__ import annotations

import hashlib
from typing import Any

from laplace_dist.config.plain_yaml import parse_yaml
from laplace_dist.config.settings import Config
from laplace_dist.errors import CheckpointError
from laplace_dist.run.layout import CONFIG
from laplace_dist.storage.store import Store

_SEAL = "# sha256 of the above: "


def seal_yaml(text: str) -> bytes:
    """Return YAML with its own sha256 in a comment at the end."""
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def is_sealed_yaml(content: bytes) -> bool:
    """Say whether these are bytes that `seal_yaml` has returned."""
    text, mark, _ = content.decode(errors="replace").rpartition(_SEAL)
    return bool(mark) and seal_yaml(text) == content


def data_of(config: Config, store: Store) -> Config:
    """Return settings with the data that the settings of a window name.

    Args:
        config: The settings.
        store: Of the window, which is not the first.

    Raises:
        MissingObjectError: There are no settings of the window.
        CheckpointError: They were truncated or altered.
    """
    kept = read_config(store)
    own = {"data": kept["data"], "data_args": kept["data-args"], "example_weights": kept.get("example-weights")}
    return config.model_copy(update=own)


def read_config(store: Store) -> dict[str, Any]:
    """Return the settings that the run, or a window after the first, keeps, by the names of the flags.

    Raises:
        MissingObjectError: They are not there.
        CheckpointError: They were truncated or altered.
    """
    content = store.read(CONFIG)
    remedy = "Run the job again that wrote it: it writes it anew."
    if not is_sealed_yaml(content):
        raise CheckpointError(f"{CONFIG} is truncated or altered: its content does not have the sha256 in it. {remedy}")
    try:
        values = parse_yaml(content.decode())
    except ValueError as error:
        raise CheckpointError(f"{CONFIG} was altered: it {error}. {remedy}") from None
    names = {field.replace("_", "-") for field in Config.model_fields}
    if not isinstance(values, dict) or not values.keys() <= names:
        raise CheckpointError(f"{CONFIG} was altered: it does not hold the settings of a run. {remedy}")
    return values
