"""Models of Hugging Face's `save_pretrained`, from a local folder, through the package `transformers`, which is an extra."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from laplace_dist.config.settings import HF, Config
from laplace_dist.data.weight_files import shards_of
from laplace_dist.errors import SettingsError, listed

AUTO_CLASSES = {"sequence-classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}
_NAMES = {
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_OF_PACKAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


def build_pretrained(config: Config, *, weights: bool) -> nn.Module:
    """Build the model of the folder in `--model hf:PATH`, with the class that its task asks for.

    What is stored in half precision is widened to float32, which every value of it fits.

    Args:
        config: The settings; `model_args` replace fields of the model's configuration.
        weights: Load those in the folder too.

    Raises:
        SettingsError: The package, the folder or its weights are missing; the folder's model is of another task; weights are
            pickles or damaged, or not those of the model.
    """
    transformers = _package()
    folder = Path(config.model.removeprefix(HF))
    described = _described(folder)
    auto = _auto(config, described, folder)
    chosen = _configuration(transformers, config, folder)
    factory = getattr(transformers, auto)
    try:
        if not weights:
            return _widened(factory.from_config(chosen, trust_remote_code=False))
        shards_of(str(folder), {}, "--model")  # names what is missing, or is no safetensors
        model, found = factory.from_pretrained(
            str(folder), config=chosen, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    except _OF_PACKAGE as error:
        raise error if isinstance(error, SettingsError) else _failed(folder, error) from None
    _check_complete(model, found, folder)
    return _widened(model)


def _package() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SettingsError(
            f"--model: {HF}PATH needs Hugging Face's transformers, which is not installed here ({error}); pip install "
            "transformers, or the extra laplace-dist[hf]"
        ) from None


def _described(folder: Path) -> Mapping[str, Any]:
    """Return what the folder's `config.json` says."""
    if not folder.is_dir():
        raise SettingsError(
            f"--model: there is no folder {str(folder)!r}; expected {HF} and the path of what save_pretrained wrote. A name on "
            "the hub has to be downloaded first: hf download NAME --local-dir PATH"
        )
    if (folder / "adapter_config.json").exists():
        raise SettingsError(
            f"--model: {str(folder)!r} holds an adapter of PEFT's alone; build the model and its adapter in a function of your "
            "own, and name that as module:callable"
        )
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"--model: {str(folder)!r} holds no config.json that can be read ({type(error).__name__}); expected what "
            "save_pretrained wrote"
        ) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise SettingsError(f"--model: {str(folder / 'config.json')!r} names no model_type; restore it")
    return found


def _auto(config: Config, described: Mapping[str, Any], folder: Path) -> str:
    """Return the name of the class that builds models for the task, after checking that the folder's is one."""
    assert config.task is not None, "the settings were checked"
    mapping = getattr(importlib.import_module("transformers.models.auto.modeling_auto"), _NAMES[config.task])
    wanted = mapping.get(described["model_type"])
    stored = described.get("architectures") or []
    if wanted is None or (stored and wanted not in stored):
        found = listed(stored) if stored else f"a model of type {described['model_type']}"
        asked = f"needs a {wanted}" if wanted else "has no such model"
        raise SettingsError(f"--task: got {config.task!r}, which {asked}, but {str(folder)!r} holds {found}")
    return AUTO_CLASSES[config.task]


def _configuration(transformers: Any, config: Config, folder: Path) -> Any:
    try:
        found, unused = transformers.AutoConfig.from_pretrained(
            str(folder), return_unused_kwargs=True, **_LOCAL, **config.model_args
        )
    except _OF_PACKAGE as error:
        raise _failed(folder, error) from None
    if unused := [name for name in unused if name not in _LOCAL]:
        raise SettingsError(f"--model-args: {listed(unused)} is no field of the configuration of {str(folder)!r}")
    if hasattr(found, "use_cache"):
        found.use_cache = False
    _check_problem(config, found, folder)
    return found


def _check_problem(config: Config, found: Any, folder: Path) -> None:
    """Refuse the likelihood of single labels for a classifier that says that it was trained for another problem."""
    problem = getattr(found, "problem_type", None)
    other = {
        "regression": "give --likelihood regression",
        "multi_label_classification": "give --likelihood my_module:f, whose f returns laplace.likelihoods.Bernoulli()",
    }.get(problem if config.task == "sequence-classification" else None)
    if other is not None and config.likelihood == "classification":
        raise SettingsError(
            f"--likelihood: got 'classification', but the config.json of {str(folder)!r} says problem_type={problem!r}; {other}"
        )


def _check_complete(model: nn.Module, found: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model of which the package left some weights as they were drawn, or did not use some that are stored."""
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
    }
    if any(wrong.values()):
        text = "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
        raise SettingsError(
            f"--model: the weights in {str(folder)!r} are not those of a {type(model).__name__}. {text}"
        )


def _widened(model: nn.Module) -> nn.Module:
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return model.float() if half else model


def _failed(folder: Path, error: Exception) -> SettingsError:
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return SettingsError(f"--model: {str(folder)!r} cannot be loaded ({type(error).__name__}: {text})")
