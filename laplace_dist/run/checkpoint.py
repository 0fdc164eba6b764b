"""The store of one run: what it says of a bad object comes from the layout, and its JSON objects are sealed and checked."""

from __future__ import annotations

from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.errors import CheckpointError
from laplace_dist.run import layout
from laplace_dist.storage.sealed_json import unseal_json
from laplace_dist.storage.store import Store


class Checkpoint(Store):
    """Everything under one checkpoint URL."""

    def remedy(self, key: str) -> str:
        """Say what to do about a bad object."""
        return layout.remedy(key)

    def under(self, prefix: str) -> Checkpoint:
        """Return the store of what lies under a prefix, laid out like a checkpoint of its own."""
        return Checkpoint(f"{self.url.rstrip('/')}/{prefix}", self._options)


def open_store(config: Config) -> Checkpoint:
    """Open the checkpoint that the settings name."""
    return Checkpoint(config.checkpoint, config.storage_options)


def open_json(data: bytes, key: str) -> dict[str, Any]:
    """Read a sealed JSON object of the layout, without its digest.

    Raises:
        SettingsError: A newer version wrote it.
        CheckpointError: It was truncated or altered, or has not the fields of its kind; the message names `key`.
    """
    values = unseal_json(data, key, layout.remedy(key))
    if wrong := layout.problem(key, values):
        raise CheckpointError(f"{key} is altered or of another version: {wrong}. {layout.remedy(key)}")
    return values
