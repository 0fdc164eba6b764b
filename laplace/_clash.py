"""laplace-torch installs a package of the same import name; say so at once instead of failing somewhere else.

Imported before everything else in the package, as files of the two may be mixed; and by modules that the other does not have,
such as ``laplace.errors`` and ``laplace.tuning``. Where it was installed later, the package's own ``__init__`` is the other's:
then ``import laplace`` is laplace-torch, and the first of these modules says so, as ``laplace_dist`` does by importing them.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

_OTHER = "laplace-torch"


def check() -> None:
    """Look whether the other distribution is installed, and where.

    Raises:
        ImportError: If it lives in the same folder, so that one has overwritten files of the other.

    Warns:
        UserWarning: If it lives elsewhere: this package comes first on the path for now.
    """
    try:
        other = metadata.distribution(_OTHER)
    except metadata.PackageNotFoundError:
        return
    here, there = Path(__file__).resolve().parent, Path(str(other.locate_file("laplace"))).resolve()
    if here == there:
        raise ImportError(
            f"laplace-dist and {_OTHER} {other.version} are both installed in {here}: they share the import name 'laplace', so "
            f"each has overwritten files of the other. Run: pip uninstall {_OTHER} && pip install --force-reinstall "
            "--no-deps laplace-dist. To compare the two, give each an environment of its own."
        )
    warnings.warn(
        f"{_OTHER} {other.version} is installed in {there.parent} and shares the import name 'laplace' with laplace-dist. "
        f"This is laplace-dist, in {here}, because it comes first on the path. Run: pip uninstall {_OTHER}",
        stacklevel=2,
    )


check()
