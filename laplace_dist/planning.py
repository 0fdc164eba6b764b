"""What a fit will take, found out before it begins: its plan, and a trial of a few batches in this process."""

from __future__ import annotations

import torch

from laplace.errors import NotEnoughMemoryError
from laplace.linalg.memory import free_bytes
from laplace_dist.config import compatibility
from laplace_dist.config.given import check_given
from laplace_dist.config.settings import Config
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution.inline import computing_as_a_worker
from laplace_dist.plan.estimate import Estimate
from laplace_dist.plan.estimate import estimate as worked_out
from laplace_dist.stages import resolving, trial


def estimate(config: Config) -> Estimate:
    """Estimate bytes, requests, memory and time of a fit; nothing is written to the checkpoint, and Ray is not used.

    Times are those of this machine with as many threads as a worker has; on GPUs, or faster nodes, it takes less. They are of
    the map phase and of the reduction, for `num_workers` workers (one if not given).

    Args:
        config: The settings of the fit.

    Raises:
        SettingsError: The settings are refused, as the fit would refuse them.
        RunFailed: The sums do not fit into the free memory of this machine; says what would.
    """
    check_given(config)
    compatibility.check_predictive(config)
    resolved = resolving.resolve(config)
    try:
        with computing_as_a_worker(config, torch.device("cpu")):
            plan, found = trial.run(resolved.config, resolved, _groups(config, resolved))
    except NotEnoughMemoryError as error:
        raise RunFailed(str(error)) from error
    return worked_out(plan, found, resolved.la.coverage, config.num_workers or 1, resolved.cost)


def _groups(config: Config, resolved: resolving.Resolved) -> int:
    """Return the number of module groups; where the sums do not fit here at all, that is found out when they are begun."""
    free = free_bytes("cpu")
    try:
        return resolving.module_groups(config, resolved, None if free is None else free // (config.num_workers or 1))
    except SettingsError:
        return 1
