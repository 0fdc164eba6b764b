"""The Python lines that load a posterior, for whoever has just fitted it."""

from __future__ import annotations

import os

from laplace_dist.config.absolute import absolute
from laplace_dist.config.settings import HF, Config
from laplace_dist.run import layout
from laplace_dist.run.pretrained import AUTO_CLASSES


def loading_lines(config: Config, checkpoint: str) -> str:
    """Return the Python lines that load the posterior of a run at `checkpoint`, from whatever folder."""
    config = absolute(config)
    arguments = ", ".join(f"{name}={value!r}" for name, value in config.model_args.items())
    options = ", storage_options=storage_options" if "://" in checkpoint and config.storage_options else ""
    if config.model.startswith(HF):
        return (
            f"from transformers import {AUTO_CLASSES[config.task or '']}\n"
            "from laplace_dist import load_posterior\n"
            f"model = {AUTO_CLASSES[config.task or '']}.from_pretrained({config.model.removeprefix(HF)!r}"
            f"{', ' + arguments if arguments else ''}).float()\n"
            f"la = load_posterior({checkpoint!r}, model.eval(), load_weights=True{options})"
        )
    module, _, attribute = config.model.partition(":")
    if "://" in checkpoint or not os.path.exists(f"{checkpoint}/{layout.WEIGHTS}"):
        return (
            f"from {module} import {attribute}\n"
            "from laplace_dist import load_posterior\n"
            f"model = {attribute}({arguments})\n"
            f"la = load_posterior({checkpoint!r}, model.eval(), load_weights=True{options})"
        )
    return (
        f"from {module} import {attribute}\n"
        "from laplace_dist import load_posterior\n"
        "from safetensors.torch import load_file\n"
        f"model = {attribute}({arguments})\n"
        f"model.load_state_dict(load_file({checkpoint + '/' + layout.WEIGHTS!r}))\n"
        f"la = load_posterior({checkpoint!r}, model.eval())"
    )
