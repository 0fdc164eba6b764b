"""The settings of a job from the command line: typed ones, the demo's or the run's, and those that do nothing in the job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from laplace_dist.config.command_line import load_config
from laplace_dist.config.settings import Config
from laplace_dist.errors import MissingObjectError, SettingsError
from laplace_dist.run import settings_file
from laplace_dist.run.checkpoint import open_store
from laplace_dist.run.layout import PLAN
from laplace_dist.run.place import refuse_needed

NOTES = {  # of `--help`
    "fit": "The defaults, in parentheses, are those with a --model of your own. Without --model the bundled demo is fitted, "
    "whose settings are in laplace_dist/demo.",
    "follow-on": "Without --model and --config every setting that is not given is the run's own; with them the defaults, in "
    "parentheses, hold.",
}


def settings_of_job(job: str, argv: Sequence[str], defaults: Mapping[str, Any]) -> Config:
    """Return the settings: of the bundled demo if no model is given, and for a follow-on job those of the run.

    What `--help` shows as defaults is what holds with a model of one's own, not what the demo sets.
    """
    if "--help" in argv or "-h" in argv:
        return load_config(["--help"], defaults=defaults, note=NOTES["fit" if job == "fit" else "follow-on"])
    if _given(argv, "--model") or _given(argv, "--config"):
        return load_config(argv, defaults=defaults)
    from laplace_dist import demo

    config = load_config(argv, defaults={**demo.settings(), **defaults})
    if job != "fit":
        return load_config(argv, defaults={**defaults, **settings_of_run(config)})
    if config.weights is None:
        config = config.model_copy(update={"weights": demo.train()})
    return config


def settings_of_run(config: Config) -> dict[str, Any]:
    """Return the settings that a run keeps under its checkpoint, by field name."""
    try:
        values = settings_file.read_config(open_store(config))
    except MissingObjectError as error:
        raise SettingsError(
            f"--checkpoint: got {config.checkpoint!r}, where there is no run; expected one that a fit job has started"
        ) from error
    kept = {name.replace("-", "_"): value for name, value in values.items()}
    return {**kept, "weights": None, "checkpoint": config.checkpoint, "window": None}


def settings_for_data(config: Config) -> Config:
    """Return the settings with which a run's data are read again: its own, and those of the workers as given now."""
    names = (
        "storage_options",
        "data_storage_options",
        "ray_address",
        "num_workers",
        "cpus_per_worker",
        "segment_timeout",
    )
    return Config(**{**settings_of_run(config), **{name: getattr(config, name) for name in names}})


def refuse_idle(argv: Sequence[str], names: Sequence[str], where: str) -> None:
    """Refuse flags that do nothing in a job.

    Args:
        argv: Arguments of the job.
        names: Of the flags, without dashes before them.
        where: Which job heeds them.
    """
    if idle := [f"--{name}" for name in names if _given(argv, f"--{name}") or _given(argv, f"--no-{name}")]:
        raise SettingsError(f"{', '.join(idle)}: does nothing in this job, but in {where}. Leave it out")


def keep_config_file(argv: Sequence[str], config: Config) -> None:
    """Refuse to delete a run, with --fresh, that the file of --config lies in, as the run's own settings do.

    Raises:
        SettingsError: Naming it. Nothing was changed.
    """
    if config.fresh and _given(argv, "--config") and (store := open_store(config)).exists(PLAN):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config")
        refuse_needed(store, {"--config": parser.parse_known_args(list(argv))[0].config})


def say_idle(argv: Sequence[str], config: Config, names: Sequence[str], where: str) -> None:
    """Say which settings of a file, other than the defaults, do nothing in a job: a fit and its recalibrations may share it."""
    fields = {name: name.replace("-", "_") for name in names}
    set_ = [name for name, field in fields.items() if field in config.model_fields_set]
    idle = [name for name in set_ if getattr(config, fields[name]) != Config.model_fields[fields[name]].get_default()]
    if _given(argv, "--config") and idle:
        print(f"note: {', '.join(idle)} in --config does nothing in this job, but in {where}", file=sys.stderr)


def _given(argv: Sequence[str], flag: str) -> bool:
    return any(argument == flag or argument.startswith(f"{flag}=") for argument in argv)
