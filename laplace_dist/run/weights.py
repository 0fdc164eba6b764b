"""A model's weights as bytes and back: safetensors that carry their own digest, and state dicts without pickled code."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pickle import UnpicklingError

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from laplace.data.calling import adapted
from laplace_dist.config.import_path import call
from laplace_dist.config.settings import HF, Config
from laplace_dist.data.sources import hint, read_file, weights_options
from laplace_dist.data.weight_files import Shards, shards_of
from laplace_dist.errors import CheckpointError, SettingsError, listed
from laplace_dist.plan.digests import feed
from laplace_dist.run.pretrained import build_pretrained


def dump_weights(model: nn.Module) -> bytes:
    """Return the model's state dict as a safetensors file; tied tensors are stored under each of their names.

    Its metadata holds a sha256 of the tensors and the model's digest, which also covers what no state dict holds, so
    that the file can be checked without the model: see `check_weights`.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    seal = {"tensors_sha256": _digest(state.items()), "model_digest": weights_digest(model)}
    return safetensors.torch.save(state, metadata={"seal": json.dumps(seal)})


def check_weights(content: bytes, digest: str, label: str) -> None:
    """Check what `dump_weights` returned, without the model.

    Args:
        content: The file's bytes.
        digest: `weights_digest` of the model, as the plan has it.
        label: What to call the file in messages.

    Raises:
        CheckpointError: It is truncated, altered, or of another model.
    """
    state = parse_weights(content, label, CheckpointError)
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        seal = json.loads(header["__metadata__"]["seal"])
        tensors, model = seal["tensors_sha256"], seal["model_digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{label} is altered: it carries no digest. Restore it from a copy.") from error
    if tensors != _digest(state.items()):
        raise CheckpointError(f"{label} is altered: its tensors do not have the sha256 in it. Restore it from a copy.")
    if model != digest:
        raise CheckpointError(f"{label} holds the weights of another model than the plan's. Restore it from a copy.")


def is_sealed(content: bytes) -> bool:
    """Say whether these are bytes that `dump_weights` has returned, by their form alone."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return header["__metadata__"]["seal"] is not None
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def load_weights(model: nn.Module, content: bytes, label: str, broken: type[Exception] = SettingsError) -> None:
    """Load a state dict, safetensors or torch.save's format (tensors only), into a model that it must fit exactly.

    Args:
        model: Changed in place.
        content: The file's bytes.
        label: What to call the file in messages.
        broken: Class of the error for a file that is not a state dict.

    Raises:
        SettingsError: Names are missing or unexpected, or shapes differ; the message lists them.
    """
    state = parse_weights(content, label, broken)
    check_fit(model, label, state, state)
    model.load_state_dict(state, strict=False)


def load_shards(model: nn.Module, shards: Shards, label: str) -> None:
    """Load shards into a model that they must fit exactly, one after the other.

    Args:
        model: Changed in place.
        shards: Where they are; what an index names is compared with the model before any of them is read.
        label: What to call them in messages.

    Raises:
        SettingsError: One cannot be read or is damaged; names are missing or unexpected, or shapes differ.
    """
    listed_names = [name for names in shards.names.values() for name in names or ()]
    if listed_names:
        check_fit(model, label, listed_names, {})
    for place, state in shards.tensors():
        check_fit(model, place, listed_names or state, state)
        model.load_state_dict(state, strict=False)
        del state  # before the next one is read


def check_fit(model: nn.Module, label: str, names: Collection[str], state: Mapping[str, Tensor]) -> None:
    """Refuse names that are not the model's, of whose tied tensors one is enough, and tensors of other shapes than its own."""
    wanted, names = model.state_dict(), set(names)
    there = {_place(wanted[name]) for name in names & wanted.keys()}
    wrong = {
        "missing": sorted(
            name for name in wanted.keys() - names if not wanted[name].numel() or _place(wanted[name]) not in there
        ),
        "unexpected": sorted(names - wanted.keys()),
        "of another shape": [
            f"{name} {list(value.shape)} in the file, {list(wanted[name].shape)} in the model"
            for name, value in state.items()
            if name in wanted and value.shape != wanted[name].shape
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
        raise SettingsError(f"{label}: these weights do not fit the model. {found}{_of_a_wrapper(names, wanted)}")


def _of_a_wrapper(names: Collection[str], wanted: Collection[str]) -> str:
    """Say so where the names are the model's but for what a wrapper puts before them."""
    for prefix, wrapper in (("module.", "DataParallel"), ("_orig_mod.", "torch.compile")):
        if names and {name.removeprefix(prefix) for name in names if name.startswith(prefix)} >= set(wanted):
            return f". They are those of a model in {wrapper}: take {prefix!r} off every name"
    return ""


def _place(tensor: Tensor) -> tuple:
    """Return where a tensor lies, which tied ones have in common."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def parse_weights(content: bytes, label: str, broken: type[Exception]) -> dict[str, Tensor]:
    """Return the tensors of a state dict, safetensors or torch.save's format; `broken` is the error for what is none."""
    try:
        if content[8:9] == b"{":
            return safetensors.torch.load(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        # What torch says of a pickle is advice to run its code; nothing else of it is a user's business.
        said = "" if isinstance(error, UnpicklingError) else str(error).strip()
        reason = f" ({said.splitlines()[0][:200]})" if said else ""
        raise broken(
            f"{label}: is not a state dict in .safetensors or torch.save's format with tensors only{reason}; give what "
            "torch.save(model.state_dict(), …) or safetensors' save_file writes"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        inside = listed(sorted(map(str, state))) if isinstance(state, Mapping) else type(state).__name__
        raise broken(f"{label}: holds {inside}; expected a state dict, as model.state_dict() returns it")
    return dict(state)


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    return _digest(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        feed(digest, name)
        feed(digest, tensor)
    return digest.hexdigest()


def load_model(config: Config) -> nn.Module:
    """Build the model, load `--weights` if given, and put it in eval mode.

    Raises:
        SettingsError: The callable or the file is not what is expected, or the weights do not fit.
    """
    model = build_model(config, weights=config.weights is None)
    if config.weights is not None:
        options, label = weights_options(config), f"--weights {config.weights}"
        if (shards := shards_of(config.weights, options, "--weights")) is not None:
            load_shards(model, shards, label)
        else:
            content = read_file(config.weights, options, "--weights", hint(config, "weights"))
            load_weights(model, content, label)
    return adapted(model.eval(), config.dict_key_y)


def build_model(config: Config, *, weights: bool = False) -> nn.Module:
    """Build the model that `--model` names.

    Args:
        config: The settings.
        weights: Load those that lie in a folder of `save_pretrained`; a callable gives its own in any case.

    Raises:
        SettingsError: The callable or the folder is not what is expected.
    """
    if config.model.startswith(HF):
        return build_pretrained(config, weights=weights)
    model = call(config.model, "--model", config.model_args)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"--model: {config.model!r} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model
