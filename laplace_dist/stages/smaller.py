"""What a run that ran out of memory before anything of it was committed is begun again with: smaller batches, or more groups.

A batch's contribution to the sums is one product in the model's precision, so halves of a batch add up to other last bits: how
large batches are belongs to the plan and is never changed under way. Before the first commit nothing is lost by a plan of its
own with batches of half the size, which says so. Module groups change no bit, but they say how partials are divided, so that
they are not changed under way either.
"""

from __future__ import annotations

from typing import Any

from laplace_dist.config.compatibility import no_groups
from laplace_dist.config.settings import Config
from laplace_dist.errors import OutOfMemory
from laplace_dist.plan.groups import most
from laplace_dist.plan.plan import Plan


def smaller(given: Config, plan: Plan, error: OutOfMemory) -> dict[str, Any] | None:
    """Return the settings that take less memory, by field name; None where there are none.

    Args:
        given: The settings as they were given: a number of module groups that was asked for stays.
        plan: Of the run that ran out of memory.
        error: What it ran out of.
    """
    if error.of_sums:
        groups, limit = len(plan.groups), most(plan.spec)
        fixed = given.module_groups is not None or no_groups(given) is not None or groups == limit
        return None if fixed else {"module_groups": min(2 * groups, limit)}
    size = plan.settings["batch_size"]
    return None if size == 1 else {"batch_size": size // 2}


def one_example(error: OutOfMemory, expected: int | None, memory: int | None) -> OutOfMemory:
    """Return the error of a run whose batches are of one example already, with what was expected of a worker's memory.

    Args:
        error: Memory ran out.
        expected: Bytes that a worker was expected to take at least, if that is known.
        memory: Bytes that a worker can have at most, if that is known.
    """
    said = [f"{str(error)}\nBatches are of one example already, so no smaller one helps."]
    if expected is not None:
        there = "" if memory is None else f", and one can have {memory:,} at most"
        said.append(
            f"A worker was expected to take at least {expected:,} bytes, for its libraries, the model, the sums and, on CPUs, "
            f"what the forward pass keeps{there}; examples and what else a backward pass needs come on top."
        )
    said.append(
        "Run fewer workers on a node, or larger nodes; as another run give --subset-of-weights last_layer or shorter examples."
    )
    return OutOfMemory(" ".join(said), of_sums=False)


def as_halved(config: Config, plan: Plan) -> Config:
    """Return the settings with the batch size of the run, where that was halved from the one that they say."""
    if plan.halved_from is None or config.batch_size != plan.halved_from:
        return config
    return config.model_copy(update={"batch_size": plan.settings["batch_size"]})
