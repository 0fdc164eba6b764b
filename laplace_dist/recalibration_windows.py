"""The windows of a recalibration: the new one is begun and summed, and the chosen ones make a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laplace_dist.errors import SettingsError
from laplace_dist.job import Job
from laplace_dist.report import alert
from laplace_dist.run import pointer, recalibrations, versions, windows
from laplace_dist.run.combination import Term, Window, choose, chosen_names, is_rule, terms_of, windows_of
from laplace_dist.stages import opening


class WindowStages(Job):
    """The stages of a recalibration that make its candidate."""

    window: Window | None = None
    _current: dict[str, Any]  # `CURRENT.json` as it was when this job became the one that recalibrates
    _left_out: Sequence[str] = ()

    def begin(self, drop_window: str | None) -> None:
        """Begin or continue the window, and see to it that its sum is committed."""
        if self.config.alert_cmd is not None:
            alert.arguments(self.config.alert_cmd)
        self._left_out = pointer.left_out(self._current)
        if drop_window is not None:
            return
        there = windows_of(self.store, self.plan)
        names = [window.name for window in there]
        self._chosen([*names, *({self.config.window} - set(names))])  # before anything is computed
        if self.config.window not in names and recalibrations.read_decision(self.store, self.plan, self.config.window):
            raise SettingsError(
                f"--window: got {self.config.window!r}, which was decided before and whose sum is gone (--keep-versions). Give "
                "new data a name of their own."
            )
        self.window, self._continued = self.begin_window(there)
        self.say(f"{'continuing' if self._continued else 'adding'} window {self.window.name} of {self.store.url}")
        if windows.find_window(self.window.store, self.window.plan) is None:
            self.map()
            self.sum_window()
        if not self.config.keep_partials and self.window.store.list("partials"):
            windows.check_arrays(self.window.store, windows.read_window(self.window.store, self.window.plan))
            self.window.store.delete_tree("partials")

    def begin_window(self, there: Sequence[Window]) -> tuple[Window, bool]:
        """Begin the window of the settings, or continue it; returns it and whether it was there."""
        found = opening.begin_window(self.config, self.store, there, self.device_type)
        self._checked = True
        return found

    def _chosen(self, there: Sequence[str]) -> list[str]:
        """Return the names of the windows that `--windows` means: those that were dropped are in only if they are named."""
        staying = [name for name in there if name not in self._left_out]
        return chosen_names(staying if is_rule(self.config.windows) else there, self.config.windows)

    def terms(self, drop_window: str | None) -> list[Term]:
        """Return the windows that the candidate is made of, with their weights."""
        there = windows_of(self.store, self.plan)
        names = [window.name for window in there]
        if drop_window is not None:
            if drop_window not in names or len(names) == 1:
                raise SettingsError(
                    f"--drop-window: got {drop_window!r}; expected one of several windows, and the run has "
                    f"{', '.join(names)}"
                )
            self._left_out = [*(name for name in self._left_out if name != drop_window), drop_window]
        chosen = self._chosen([name for name in names if name != drop_window])
        if not chosen:
            raise SettingsError(
                f"--windows: got {self.config.windows!r}, and every window there is was dropped; name some"
            )
        self._left_out = [name for name in self._left_out if name not in chosen]
        return terms_of(choose(there, ",".join(chosen), self.config.decay))

    def combine(self, terms: Sequence[Term]) -> str:
        """Commit the posterior version that windows make; one that was never current and lost its arrays is made again."""
        version = versions.version_of(terms)
        if all(entry["version"] != version for entry in pointer.history_of(self._current)):
            versions.discard_torn(self.store, self.plan, version)
        return super().combine(terms)
