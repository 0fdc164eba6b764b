"""The windows of a recalibration: the new one is begun and summed, and the chosen ones make a candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laplace_dist.config import compatibility
from laplace_dist.config.figures import check_gates
from laplace_dist.errors import SettingsError, listed
from laplace_dist.job import Job
from laplace_dist.report import alert
from laplace_dist.run import layout, leases, pointer, recalibrations, versions, windows
from laplace_dist.run.combination import (
    Term,
    Window,
    choose,
    chosen_names,
    is_rule,
    is_summed,
    passes_of,
    summed,
    terms_of,
    windows_of,
)
from laplace_dist.run.overlap import refuse_shared
from laplace_dist.stages import opening
from laplace_dist.stages.recalibrate import settings


class WindowStages(Job):
    """The stages of a recalibration that make its candidate."""

    window: Window | None = None
    dropping: str | None = None
    _current: dict[str, Any]  # `CURRENT.json` as it was when this job became the one that recalibrates
    _left_out: Sequence[str] = ()
    _passed_over: Sequence[Mapping[str, str]] = ()  # windows that a rule has not counted, and why
    _beside: Sequence[str] = ()  # windows that the candidate is made of beside the new one

    def begin(self, drop_window: str | None) -> None:
        """Begin or continue the window, and see to it that its sum is committed."""
        compatibility.check_predictive(self.config)
        check_gates(self.config)
        if self.config.alert_cmd is not None:
            alert.arguments(self.config.alert_cmd)
        self._left_out = pointer.left_out(self._current)
        if self._left_out:
            self.say(
                f"left out, since they were dropped or rolled back: {listed(self._left_out)}; --windows takes them in by name"
            )
        self.dropping = drop_window
        if drop_window is not None:
            return
        there = windows_of(self.store, self.plan)
        self._refuse_windows(there)  # before anything is computed
        self.window, self._continued = self.begin_window(there)
        self.say(f"{'continuing' if self._continued else 'adding'} window {self.window.name} of {self.store.url}")
        self.say_weights()
        if self.plan.further is None and windows.find_window(self.window.store, self.window.plan) is None:
            self.map()
        whole = summed(self.sum_window())
        if not self.config.keep_partials:
            windows.drop_partials(whole.store, whole.plan)

    def drop_partials(self) -> None:
        """Drop the partials of every window whose sum is committed, the fit's among them, unless the settings keep them.

        Not while another job is at work, which may be reading them; the next recalibration does it then.
        """
        if self.config.keep_partials or leases.others_at_work(self.store, self.session.lease.job):
            return
        for window in windows_of(self.store, self.plan):
            for store, plan in passes_of(window):
                if store.exists(layout.WINDOW):
                    windows.drop_partials(store, plan)

    def begin_window(self, there: Sequence[Window]) -> tuple[Window, bool]:
        """Begin the window of the settings, or continue it; returns it and whether it was there."""
        found = opening.begin_window(self.config, self.store, there, self.device_type, self._beside)
        self._checked = True
        return found

    def _refuse_windows(self, there: Sequence[Window]) -> None:
        own, names = self.config.window, [window.name for window in there]
        if own not in names and recalibrations.read_decision(self.store, self.plan, own):
            raise SettingsError(
                f"--window: got {own!r}, which was decided before and whose sum is gone (--keep-versions). Give new data a "
                "name of their own."
            )
        if is_rule(self.config.windows) and own in self._left_out:
            named = ",".join([*self._counting(names), own])
            raise SettingsError(
                f"--window: got {own!r}, which was dropped or rolled back and stays out until it is named: --windows {named}"
            )
        waiting = [name for name in names if name not in {own, *self._left_out, *self._counting(names)}]
        if waiting and is_rule(self.config.windows):
            self.say(
                f"not counted by --windows {self.config.windows}: {listed(waiting)}, whose recalibration was a dry run or "
                "did not end. Its command counts it, --drop-window drops it, --windows takes it in by name"
            )
        self._beside = [name for name in self._chosen([*names, *({own} - set(names))]) if name != own]
        terms_of([(window, 1.0) for window in there if window.name in self._beside])

    def _counting(self, names: Sequence[str]) -> list[str]:
        """Return the windows from which a rule chooses: the fit's, this job's, and those decided on, dropped ones not.

        One that a dry run has added, or a job that did not end, counts once its own recalibration has.
        """
        keys = self.store.list(layout.RECALIBRATIONS)
        decided = {name for name in names if layout.recalibration_key(name) in keys}
        counted = {self.plan.window_name, self.window.name if self.window else self.config.window, *decided}
        return [name for name in names if name in counted and name not in self._left_out]

    def _not_counted(self, there: Sequence[Window], dropping: str | None) -> list[dict[str, str]]:
        """Return the windows from which a rule does not choose, but for the one that is being dropped, and why.

        `unfinished` ones have no sum; of those that are `undecided` no recalibration has ended, since it was a dry run, was
        refused or was killed; those that are `left out` were dropped or rolled back.
        """
        if not is_rule(self.config.windows):
            return []
        counted = self._counting([window.name for window in there])
        found = []
        for window in there:
            if window.name not in (*counted, dropping):
                why = "undecided" if is_summed(window) else "unfinished"
                found.append({"window": window.name, "why": "left out" if window.name in self._left_out else why})
        return found

    def _chosen(self, there: Sequence[str]) -> list[str]:
        """Return the names of the windows that `--windows` means: by a rule only those that count."""
        return chosen_names(self._counting(there) if is_rule(self.config.windows) else there, self.config.windows)

    def terms(self, drop_window: str | None) -> list[Term]:
        """Return the windows that the candidate is made of, with their weights."""
        there = windows_of(self.store, self.plan)
        names = [window.name for window in there]
        if drop_window is not None:
            if drop_window not in self._left_out and (drop_window not in names or len(names) == 1):
                raise SettingsError(
                    f"--drop-window: got {drop_window!r}; expected one of several windows, and the run has "
                    f"{', '.join(names)}"
                )
            self._left_out = [*(name for name in self._left_out if name != drop_window), drop_window]
            if not is_rule(self.config.windows) and drop_window in self.config.windows.split(","):
                raise SettingsError(
                    f"--windows: got {self.config.windows!r}, which names the window that --drop-window drops; leave it out"
                )
        chosen = self._chosen([name for name in names if name != drop_window])
        if not chosen:
            raise SettingsError(
                f"--windows: got {self.config.windows!r}, and every window there is was dropped; name some"
            )
        self._passed_over = self._not_counted(there, drop_window)
        self._left_out = [name for name in self._left_out if name not in chosen]
        terms = terms_of(choose(there, ",".join(chosen), self.config.decay))
        if drop_window is None:
            accepted = versions.windows_in(self.store, self.plan, self._current["version"])
            refuse_shared(terms, accepted, self.config.shared_examples, self.say)
        version = versions.version_of(terms)
        if drop_window is None and is_rule(self.config.windows) and version in pointer.rolled_back(self._current):
            raise SettingsError(
                f"--windows: {self.config.windows!r} makes version {version} again, which was rolled back. To promote it all "
                f"the same, name its windows: --windows {','.join(chosen)}"
            )
        return terms

    def asked(self) -> dict[str, Any]:
        """Return what a decision depends on beside the windows and what is current: settings, and the fresh data."""
        names = compatibility.evaluated(self.config)
        if not self.config.skip_tune and (self.config.searches or not self._why_no_validation()):
            names = [*names, "val"]
        return settings(self.config, {name: self._fingerprint(name) for name in names})

    def is_out_already(self, drop_window: str | None, terms: Sequence[Term]) -> bool:
        """Say, in a line too, whether a window that is to be dropped was so before, and the current posterior is without it."""
        current = self._current
        done = drop_window in pointer.left_out(current) and versions.version_of(terms) == current["version"]
        if done:
            self.say(f"window {drop_window} was dropped before: nothing to do")
        return done

    def combine(self, terms: Sequence[Term]) -> str:
        """Commit the posterior version that windows make; one that was never current and lost its arrays is made again."""
        version = versions.version_of(terms)
        if all(entry["version"] != version for entry in pointer.history_of(self._current)):
            versions.discard_torn(self.store, self.plan, version)
        return super().combine(terms)
