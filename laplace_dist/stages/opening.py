"""Opening: model, data and factors are resolved once, by the driver, and the run is begun or continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from laplace_dist.config.settings import Config
from laplace_dist.data import loader, sources
from laplace_dist.data.collate import Collate
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan import identity
from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.run import layout, lifecycle, weights
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.probe import make_probe
from laplace_dist.stages import first_batch
from laplace_dist.stages.context import initialized, plain
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Resolved:
    """What the settings name.

    Attributes:
        model: With its weights, in eval mode.
        train: The training split.
        la: The Laplace object, which knows the factors.
        data: Fingerprint of the training split.
    """

    model: nn.Module
    train: Any
    la: Any
    data: dict[str, Any]


def resolve(config: Config) -> Resolved:
    """Load model and data, look at the first batches, and find out which factors there are.

    Raises:
        SettingsError: Model, data and settings do not go together, or an example cannot be read.
    """
    train = sources.load_split(config, "train")
    others = sources.check_splits(config)
    model = weights.load_model(config)
    first_batch.check(config, model, {"train": train, **others})
    try:
        la = initialized(config.model_dump(), model, train, Collate.of(config))
    except (ValueError, ImportError, ExampleError) as error:
        raise error if isinstance(error, SettingsError) else SettingsError(str(error)) from error
    return Resolved(model, train, la, fingerprint(config, train, "train"))


def begin(
    resolved: Resolved, config: Config, store: Store, device_type: str, say: Callable[[str], None]
) -> tuple[Plan, bool]:
    """Begin the run, or continue the one that is there; returns its plan and whether it was there.

    Args:
        resolved: What the settings name.
        config: The settings.
        store: The checkpoint.
        device_type: Where the workers compute, `cpu` or `cuda`.
        say: Where lines for people go.

    Raises:
        SettingsError: What is there is of another plan.
        CheckpointError: What is there is damaged.
    """
    model = resolved.model
    wanted = build_plan(
        config.bits(device_type=device_type),
        data=resolved.data,
        weights=weights.weights_digest(model),
        model={"path": config.model, "args": config.model_args},
        spec=plain(resolved.la.sums_spec()),
        run=new_attempt(),
    )
    snapshot = config.model_copy(update={"weights": f"{store.url}/{layout.WEIGHTS}"}).to_yaml()
    return lifecycle.open_run(
        store,
        wanted,
        model=model,
        weights=lambda: weights.dump_weights(model),
        probe=lambda: _probe(resolved, config, say),
        config_yaml=snapshot,
        fresh=config.fresh,
        say=say,
    )


def check_again(config: Config, store: Store, plan: Plan, splits: Mapping[str, Any]) -> None:
    """Look at the first example of the splits of a follow-on job, with the run's own model, before anything starts.

    Raises:
        SettingsError: The model is not the run's, or does not suit the data.
        CheckpointError: The run's weights are damaged.
    """
    model = weights.load_model(config.model_copy(update={"weights": None}))
    weights.load_run_weights(store, plan, model)
    lifecycle.check_model(store, plan, model, "what --model builds here")
    first_batch.check(config, model, splits)


def fingerprint(config: Config, dataset: Any, split: str) -> dict[str, Any]:
    """Return a split's fingerprint; an example that this process cannot read is refused as a setting is.

    Raises:
        SettingsError: Naming the example.
    """
    try:
        return identity.fingerprint(dataset, split, Collate.of(config))
    except ExampleError as error:
        raise SettingsError(str(error)) from error


def _probe(resolved: Resolved, config: Config, say: Callable[[str], None]) -> bytes | None:
    def batch(count: int) -> Any:
        return loader.read_batch(resolved.train, 0, count, Collate.of(config))[0]

    try:
        return make_probe(resolved.model, batch, len(resolved.train))
    except TypeError as error:
        say(
            f"the inputs hold {error}, which cannot be stored with the run: whether --model's code is still the same "
            "will not be checked, only its weights and the data"
        )
        return None
