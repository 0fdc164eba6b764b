"""The arguments of the public entry points, which Python itself does not check."""

from __future__ import annotations

from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.config.training import Training
from laplace_dist.errors import SettingsError


def check_given(config: Any, executor: Any = None, settings: Any = None) -> None:
    """Refuse arguments of another kind than an entry point takes.

    Args:
        config: A `Config`.
        executor: What makes an executor of settings, such as the class `Inline`; or None.
        settings: A `Training`, or None.

    Raises:
        SettingsError: One of them is none.
    """
    if not isinstance(config, Config):
        raise SettingsError(
            f"config: got {_shown(config)}; give a laplace_dist.Config, such as Config(model=…, data=…)"
        )
    if settings is not None and not isinstance(settings, Training):
        raise SettingsError(
            f"settings: got {_shown(settings)}; give a laplace_dist.Training, such as Training(n_epochs=…)"
        )
    if executor is not None and not callable(executor):
        raise SettingsError(
            f"executor: got {_shown(executor)}; give the class itself, executor=laplace_dist.Inline, which the job makes one "
            "of, or leave it out and say where by Config(ray_address=…)"
        )


def _shown(value: Any) -> str:
    """Return a value for a message: by its kind alone where it may be long, or hold secrets."""
    return repr(value) if isinstance(value, str) and len(value) < 80 else f"a {type(value).__name__}"
