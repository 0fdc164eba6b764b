"""What the library does not get right yet, in the words of :mod:`tests.core.random_models`: mend it and take its line out.

A key is a feature or choice, or several that have to meet, joined by ``×``. Random models that hold all of a key are left
out of the suite; ``python benchmarks/random_models.py --not-yet`` runs them and says which lines can go. A key of ``CHECKS``
leaves out one check of all models. Rare ones have the first seed that shows them, since a few thousand models may not.
"""

from __future__ import annotations

NOT_YET: dict[str, str] = {}
CHECKS = frozenset({"warns of diagonal blocks"})


def missing(names: frozenset[str]) -> list[str]:
    """The keys of the table that a model of these names holds."""
    return [key for key in NOT_YET if key not in CHECKS and names.issuperset(key.split(" × "))]
