"""A training by empirical Bayes as a job: workers find gradients and curvature, the driver takes steps and commits epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from laplace.empirical_bayes import Hyperparameters, PartOfBatch, is_estimated, refuse_changing_buffers, step
from laplace.linalg.dense import parameter_vector
from laplace.linalg.memory import free_bytes
from laplace.structures.sums import CurvatureSums
from laplace_dist.config.compatibility import check_training
from laplace_dist.config.given import check_given
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.config.training import Training
from laplace_dist.data import loader
from laplace_dist.data.collate import Collate
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution.session import ExecutorType, Stage
from laplace_dist.fit_stages import FitStages
from laplace_dist.plan.groups import plan_groups
from laplace_dist.plan.worker_memory import too_large
from laplace_dist.report.progress import Progress
from laplace_dist.run import layout, place, trained, training, weights
from laplace_dist.run.training import Epoch
from laplace_dist.stages import opening, resolving
from laplace_dist.stages.context import plain
from laplace_dist.stages.train import Curvature, Gradient, InOrder, bytes_of
from laplace_dist.stages.weights_steps import check_schedule, optimizer_of, schedule_of

_INSTEAD = (
    "Use --hessian-structure diag, freeze wide layers, lower --num-workers where they share a machine, or use a larger one. A "
    "training cannot divide its sums into module groups, since the evidence is of all weights at once; a fit of weights that "
    "are trained already can (jobs/fit_kron.py)."
)


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind.

    Attributes:
        checkpoint: Directory or URL of the run.
        margliks: Negative evidences before every step on the hyperparameters.
        losses: Mean training loss of every epoch.
        best_epoch: The epoch with the best evidence, or None if it was never estimated.
        weights: Path or URL of the weights: of the best epoch, else of the last one.
        report: Path or URL of the page that shows it, or None if there is none.
    """

    checkpoint: str
    margliks: list[float]
    losses: list[float]
    best_epoch: int | None
    weights: str
    report: str | None = None


def marglik_train(config: Config, settings: Training | None = None, executor: ExecutorType | None = None) -> Trained:
    """Train weights and hyperparameters together, as `laplace.marglik_training` does, on a pool of workers.

    Every epoch is committed: weights, optimizers, hyperparameters and evidences. Running it again continues after the last one,
    with the same bits, for any number of workers.

    Args:
        config: The settings of every job.
        settings: Those of the training; the defaults if not given.
        executor: Where the tasks are carried out, such as `Inline`; what `--ray-address` says if not given.

    Raises:
        SettingsError: The settings or the state are refused; nothing was changed.
        RunFailed: The training diverges, or the run cannot go on; every committed epoch is kept.
        CheckpointError: An object of the checkpoint is missing, truncated or altered.
    """
    check_given(config, executor, settings)
    own = {"skip_tune": True, "skip_evaluate": True}
    with MarglikJob(config.model_copy(update=own), executor, "marglik_train", settings=settings or Training()) as job:
        job.open()
        return job.train()


