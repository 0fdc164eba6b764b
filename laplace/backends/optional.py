"""Optional packages: imported where a backend needs them, with an error that says how to mend a missing or broken one."""

from __future__ import annotations

import importlib
from types import ModuleType

# What a package built for other versions of its dependencies raises while it is imported. torchvision beside a torch of
# another family of build raises RuntimeError, extensions built for another numpy ValueError, missing symbols OSError.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)


def import_optional(module: str, distribution: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Name of the module, such as ``'backpack'``.
        distribution: What to install, such as ``'backpack-for-pytorch'``.
        extra: Extra of this project that installs it.

    Raises:
        ImportError: If it is missing or broken; says what to install or how to mend it.
    """
    try:
        return importlib.import_module(module)
    except _BROKEN as error:
        advice = f"pip install 'laplace-dist[{extra}]'"
        if not (isinstance(error, ModuleNotFoundError) and error.name == module):
            advice = f"It is installed, but broken; reinstall it with what it depends on: {advice} --force-reinstall"
        if "torchvision" in str(error):
            advice = (
                "torchvision does not belong to this torch: install torch and torchvision together, from one index "
                "(both CPU builds, or both for the same CUDA)"
            )
        raise ImportError(
            f"The {extra} backend needs the package {distribution}. {advice}. All other backends work without it. "
            f"The import of {module!r} failed with {type(error).__name__}: {error}"
        ) from error
