"""The optimizer of a training's weights, and the schedule of its step size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from laplace_dist.config.training import Training
from laplace_dist.errors import SettingsError

_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer_of(own: Training, params: Sequence[Tensor]) -> Optimizer:
    """Return the optimizer at its beginning.

    Raises:
        SettingsError: It does not take the arguments.
    """
    try:
        return _OPTIMIZERS[own.optimizer](params, **own.optimizer_args)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"--optimizer-args: got {own.optimizer_args!r} for {own.optimizer}; {error}") from error


def schedule_of(own: Training, optimizer: Optimizer, steps: int = 0) -> LRScheduler | None:
    """Return the schedule of an optimizer at its beginning, after so many of its steps; None if the step size is constant.

    What a schedule keeps is a function of the number of its steps, so none of it is stored: the steps are made again.

    Raises:
        SettingsError: It does not take the arguments, or makes no more steps.
    """
    if own.scheduler is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the weights' steps lie behind
            schedule = getattr(lr_scheduler, own.scheduler)(optimizer, **own.scheduler_args)
            for number in range(1, steps + 1):
                schedule.step()
                _check_rates(schedule, number)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise SettingsError(
            f"--scheduler-args: got {own.scheduler_args!r} for {own.scheduler} with {own.optimizer}, {steps} steps; {error}"
        ) from error
    return schedule


def _check_rates(schedule: LRScheduler, steps: int) -> None:
    for rate in map(float, schedule.get_last_lr()):
        if not 0 <= rate < math.inf:
            raise ValueError(f"the step size is {rate} after {steps}")


def check_schedule(own: Training, steps: int) -> None:
    """Go through the schedule of a whole training beforehand, on an optimizer of nothing.

    Args:
        own: The settings.
        steps: Batches of all epochs.

    Raises:
        SettingsError: It does not take the arguments, makes fewer steps, or a step size is negative or not finite.
    """
    schedule_of(own, optimizer_of(own, [torch.zeros(1, requires_grad=True)]), steps)
