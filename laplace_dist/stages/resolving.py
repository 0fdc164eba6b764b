"""Resolving: model, data, estimator and factors are found out once, by the driver, before a run is begun or continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from laplace_dist.config.compatibility import no_groups
from laplace_dist.config.settings import Config
from laplace_dist.data import example_weights, sources
from laplace_dist.data.collate import Collate
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan import identity
from laplace_dist.plan.groups import plan_groups
from laplace_dist.plan.worker_memory import groups_for, too_large
from laplace_dist.run import weights
from laplace_dist.stages import estimator, first_batch
from laplace_dist.stages.context import initialized, plain


@dataclass(frozen=True)
class Resolved:
    """What the settings name.

    Attributes:
        model: With its weights, in eval mode.
        train: The training split.
        la: The Laplace object, which knows the factors.
        data: Fingerprint of the training split.
        config: The settings, with the estimator that the run uses.
        cost: Which estimator that is, and what it costs, for people.
    """

    model: nn.Module
    train: Any
    la: Any
    data: dict[str, Any]
    config: Config
    cost: str

    @property
    def model_bytes(self) -> int:
        """What the model's parameters and buffers take."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))


def resolve(config: Config, stored: Mapping[str, Any] | None = None) -> Resolved:
    """Load model and data, look at the first batches, choose the estimator, and find out which factors there are.

    Args:
        config: The settings.
        stored: Those of the plan of the run that goes on, whose estimator is kept if none is given.

    Raises:
        SettingsError: Model, data and settings do not go together, or an example cannot be read.
    """
    config = estimator.given(config, stored)
    train = sources.load_split(config, "train")
    others = sources.check_splits(config)
    model = weights.load_model(config)
    f = first_batch.check(config, model, {"train": train, **others})["train"]
    if config.outputs is not None and config.outputs[-1] >= f.shape[-1]:
        last = f.shape[-1] - 1
        raise SettingsError(
            f"--outputs: got {config.outputs}, but the model has {last + 1} outputs, the last one being {last}"
        )
    try:
        chosen, la = _chosen(config, model, train, f)
    except (ValueError, ImportError, ExampleError) as error:
        raise error if isinstance(error, SettingsError) else SettingsError(str(error)) from error
    cost = estimator.cost(chosen, la, f, chosen=config.estimator is not None)
    return Resolved(model, train, la, fingerprint(config, train, "train"), chosen, cost)


def _chosen(config: Config, model: nn.Module, train: Any, f: Tensor) -> tuple[Config, Any]:
    """Return the settings with an estimator, and the Laplace object for it."""
    first = config if config.estimator is not None else config.model_copy(update={"estimator": "ggn"})
    la = initialized(first.model_dump(), model, train, Collate.of(config))
    if config.estimator is not None or (name := estimator.default(la, f)) == "ggn":
        return first, la
    chosen = config.model_copy(update={"estimator": name, "mc_samples": 1})
    return chosen, initialized(chosen.model_dump(), model, train, Collate.of(config))


def module_groups(
    config: Config, resolved: Resolved, memory: int | None, say: Callable[[str], None] = lambda text: None
) -> int:
    """Return the number of module groups of a run that is to be begun.

    Args:
        config: The settings.
        resolved: What they name.
        memory: Bytes that a worker can have; None where that is not known.
        say: Where a line for people goes.

    Raises:
        SettingsError: No worker has the memory for the sums.
    """
    spec = plain(resolved.la.sums_spec())
    size = resolved.model_bytes
    able = no_groups(config) is None
    count = config.module_groups or (groups_for(spec, size, memory) if able else 1)
    groups = plan_groups(spec, count)
    if why := too_large(spec, size, memory, len(groups)):
        raise SettingsError(f"--hessian-structure: got {config.hessian_structure!r}, but {why}")
    if len(groups) > 1:
        largest = max(group.nbytes for group in groups)
        say(
            f"module groups: {len(groups)}, so as many passes over the data; a worker holds at most {largest:,} bytes of sums "
            "at a time"
        )
    return len(groups)


def fingerprint(config: Config, dataset: Any, split: str) -> dict[str, Any]:
    """Return a split's fingerprint, of the training split with what its weights are told by, if there are any.

    Raises:
        SettingsError: An example cannot be read, or its weight is none; naming the example.
    """
    name = config.example_weights
    try:
        found = identity.fingerprint(dataset, split, Collate.of(config))
        weighted = name is not None and split == "train"
        return {**found, "weights": example_weights.facts(dataset, name)} if weighted else found
    except ExampleError as error:
        raise SettingsError(str(error)) from error