@dataclass
class MarglikJob(FitStages):
    """The stages of a training over one checkpoint.

    Attributes:
        settings: Of the training.
    """

    settings: Training = field(default_factory=Training)

    def open(self) -> None:
        """Resolve model, data and factors once, and begin the training or continue the one that is there."""
        store, own = self.store, self.settings
        check_training(self.config)
        place.check_place(store)
        stored = self.plan.settings if store.exists(layout.PLAN) and not self.config.fresh else None
        with torch.random.fork_rng():
            # a model that draws its first weights draws the same ones when it goes on
            torch.manual_seed(self.config.seed)
            resolved = resolving.resolve(self.config, stored)
        self.config = config = resolved.config
        self.la, self._train = resolved.la, resolved.train
        self._check(resolved.model)
        store.check_writable()
        if stored is None:
            self.session.executor.admit(self.device_type)
            self._refuse_too_large(resolved)
        bits = own.bits(config.prior_structure)
        self.plan, there = opening.begin(resolved, config, store, self.device_type, self.say, bits)
        self.say(f"{'continuing' if there else 'starting'} the training at {store.url}")
        self._history = training.epochs(store, self.plan)
        if self._history:
            self._load(self._history[-1])

    def _refuse_too_large(self, resolved: resolving.Resolved) -> None:
        """Refuse sums that a worker has no memory for, or the driver, before anything is begun."""
        config, spec, free = self.config, plain(resolved.la.sums_spec()), free_bytes("cpu")
        memory = self.session.executor.memory(self.device_type)
        if why := too_large(spec, resolved.model_bytes, memory, instead=_INSTEAD):
            raise SettingsError(f"--hessian-structure: got {config.hessian_structure!r}, but {why}")
        sums = plan_groups(spec, 1)[0].nbytes
        needed = resolved.model_bytes + 2 * sums  # the total, and a segment's that is added to it
        if free is not None and needed > free:
            raise SettingsError(
                f"--hessian-structure: got {config.hessian_structure!r}, but a training needs at least {needed:,} bytes in the "
                f"driver, {2 * sums:,} of them for the curvature of all weights and a segment's that is added to it, and "
                f"{free:,} are free here. {_INSTEAD}"
            )

    def _check(self, model: nn.Module) -> None:
        """Refuse what would fail after an epoch: priors, optimizers, models that keep statistics of batches."""
        own, law = self.settings, likelihood_of(self.config.likelihood)
        try:
            refuse_changing_buffers(
                model, loader.read_batch(self._train, 0, min(2, len(self._train)), Collate.of(self.config))[0]
            )
            self.la.temperature = own.temperature
            self._set_initial()
            self.hyper = Hyperparameters(self.la, law.has_noise and not own.fix_sigma_noise, own.lr_hyp)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self._begin_steps(0)
        check_schedule(own, own.n_epochs * math.ceil(len(self._train) / self.config.batch_size))

    def _set_initial(self) -> None:
        """Give the posterior the initial noise and prior."""
        own = self.settings
        try:
            self.la.sigma_noise = own.sigma_noise_init
        except ValueError as error:
            raise SettingsError(f"--sigma-noise-init: got {own.sigma_noise_init:g}; {error}") from error
        try:
            self.la.prior_precision = self.la.initial_prior_precision(own.prior_prec_init, self.config.prior_structure)
        except ValueError as error:
            raise SettingsError(f"--prior-prec-init: got {own.prior_prec_init:g}; {error}") from error

    def _begin_steps(self, steps: int) -> None:
        """Make the optimizer of the weights, and the schedule of its step size after so many steps."""
        self.optimizer = optimizer_of(self.settings, self.la.params)
        self.schedule = schedule_of(self.settings, self.optimizer, steps)

    # -------------------------------------------------------------- the epochs

    def train(self) -> Trained:
        """Go through the epochs that are left, and put the best weights where others find them."""
        own, done = self.settings, len(self._history)
        if done < own.n_epochs:
            progress = Progress("train", "epochs", own.n_epochs, done)
            with self.session.stage(self.device_type, progress, self.plan.digest) as stage:
                while len(self._history) < own.n_epochs:
                    self._epoch(stage, len(self._history) + 1)
                    stage.done({"examples": self.plan.n_examples})
        return self._result()

    def _epoch(self, stage: Stage, number: int) -> None:
        """Train for an epoch, estimate the evidence if it is time, and commit."""
        own, total = self.settings, 0.0
        for start, stop in self._batches(number):
            parts = [_part(found) for found in self._round(stage, self._gradients(number, start, stop))]
            loss = step(self.la, self.optimizer, parts, self.plan.n_examples)
            if self.schedule is not None:
                self.schedule.step()
            if not math.isfinite(loss):
                raise RunFailed(
                    f"the training loss is {loss} at examples {start} to {stop - 1} in epoch {number}: it diverges. Begin "
                    "again elsewhere with a smaller lr in --optimizer-args, or with --fresh."
                )
            total += loss * (stop - start)
        margliks: list[float] = []
        best = (self._history[-1].best, self._history[-1].best_epoch) if self._history else (None, None)
        if is_estimated(number, own.n_epochs_burnin, own.marglik_frequency):
            self._estimate_sums(stage, number)
            try:
                margliks = self.hyper.climb(own.n_hypersteps, number)
            except ValueError as error:
                raise RunFailed(f"{error} Begin again elsewhere with these, or with --fresh.") from error
            if best[1] is None or margliks[-1] < self._history[best[1] - 1].margliks[-1]:
                best = trained.write_posterior(self.store, self.plan, self.la), number
        hyper = trained.hyper_of(self.la)
        if margliks:
            self.hyper.apply()
        state = trained.write_state(self.store, self.plan, self.la, self.optimizer, self.hyper)
        epoch = Epoch(number, total / self.plan.n_examples, tuple(margliks), state, *best, hyper)
        if not training.commit_epoch(self.store, self.plan, epoch):  # another driver was first
            self._history = training.epochs(self.store, self.plan)
            self._load(self._history[-1])
            return
        self._history.append(epoch)
        training.drop_files(self.store, self._history)

    def _batches(self, number: int) -> list[tuple[int, int]]:
        """Return the ranges of an epoch's batches in their order."""
        size, length = self.config.batch_size, self.plan.n_examples
        ranges = [(start, min(start + size, length)) for start in range(0, length, size)]
        if not self.settings.shuffle:
            return ranges
        generator = torch.Generator().manual_seed(self._seed(number, 0))
        return [ranges[i] for i in torch.randperm(len(ranges), generator=generator).tolist()]

    def _gradients(self, number: int, start: int, stop: int) -> Iterator[Gradient]:
        """Yield a task for every part of a batch."""
        vector = bytes_of(parameter_vector(self.la.params))
        size = math.ceil((stop - start) / self.settings.parts)
        for i, first in enumerate(range(start, stop, size)):
            seed = self._seed(number, first + 1)
            yield Gradient(self.plan.digest, i, number, first, min(first + size, stop), seed, vector)

    def _seed(self, epoch: int, place: int) -> int:
        return (self.config.seed * 1_000_003 + epoch) * 1_000_000_007 + place & (1 << 63) - 1

    def _estimate_sums(self, stage: Stage, number: int) -> None:
        """Sum the curvature at the weights of now, in plan order, and give it to the posterior."""
        vector = bytes_of(parameter_vector(self.la.params))
        tasks = (Curvature(self.plan.digest, i, number, s, vector) for i, s in enumerate(self.plan.segments))
        total = InOrder(self._added)
        stage.carry_out(tasks, each=total.take, keep=False)
        total.value.estimator = self.la.backend.estimator
        try:
            self.la.set_sums(total.value)
        except ValueError as error:
            raise RunFailed(f"epoch {number}: {error}") from error

    def _added(self, total: CurvatureSums | None, found: Mapping[str, Any]) -> CurvatureSums:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in found["tensors"].items()}
        sums = CurvatureSums.from_tensors(self.la.sums_spec(), tensors, found["n_data"], own=True)
        return sums if total is None else total.merge(sums)

    def _round(self, stage: Stage, tasks: Iterable[Any]) -> list[Mapping[str, Any]]:
        """Carry out some tasks and return their receipts in the order of the tasks."""
        return sorted(stage.carry_out(tasks), key=lambda receipt: receipt["number"])

    # -------------------------------------------------------------- states

    def _load(self, epoch: Epoch) -> None:
        self._begin_steps(epoch.number * len(self._batches(epoch.number)))
        trained.read_state(self.store, epoch.state, self.la, self.optimizer, self.hyper)

    def _result(self) -> Trained:
        """Write the weights of the best epoch, else of the last one, for other jobs, and say what there is."""
        last = self._history[-1]
        margliks = [value for epoch in self._history for value in epoch.margliks]
        if last.best is not None:
            trained.read_posterior(self.store, self.plan, last.best, self.la)
        training.write_trained(self.store, self.plan, weights.dump_weights(self.la.model))
        place = f"{self.store.url.rstrip('/')}/{layout.TRAINED}"
        losses = [epoch.loss for epoch in self._history]
        return Trained(self.store.url, margliks, losses, last.best_epoch, place, self.report())


def _part(found: Mapping[str, Any]) -> PartOfBatch:
    return PartOfBatch(found["loss"], found["factor"], torch.from_numpy(found["gradient"].copy()), found["n"])
