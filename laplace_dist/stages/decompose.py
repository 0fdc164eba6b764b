"""Decompose: the eigendecompositions of a posterior version's large factors, each made once and committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laplace.structures.decomposition import decompose
from laplace.structures.specification import SumsSpec
from laplace_dist.plan.plan import Plan
from laplace_dist.run import decompositions
from laplace_dist.run.provenance import environment
from laplace_dist.run.versions import read_factor, read_version
from laplace_dist.stages.context import Context


@dataclass(frozen=True)
class Decompose:
    """Eigendecompose some factors of a posterior version and commit each of them under a manifest of its own.

    Attributes:
        plan: Digest of the plan.
        version: Name of the posterior version.
        names: Of the factors.
    """

    plan: str
    version: str
    names: tuple[str, ...]

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"eigendecomposition of {self.names[0]}" + (", …" if len(self.names) > 1 else "")

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        store, plan = context.store, context.plan
        spec, manifest = SumsSpec.from_json(plan.posterior_spec), read_version(store, plan, self.version)
        for name in self.names:
            value = read_factor(store, manifest, name).to(context.device)
            pair = decompose(spec, name, value, manifest["n_data"])
            decompositions.commit_decomposition(store, plan, self.version, name, pair, environment(context.device))
        return {}


def tasks(plan: Plan, version: str, names: Sequence[str]) -> list[Decompose]:
    """Return tasks for some factors, the widest first: a wide one alone, narrow ones together."""
    widths = {name: plan.posterior_spec["factors"][name]["shape"][0] for name in names}
    groups: list[list[str]] = []
    held = decompositions.WORTH
    for name in sorted(names, key=lambda name: -widths[name]):
        if held + widths[name] ** 3 > decompositions.WORTH:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += widths[name] ** 3
    return [Decompose(plan.digest, version, tuple(group)) for group in groups]
