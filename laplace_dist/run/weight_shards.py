"""The weights of a large model: shards of safetensors that are written and read one after the other, and their index.

Whoever writes or reads them needs the memory of the model and of a shard or two, and never another copy of the whole. A shard
is named by its content, so that two drivers cannot mix theirs; the index names the shards and commits them. It is an index as
`save_pretrained` writes them, so that `--weights` and other programs read it too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import safetensors.torch
from torch import Tensor, nn

from laplace_dist.errors import CheckpointError
from laplace_dist.plan.plan import FORMAT_VERSION
from laplace_dist.run import layout
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.weights import check_fit, parse_weights, weights_digest
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

SHARD_BYTES = 512 * 2**20  # of tensors in a shard, but for a larger one; a model of no more lies in one file


def is_large(model: nn.Module) -> bool:
    """Say whether a model's weights are stored as shards."""
    return sum(tensor.nbytes for tensor in model.state_dict().values()) > SHARD_BYTES


def shards(model: nn.Module) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yield `(key, content, names)` of every shard, one in memory at a time: tensors in the order of their names."""
    state = model.state_dict()
    for names in _groups(state):
        tensors = {name: state[name].detach().cpu().contiguous() for name in names}
        content = safetensors.torch.save(_apart(tensors))
        del tensors
        yield layout.weights_shard_key(hashlib.sha256(content).hexdigest()), content, names
        del content  # before the next one is made


def index_of(model: nn.Module) -> bytes:
    """Return the index, which takes one pass over the weights."""
    files, names = {}, {}
    for key, content, own in shards(model):
        files[key] = hashlib.sha256(content).hexdigest()
        names |= dict.fromkeys(own, key)
        del content
    values = {"format_version": FORMAT_VERSION, "weight_map": names, "files": files, "model": weights_digest(model)}
    return seal_json({**values, "metadata": {"total_size": sum(t.nbytes for t in model.state_dict().values())}})


def check_shards(store: Store, digest: str) -> None:
    """Read all shards and compare them with the index, without the model.

    Args:
        store: The checkpoint.
        digest: `weights_digest` of the model, as the plan has it.

    Raises:
        CheckpointError: One is missing, truncated or altered, or the index is of another model.
    """
    if _read_index(store)["model"] != digest:
        raise CheckpointError(
            f"{layout.WEIGHTS_INDEX} holds the weights of another model than the plan's. Restore it from a copy."
        )
    for _ in _tensors(store):
        pass


def load_shards_of_run(store: Store, model: nn.Module) -> None:
    """Load the shards of a run into a model that they must fit exactly, one after the other.

    Raises:
        CheckpointError: One is missing, truncated or altered.
        SettingsError: They do not fit the model.
    """
    label = f"{store.url}/{layout.WEIGHTS_INDEX}"
    names = _read_index(store)["weight_map"]
    check_fit(model, label, names, {})
    for state in _tensors(store):
        check_fit(model, label, names, state)
        model.load_state_dict(state, strict=False)
        del state  # before the next one is read


def _read_index(store: Store) -> dict:
    return open_json(store.read(layout.WEIGHTS_INDEX), layout.WEIGHTS_INDEX)


def _tensors(store: Store) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of every shard, one in memory at a time, after its digest was compared."""
    index = _read_index(store)
    for key, sha256 in index["files"].items():
        content = store.read(key)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CheckpointError(f"{key} is truncated or altered: it does not have the sha256 in {layout.WEIGHTS_INDEX}. "
                                  f"{layout.remedy(key)}")  # fmt: skip
        state = parse_weights(content, key, CheckpointError)
        del content
        yield state
        del state


def _groups(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """Yield names of tensors that make a shard, in the order of their names."""
    group: list[str] = []
    held = 0
    for name in sorted(state):
        if group and held + state[name].nbytes > SHARD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += state[name].nbytes
    if group:
        yield group


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with copies in place of those that share memory with another one, which safetensors refuses."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        found[name] = tensor if whole and place not in seen else tensor.clone()
        seen.add(place)
    return found
