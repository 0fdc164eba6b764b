"""Which models are let in at all, before any pass: those whose modules can be seen and whose parameters are real numbers here.

Each of the others gets one sentence that names the module or parameter and the way out.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def check_model(model: nn.Module) -> None:
    """Refuse models that no hook can look into, and parameters over which there is no Gaussian.

    Raises:
        ValueError: If a module is scripted, traced or exported, or a parameter is complex, sharded, sparse or without values,
            or there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{_start(in_words(name, module))} is scripted or traced by torch.jit, so that the inputs of its layers "
                "cannot be seen. Give the module that was scripted, with the weights of its state_dict()."
            )
        if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
            raise ValueError(
                f"{_start(in_words(name, module))} is a program of torch.export, which has no evaluation mode and no layers. "
                "Give the module that was exported."
            )
    _check_parameters(model)


def _check_parameters(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise ValueError(f"{_start(named('', model))} has no parameters, so there is nothing to infer.")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        owner = named(lazy[0].rpartition(".")[0], model)
        raise ValueError(
            f"Parameters {lazy} have no values yet, since {owner} takes its shape from its first input. Run "
            "one forward pass, model(x), and train the model before the posterior is made."
        )
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty:
        raise ValueError(
            f"Parameters {_few(empty)} are on torch's meta device, where they have no values. Load the model with its weights "
            "on the CPU or a GPU (of Hugging Face's models without offloading by device_map) before the posterior is made."
        )
    sparse = [name for name, p in model.named_parameters() if p.layout is not torch.strided and p.requires_grad]
    if sparse:
        raise ValueError(
            f"Parameters {_few(sparse)} are sparse tensors, over which there is no Gaussian. Keep them dense "
            "(nn.Parameter(weight.to_dense()) and a mask), or set requires_grad=False."
        )
    inferred = [name for name, p in model.named_parameters() if p.is_inference() and p.requires_grad]
    if inferred:
        raise ValueError(
            f"Parameters {inferred} were made inside torch.inference_mode(), so that nothing can be differentiated in them. "
            "Build the model outside of it, or give a copy.deepcopy(model) that is made outside."
        )
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    if sharded:
        raise ValueError(
            f"Parameters {sharded} are sharded over processes (DTensor, as of fully_shard). Load the full state dict into a "
            "module of one process; laplace_dist fits on many workers."
        )
    found = [name for name, p in model.named_parameters() if p.is_complex() and p.requires_grad]
    if found:
        raise ValueError(
            f"Parameters {found} are complex; Laplace approximations are over real ones. Store the real and imaginary parts "
            "as a real parameter (torch.view_as_complex(weight)), or set requires_grad=False."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _start(words: str) -> str:
    return words[:1].upper() + words[1:]


def named(name: str, model: nn.Module) -> str:
    """A module in words, by its name and class."""
    return in_words(name, model.get_submodule(name))


def in_words(name: str, module: nn.Module) -> str:
    """A module in words; the model itself has no name."""
    kind = type(module).__name__
    return f"module {name!r} ({kind})" if name else f"the model ({kind})"
