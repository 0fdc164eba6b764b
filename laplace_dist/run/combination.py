r"""Which windows make a posterior version, and with which weights.

A posterior version is $\sum_w \gamma_w S_w$ over the committed sums $S_w$ of some windows, in the order in which the windows
were begun: with weights of 1 it is a fit of all their data, of the last $K$ a sliding window, with $\gamma^{\mathrm{age}}$ old
data are forgotten, and what is left out is unlearned exactly.

The first window lies at the checkpoint itself, every other one under `windows/<name>/`, laid out like the first: a plan,
partials, parts, a sum. Its plan names the run by its id, so that what a deleted run has left there does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_dist.config.chosen_windows import LAST
from laplace_dist.errors import MissingObjectError, SettingsError, listed
from laplace_dist.plan.plan import Plan
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.layout import PLAN, WINDOWS
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.second_pass import place_of_second, read_second_plan
from laplace_dist.run.windows import find_window, read_window
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Window:
    """One window of a run.

    Attributes:
        store: Where it lies.
        plan: Its plan.
    """

    store: Store
    plan: Plan

    @property
    def name(self) -> str:
        """Its name."""
        return self.plan.window_name


@dataclass(frozen=True)
class Term:
    """One window in a posterior version.

    Attributes:
        window: The window.
        weight: Of its sum.
        manifest: Of its sum.
    """

    window: Window
    weight: float
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Sha256 of what the window's sum is of, and of its bytes."""
        parts = {name: place["entry"]["sha256"] for name, place in sorted(self.manifest["parts"].items())}
        content = [self.window.plan.content, self.manifest["n_data"], self.manifest["loss"], parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def place_of(store: Checkpoint, plan: Plan, name: str) -> Checkpoint:
    """Return the store of a window.

    Args:
        store: The checkpoint.
        plan: Of the run, which is that of its first window.
        name: Of the window.
    """
    return store if name == plan.window_name else store.under(f"{WINDOWS}/{name}")


def windows_of(store: Checkpoint, plan: Plan) -> list[Window]:
    """Return the windows of a run in the order in which they were begun."""
    names = {key.split("/")[1] for key in store.list(WINDOWS) if key.count("/") > 1}
    found = [Window(store, plan)]
    for name in sorted(names):
        place = place_of(store, plan, name)
        try:
            own = read_plan(place)
        except MissingObjectError:  # what a deleted run has left
            continue
        if own.run == plan.run_id and own.window_name == name:
            found.append(Window(place, own))
    return sorted(found, key=lambda window: (window.plan.window_number, window.name))


def summed(window: Window) -> Window:
    """Return where the sum of a window lies that a posterior is made of: of structures that take two passes, the second's.

    Raises:
        MissingObjectError: Its second pass was not begun.
        CheckpointError: The plan of its second pass is truncated or altered.
    """
    if window.plan.further is None:
        return window
    place = place_of_second(window.store, window.plan)
    found = read_second_plan(place, window.plan)
    if found is None:
        raise MissingObjectError(f"{place.url} is of a run that was deleted: the second pass was not begun")
    return Window(place, found)


def is_summed(window: Window) -> bool:
    """Say whether the sum is committed that a posterior takes of a window."""
    try:
        whole = summed(window)
        return find_window(whole.store, whole.plan) is not None
    except MissingObjectError:
        return False


def passes_of(window: Window) -> list[tuple[Store, Plan]]:
    """Return store and plan of the first pass over a window's data and, where there is one, of the second.

    Raises:
        CheckpointError: The plan of the second pass is truncated or altered.
    """
    found = [(window.store, window.plan)]
    if window.plan.further is not None and (place := place_of_second(window.store, window.plan)).exists(PLAN):
        second = read_second_plan(place, window.plan)
        found += [] if second is None else [(place, second)]
    return found


def choose(windows: Sequence[Window], chosen: str, decay: float) -> list[tuple[Window, float]]:
    """Return the windows that a posterior version is made of, each with its weight, in order.

    Args:
        windows: All of the run, in order.
        chosen: `all`, `last:K`, or names with commas between them.
        decay: γ: the weight of the last of the chosen windows is 1, of the one before γ, and so on. One whose weight is too
            small for a float64 adds nothing, and is left out.

    Raises:
        SettingsError: `chosen` is none of these, or names a window that is not there.
    """
    names = chosen_names([window.name for window in windows], chosen)
    some = [window for window in windows if window.name in names]
    weights = [decay**age for age in range(len(some) - 1, -1, -1)]
    return [(window, weight) for window, weight in zip(some, weights, strict=True) if weight > 0]


def chosen_names(there: Sequence[str], chosen: str) -> list[str]:
    """Return which of some windows are chosen, by name; arguments and errors as of `choose`."""
    if last := LAST.fullmatch(chosen):
        return list(there[-int(last[1]) :])
    if chosen == "all":
        return list(there)
    names = chosen.split(",")
    if unknown := [name for name in names if name not in there]:
        raise SettingsError(
            f"--windows: got {chosen!r}, but the run has no window {listed(unknown)}; it has {', '.join(there)}. Expected "
            "all, last:K, or names with commas between them"
        )
    return names


def is_rule(chosen: str) -> bool:
    """Say whether windows are chosen by a rule and not by their names."""
    return chosen == "all" or LAST.fullmatch(chosen) is not None


def terms_of(chosen: Sequence[tuple[Window, float]]) -> list[Term]:
    """Read the sums of the chosen windows.

    Raises:
        SettingsError: A window has no committed sum.
    """
    found = []
    for window, weight in chosen:
        try:
            whole = summed(window)
            found.append(Term(whole, weight, read_window(whole.store, whole.plan)))
        except MissingObjectError as error:
            raise SettingsError(
                f"--windows: window {window.name} is not finished, so it has no sum yet. Finish it with its own command "
                f"(--window {window.name} and its data), drop it with --drop-window {window.name}, or name others."
            ) from error
    return found


def alone(store: Store, plan: Plan, manifest: Mapping[str, Any]) -> list[Term]:
    """Return a window alone, with weight 1, as a fit takes it."""
    return [Term(Window(store, plan), 1.0, manifest)]
