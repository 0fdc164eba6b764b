"""The run's own weights, which every process computes with: one file, or of a large model shards and their index."""

from __future__ import annotations

from torch import nn

from laplace.data.calling import adapted
from laplace_dist.config.settings import Config
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run.layout import PLAN, WEIGHTS, WEIGHTS_INDEX
from laplace_dist.run.ownership import confirm
from laplace_dist.run.weight_shards import check_shards, index_of, is_large, load_shards_of_run, shards
from laplace_dist.run.weights import build_model, check_weights, dump_weights, load_weights, weights_digest
from laplace_dist.storage.store import Store


class RunWeights:
    """What is stored of a model's weights.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def key(self) -> str:
        """Key of the object that commits them."""
        return WEIGHTS_INDEX if is_large(self._model) else WEIGHTS

    def refuse_others(self, store: Store) -> None:
        """Refuse weights of another model where there is no run: a job of a deleted run may have left them, or a person.

        Raises:
            SettingsError: They are there.
        """
        for key in (WEIGHTS, WEIGHTS_INDEX):
            if store.exists(key) and (key != self.key or store.read(key) != self._content()):
                raise SettingsError(
                    f"--checkpoint {store.url!r}: holds no run (no {PLAN}), but the {key} of another one. Nothing was changed. "
                    "Delete them, or give a new or empty place."
                )

    def write(self, store: Store, plan: Plan) -> None:
        """Store them; those that a job has put there whose run was deleted at that very moment make way."""
        confirm(store, plan)
        if self.key == WEIGHTS_INDEX:
            for key, content, _ in shards(self._model):
                store.create(key, content)  # named by its content: one that is there is the same
                del content
        content = self._content()
        if not store.create(self.key, content) and store.read(self.key) != content:
            confirm(store, plan)
            store.replace(self.key, content)

    def _content(self) -> bytes:
        return index_of(self._model) if self.key == WEIGHTS_INDEX else dump_weights(self._model)


def are_there(store: Store) -> bool:
    """Say whether a run has its weights."""
    return store.exists(WEIGHTS) or store.exists(WEIGHTS_INDEX)


def check_run_weights(store: Store, digest: str, key: str) -> None:
    """Check a run's weights without the model, as `weights.check_weights` does; `key` is of the object that commits them."""
    if key == WEIGHTS:
        check_weights(store.read(WEIGHTS), digest, WEIGHTS)
    else:
        check_shards(store, digest)


def load_run_model(config: Config, store: Store, plan: Plan) -> nn.Module:
    """Build the run's model with the run's own weights, in eval mode; errors as of `load_model` and `load_run_weights`."""
    model = adapted(build_model(config).eval(), config.dict_key_y)
    load_run_weights(store, plan, model)
    return model


def load_run_weights(store: Store, plan: Plan, model: nn.Module) -> None:
    """Load the run's own weights into a model and check that they are those of the plan.

    Raises:
        CheckpointError: They are missing, truncated or altered.
        SettingsError: They do not fit the model.
    """
    key = WEIGHTS
    try:
        content = store.read(WEIGHTS)
    except MissingObjectError:
        if not store.exists(WEIGHTS_INDEX):
            raise
        key = WEIGHTS_INDEX
        load_shards_of_run(store, model)
    else:
        load_weights(model, content, f"{store.url}/{WEIGHTS}", broken=CheckpointError)
        del content
    if weights_digest(model) != plan.weights:
        raise CheckpointError(
            f"{store.url}/{key} does not hold the weights of the plan: it was altered, or the model is of another "
            "precision than --model builds, or has buffers that change from call to call. Restore it from a copy, or start "
            "again with --fresh."
        )
