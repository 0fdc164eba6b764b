"""A job from the command line: which settings, which exit status, what is printed at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from laplace_dist import resume
from laplace_dist.config import Config, load_config
from laplace_dist.driver import Result, evaluate_posterior, fit, tune_posterior
from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError
from laplace_dist.progress import show_result
from laplace_dist.worker import open_store

JOBS = {"fit": fit, "tune": tune_posterior, "evaluate": evaluate_posterior}


def main(job: str, argv: Sequence[str] | None = None, **defaults: Any) -> int:
    """Carry out a job from the command line.

    Args:
        job: `fit`, `tune` or `evaluate`.
        argv: Arguments without the program's name; those of this process if not given.
        **defaults: The job's own settings, by field name.

    Returns:
        The exit status: 0 done; 2 the settings or the state refuse; 1 the run failed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config = _settings(job, argv, defaults)
        result = JOBS[job](config)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunFailed, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show_result(result, _loading(config, result))
    return 0


def _settings(job: str, argv: Sequence[str], defaults: Mapping[str, Any]) -> Config:
    """Return the settings: of the bundled demo if no model is given, and for a follow-on job those of the run."""
    if _given(argv, "--model") or _given(argv, "--config"):
        return load_config(argv, defaults=defaults)
    from laplace_dist import demo

    config = load_config(argv, defaults={**demo.settings(), **defaults})
    if job != "fit":
        return load_config(argv, defaults={**defaults, **_settings_of_run(config)})
    if config.weights is None:
        config = config.model_copy(update={"weights": demo.train()})
    return config


def _given(argv: Sequence[str], flag: str) -> bool:
    return any(argument == flag or argument.startswith(f"{flag}=") for argument in argv)


def _settings_of_run(config: Config) -> dict[str, Any]:
    """Return the settings that a run keeps under its checkpoint, by field name."""
    try:
        values = yaml.safe_load(open_store(config).read(resume.CONFIG))
    except MissingObjectError as error:
        raise SettingsError(
            f"--checkpoint: got {config.checkpoint!r}, where there is no run; expected one that a fit job has started"
        ) from error
    kept = {name.replace("-", "_"): value for name, value in values.items()}
    return {**kept, "weights": None, "checkpoint": config.checkpoint}


def _loading(config: Config, result: Result) -> str:
    """Return the Python lines that load the posterior."""
    module, _, attribute = config.model.partition(":")
    arguments = ", ".join(f"{name}={value!r}" for name, value in config.model_args.items())
    return (
        f"from {module} import {attribute}\n"
        "from laplace_dist import load_posterior\n"
        "from safetensors.torch import load_file\n"
        f"model = {attribute}({arguments})\n"
        f"model.load_state_dict(load_file({result.checkpoint + '/' + resume.WEIGHTS!r}))\n"
        f"la = load_posterior({result.checkpoint!r}, model.eval())"
    )
