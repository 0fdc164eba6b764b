"""What a task may use: model, data and store, opened on first use."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from laplace.linalg.precision import without_autocast
from laplace.structures.specification import SumsSpec
from laplace_dist.config.settings import Config
from laplace_dist.data import example_weights, loader, sources
from laplace_dist.data.collate import Collate
from laplace_dist.data.device import to_device
from laplace_dist.data.read_ahead import ReadAhead
from laplace_dist.errors import SettingsError
from laplace_dist.plan.digests import feed
from laplace_dist.plan.identity import check_data
from laplace_dist.plan.plan import Plan, same_sums
from laplace_dist.plan.sketch import ExampleDigests
from laplace_dist.run import bases, posterior, provenance, run_weights, tunings
from laplace_dist.run.checkpoint import open_store
from laplace_dist.run.combination import Window, place_of, summed
from laplace_dist.run.lifecycle import check_model
from laplace_dist.run.ownership import read_plan, same
from laplace_dist.run.settings_file import data_of
from laplace_dist.stages.smaller import as_halved
from laplace_dist.storage.store import Store

_OTHER_FACTORS = (
    "this worker finds other factors in the model than the driver did: the same versions of laplace_dist, torch and of the "
    "code behind --model must be installed on every node."
)


class Context:
    """What a task may use. Everything is opened on first use, in the process that uses it, and kept.

    Args:
        config: The job's settings; the checkpoint is an absolute path or a URL.
        device: `cpu` or `cuda`.
    """

    def __init__(self, config: Config, device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._splits: dict[str, Any] = {}
        self._window: Window | None = None
        self._second: Window | None = None
        self._basis: tuple[tuple[str, int], dict[str, torch.Tensor]] | None = None
        self._posterior: tuple[Any, Any] | None = None
        self._reading: tuple[str, ReadAhead] | None = None
        self._unchecked: tuple[str, Any] | None = None

    def begin(self, task: Any) -> Mapping[str, Any] | Callable[[], Mapping[str, Any]]:
        """Carry out a task of the run at the checkpoint; returns its receipt, or the call that commits it and returns that.

        Raises:
            SettingsError: The task is of another run, which was there before.
        """
        if task.plan != self.plan.digest:
            self.window_of(task.plan)
        return task.run(self)

    def carry_out(self, task: Any) -> Mapping[str, Any]:
        """Carry out a task, commit it, and return its receipt; errors as of `begin`."""
        done = self.begin(task)
        return done() if callable(done) else done

    @cached_property
    def store(self) -> Store:
        """The checkpoint."""
        return open_store(self.config)

    @cached_property
    def plan(self) -> Plan:
        """The plan, as committed by the driver."""
        return read_plan(self.store)

    @property
    def window(self) -> Window:
        """The window that the job works on: the first one, which is the run's own, or the one that the settings name."""
        if self._window is None:
            store = place_of(self.store, self.plan, self.config.window or self.plan.window_name)
            self._window = Window(store, self.plan if store is self.store else read_plan(store))
        return self._window

    def window_of(self, digest: str) -> Window:
        """Return the window that the job works on, or its second pass: the one whose plan has this digest.

        Raises:
            SettingsError: It is another one, of a run that was there before.
        """
        if digest == self.window.plan.digest:
            return self.window
        if self.window.plan.further is None:
            same(self.window.store, self.window.plan.digest, digest)
        if self._second is None or self._second.plan.digest != digest:
            self._second = summed(self.window)
        same(self._second.store, self._second.plan.digest, digest)
        return self._second

    def zero_sums(self, plan: Plan, group: int = 0) -> Any:
        """Return raw sums over no example, of one module group of the pass over the data that has this plan.

        Raises:
            SettingsError: They are not those of the plan.
        """
        rows = () if len(plan.groups) == 1 else (plan.groups[group].rows,)
        if plan.basis is None:
            return self.la.zero_sums(*rows)
        if self._basis is None or self._basis[0] != (plan.basis["sha256"], group):
            self._basis = None  # before another one is read
            wanted, names = plan.basis["sha256"], _basis_of(plan, plan.groups[group].rows) if rows else None
            self._basis = (wanted, group), bases.read_basis(self.store, self.plan, wanted, self.device, names)
        sums = self.la.second_sums(self._basis[1], *rows)
        if not same_sums(plain(replace(sums.spec, basis=None)), plan.spec):
            raise SettingsError(_OTHER_FACTORS)
        return sums

    @cached_property
    @without_autocast()  # what builds a model may train it
    def model(self) -> nn.Module:
        """The run's model with the run's own weights, in eval mode, on the device."""
        model = run_weights.load_run_model(self.config, self.store, self.plan).to(self.device)
        check_model(self.store, self.plan, model, f"what --model builds on {self.where}")
        return model

    @property
    def where(self) -> str:
        """This process, in a person's words."""
        return f"node {provenance.node()}"

    @cached_property
    def la(self) -> Any:
        """A Laplace object that has seen one example and can accumulate sums.

        Raises:
            SettingsError: Its sums are not those of the plan.
        """
        la = initialized(
            self.plan.settings, self.model, self.split("train", self.window.plan.data), Collate.of(self.config)
        )
        if not same_sums(plain(la.sums_spec()), self.plan.spec):
            raise SettingsError(_OTHER_FACTORS)
        return la

    def posterior(self, version: str, tuning: str | None = None) -> Any:
        """Return a posterior version as a fitted object, with a tuning's prior if given; only the last one is kept."""
        if self._posterior is None or self._posterior[0] != (version, tuning):
            self._posterior = None
            la = posterior.build(self.store, self.plan, self.model, version)
            if tuning is not None:
                tunings.apply_tuning(self.store, la, tuning)
            self._posterior = (version, tuning), la
        return self._posterior[1]

    def split(self, name: str, wanted: Mapping[str, Any]) -> Any:
        """Return a split of the data set, compared with the driver's when it is first opened.

        Args:
            name: Of the split.
            wanted: Its fingerprint, as the driver has it.

        Raises:
            SettingsError: It is another one here.
        """
        if name not in self._splits:
            found = sources.load_split(self.config, name)
            check_data(found, wanted, name, self.where, Collate.of(self.config))
            if "weights" in wanted:
                example_weights.check_same(found, wanted["weights"], self.where)
            self._splits[name] = found
        return self._splits[name]

    def unchecked_training_data(self, window: str) -> Any:
        """Return the training split of a window, compared with nothing; the last one is kept.

        That of the first window is what the settings name, that of another one what its own settings do.
        """
        if self._unchecked is None or self._unchecked[0] != window:
            place = place_of(self.store, self.plan, window)
            config = self.config if place is self.store else data_of(self.config, place)
            self._unchecked = window, sources.load_split(config, "train")
        return self._unchecked[1]

    def batches(self, split: str, data: Mapping[str, Any], start: int, stop: int, digest: Any = None) -> Any:
        """Yield `(offset, x, y)` for a contiguous range of a split, on the device; see `weighted_batches`."""
        for offset, x, y, _ in self.weighted_batches(split, data, start, stop, digest):
            yield offset, x, y

    def weighted_batches(
        self,
        split: str,
        data: Mapping[str, Any],
        start: int,
        stop: int,
        digest: Any = None,
        examples: ExampleDigests | None = None,
    ) -> Any:
        """Yield `(offset, x, y, weights)` for a contiguous range of a split, on the device; weights are None if there are none.

        Args:
            split: Name of the split.
            data: Its fingerprint, as the driver has it.
            start: First example.
            stop: One past the last example.
            digest: A hash of `hashlib` that is to see the very bytes that are handed out.
            examples: What is to see each example of them.
        """
        named, weights = data.get("weights"), None
        if named is not None:
            weights = example_weights.read(self.split(split, data), named["name"], start, stop, split)
            if digest is not None:
                feed(digest, weights)
        for offset, x, y in self._reader(split, data).batches(start, stop):
            if digest is not None:
                feed(digest, (x, y))
            if examples is not None:
                examples.add(x, y)
            own = None if weights is None else weights[offset - start : offset - start + len(y)]
            yield offset, to_device(x, self.device), to_device(y, self.device), own

    def close(self) -> None:
        """End the processes that read ahead."""
        if self._reading is not None:
            self._reading[1].close()
            self._reading = None

    def _reader(self, split: str, data: Mapping[str, Any]) -> ReadAhead:
        """Return what reads a split; of several splits only the last one's processes are kept."""
        if self._reading is None or self._reading[0] != split:
            self.close()
            config = self.config
            reader = ReadAhead(
                self.split(split, data),
                as_halved(config, self.plan).batch_size,
                Collate.of(config),
                workers=config.loader_workers,
                threads=config.threads_per_worker,
                pin=self.device.type == "cuda",
            )
            self._reading = split, reader
        return self._reading[1]


def initialized(settings: Mapping[str, Any], model: nn.Module, dataset: Any, collate: Collate = loader.DEFAULT) -> Any:
    """Build the Laplace object and let it look at one example, which tells it the outputs and the last layer.

    Raises:
        ValueError: The core library does not have this combination of settings, or cannot use the model.
    """
    la = posterior.new_laplace(settings, model)
    x, _ = loader.read_batch(dataset, 0, 1, collate)
    x = x + x if isinstance(x, list | tuple) else x  # of strings: the core library doubles only what it can stack
    la.initialize(to_device(x, next(model.parameters()).device))
    return la


def _basis_of(plan: Plan, factors: Collection[str]) -> set[str]:
    """Return the arrays of a second pass's basis that some of its factors are added up in."""
    blocks = SumsSpec.from_json(plan.spec).blocks
    return {name for block in blocks if block.factors[0] in factors for name in block.basis}


def plain(spec: Any) -> dict[str, Any]:
    """Return the specification of the sums as it looks after a trip through JSON."""
    return json.loads(json.dumps(spec.to_json()))
