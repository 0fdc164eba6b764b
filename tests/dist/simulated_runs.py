"""Whole runs in miniature: the real job and stages over a model of one layer, and scores that are made up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from given_weights import Given
from torch import nn

from laplace.capture.blocks import Block
from laplace.likelihoods.categorical import Categorical
from laplace.structures.registry import SECOND_PASSES
from laplace.structures.specification import Factor, SumsSpec
from laplace_dist.config.settings import Config
from laplace_dist.execution.failures import event_of
from laplace_dist.execution.raised import Raised, outcome_of
from laplace_dist.execution.session import Session
from laplace_dist.execution.tasks import Event
from laplace_dist.job import Job
from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.report.progress import Progress
from laplace_dist.run import evaluations, layout, lifecycle, ownership, place, pointer, tunings, versions
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.combination import Window
from laplace_dist.run.leases import Lease
from laplace_dist.run.probe import make_probe
from laplace_dist.run.provenance import environment
from laplace_dist.run.weights import dump_weights, weights_digest
from laplace_dist.stages.context import Context, plain

torch.manual_seed(0)
MODEL = nn.Linear(3, 2).eval()
WEIGHTS, DIGEST = dump_weights(MODEL), weights_digest(MODEL)
PROBE = make_probe(MODEL, lambda n: torch.ones(n, 3), 4)
CONFIG = Config(model="m:f", data="m:d", checkpoint="/simulated", device="cpu")
SPEC = {
    "structure": "kron",
    "dtype": "float32",
    "factors": {"w/A": {"shape": [3, 3], "symmetric": True}, "b": {"shape": [2], "symmetric": False}},
}
SHARDS = ("000000", "000001")
TWO_PASSES = 2  # the kind of run whose structure takes a second pass, in a basis that the first one's sum gives
FIRST = SumsSpec(
    "lowrank-sketch", (Block("w", (6,), None, ("sketch",), "made up"),), {"sketch": Factor((6, 2))}, "float32", 1
)
LAW = SECOND_PASSES["lowrank"]


@cache
def _plan(kind: int) -> Plan:
    """Return what a command of a kind asks for; kinds differ in their seed, and so in every number, and in their length."""
    two = kind == TWO_PASSES
    settings = {"batch_size": 4, "segment_size": 4, "hessian_structure": "lowrank" if two else "kron", "seed": kind}
    given = {
        "data": {"length": 8 if kind else 12, "sha256": "d"},
        "weights": DIGEST,
        "model": {"path": "m:f", "args": {}},
    }
    further = {"name": LAW.name, "spec": plain(LAW.spec(FIRST))} if two else None
    return build_plan(settings, **given, spec=plain(FIRST) if two else SPEC, further=further)


def batch(kind: int, start: int, basis: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return what four examples add to the sums: rounded differently in another order of adding."""
    generator = torch.Generator().manual_seed(100 * kind + start)
    loss = torch.tensor([0.1, 0.2, 0.3][start // 4] + kind, dtype=torch.float64)
    if kind == TWO_PASSES:
        rows = torch.randn(5, 6, generator=generator).double() * 10.0**start
        if basis is not None:
            return {"core": (rows @ basis["range"]).T @ (rows @ basis["range"]), "loss": loss}
        return {"sketch": rows.T @ rows[:, :2], "loss": loss}
    x = torch.randn(5, 3, generator=generator) * 10.0**start
    return {"w/A": x.T @ x, "b": torch.randn(2, generator=generator), "loss": loss}


@cache
def serial(kind: int) -> dict[str, bytes]:
    """Return the factors and the loss that one process finds."""
    basis = None
    if kind == TWO_PASSES:
        basis = {"range": LAW.find(FIRST, "range", {"sketch": torch.from_numpy(_summed(kind)["sketch"])}, 8)}
    loss = math.fsum(float(batch(kind, segment.start)["loss"]) for segment in _plan(kind).segments)
    found = {name: total.tobytes() for name, total in _summed(kind, basis).items()}
    return {**found, "loss": repr(loss).encode()}


def _summed(kind: int, basis: Mapping[str, torch.Tensor] | None = None) -> dict[str, np.ndarray]:
    sums = [batch(kind, segment.start, basis) for segment in _plan(kind).segments]
    found = {name: np.zeros(value.shape) for name, value in sums[0].items() if name != "loss"}
    for name in found:
        for part in sums:
            found[name] = found[name] + part[name].numpy().astype(np.float64)
    return found


def factors(store: Any, plan: Plan, version: str) -> dict[str, bytes]:
    """Return the factors and the loss of a posterior version, as `posterior.build` reads them."""
    manifest = versions.read_version(store, plan, version)
    places = manifest["factors"].items()
    found = {name: store.read_array(place["prefix"], name, place["entry"]).tobytes() for name, place in places}
    return {**found, "loss": repr(manifest["loss"]).encode()}


def load(store: Any) -> tuple[Plan, dict[str, bytes]]:
    """Do what `load_posterior` does, but for the model; returns the plan and the numbers."""
    plan = ownership.read_plan(store)
    current = pointer.read_current(store)
    found = factors(store, plan, current["version"])
    if current["tuning"] is not None:
        assert tunings.read_tuning(store, current["tuning"])[1].item() == 1 + kind_of(plan)
    return plan, found


def kind_of(plan: Plan) -> int:
    return plan.settings["seed"]


class _Sums:
    """Sums of the core library, as far as a worker looks at them."""

    n_data = 0

    def __init__(self, basis: Mapping[str, torch.Tensor] | None = None) -> None:
        self.basis, self.spec = basis, LAW.spec(FIRST)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors


class Worker(Context):
    """The real context, with data and curvature that are made up.

    Args:
        store: The client that the worker has.
    """

    def __init__(self, store: Any) -> None:
        super().__init__(CONFIG)
        self._plan: Plan | None = None
        self.__dict__["store"] = store
        self.__dict__["la"] = SimpleNamespace(zero_sums=_Sums, second_sums=_Sums, accumulate=self._accumulate)

    @property
    def plan(self) -> Plan:
        """The real one holds a lock of its class while it reads (Python 3.11), which other actors would wait for."""
        if self._plan is None:
            self._plan = ownership.read_plan(self.store)
        return self._plan

    def weighted_batches(self, split, data, start, stop, digest=None, examples=None):
        digest.update(b"%d" % start)
        yield start, None, [None] * (stop - start), None

    def _accumulate(self, sums, x, y, offset, example_weights):
        sums.tensors, sums.n_data = batch(kind_of(self.plan), offset, sums.basis), 4

    def posterior(self, version, tuning=None):
        """Read every factor, and return what a tuning is made of."""
        assert factors(self.store, self.plan, version) == serial(kind_of(self.plan))
        value = torch.tensor([1.0 + kind_of(self.plan)])
        return SimpleNamespace(
            prior_precision=value,
            likelihood_object=Categorical(),
            logit_temperature=1.0,
            log_marginal_likelihood=lambda: torch.tensor(2.0),
        )


@dataclass(frozen=True)
class Follow:
    """A task of tuning or evaluation: a shard's scores, or what is made of all of them."""

    plan: str
    version: str
    key: str
    stage: str
    shard: str = ""

    @property
    def what(self) -> str:
        return f"{self.stage} {self.shard or 'result'}"

    def run(self, context: Worker) -> dict[str, Any]:
        common, made = (context.store, context.plan), made_here()
        la = context.posterior(self.version)
        if self.stage == "tune" and self.shard:
            key = layout.tuning_shard_key(self.key, self.shard)
            tunings.commit_shard(*common, key, torch.tensor([1.0, 2.0], dtype=torch.float64), 4, made)
        elif self.stage == "tune":
            for shard in SHARDS:
                tunings.read_shard(context.store, layout.tuning_shard_key(self.key, shard))
            tunings.commit_tuning(*common, self.key, {"seed": 0}, la, SHARDS, environment=made)
        elif self.shard:
            key = layout.evaluation_shard_key(self.key, "test", self.shard)
            evaluations.commit_shard(*common, key, {"map/nll": np.ones(4)}, made)
        else:
            joined = evaluations.joined_scores(context.store, self.key, "test", list(SHARDS), "map")
            metrics = {"map": {"nll": float(joined["nll"].mean())}, "laplace": {"nll": 0.5}}
            chosen = {"tuning": layout.tuning_key(self.version, {"seed": 0})}
            evaluations.commit_evaluation(*common, self.key, chosen, {"test": list(SHARDS)}, metrics, made)
        return {}


@cache
def made_here() -> dict[str, Any]:
    return environment("cpu")


class MiniatureJob(Job):
    """The real job but for what needs a model and data: opening them, and the scores.

    Args:
        store: The driver's client.
        pool: Returns the workers.
        clock: Seconds.
        kind: Of the plan that the command asks for.
        run: Id of the run that it begins.
        fresh: Whether it deletes the run that is there.
        say: Where lines for people go.
    """

    def __init__(self, store, pool, clock, kind, run, fresh=False, say=lambda text: None):
        self.config, self.store, self.say = CONFIG, store, say
        executor = SimpleNamespace(pool=lambda *_: pool(), close=lambda: None)
        self.session = Session(CONFIG, store, lambda config, say: executor, say)
        self.session.lease = Lease(store, clock)
        # nothing depends on it, and its key is of the wall's clock
        self.journal = SimpleNamespace(end=lambda error: None, has_begun=False)
        self.kind, self.run_id, self.fresh = kind, run, fresh
        self._continued, self.__dict__["device_type"] = False, "cpu"

    def open(self) -> None:
        place.check_place(self.store)
        self.plan, self._continued = lifecycle.open_run(
            self.store,
            replace(_plan(self.kind), run=self.run_id),
            model=MODEL,
            weights=Given(WEIGHTS),
            probe=lambda: PROBE,
            config_yaml="seed: 0\n",
            fresh=self.fresh,
            say=self.say,
        )
        self.window = Window(self.store, self.plan)

    @property
    def at_work_on(self) -> str | None:
        """Digest of the plan that it works on, once it says that it is at work."""
        return self.plan.digest if self.session.lease._begun is not None else None

    def _stage(self, name: str, version: str, key: str, shard_key: Any) -> None:
        if ownership.has(self.store, self.plan, key):
            return
        left = [shard for shard in SHARDS if not ownership.has(self.store, self.plan, shard_key(shard))]
        common = self.plan.digest, version, key, name
        self._run([Follow(*common, shard) for shard in left], Progress(name, "shards", len(SHARDS)))
        self._run([Follow(*common)], Progress(name, "results", 1))

    def tune(self, version: str) -> str:
        key = layout.tuning_key(version, {"seed": 0})
        self._stage("tune", version, key, lambda shard: layout.tuning_shard_key(key, shard))
        pointer.write_current(self.store, self.plan, version, key)
        return key

    def evaluate(self, version: str, tuning: str | None) -> dict[str, dict[str, float]]:
        key = layout.evaluation_key(version, {"tuning": tuning})
        self._stage("evaluate", version, key, lambda shard: layout.evaluation_shard_key(key, "test", shard))
        metrics = open_json(self.store.read(key), key)["metrics"]
        ownership.confirm(self.store, self.plan)
        self.store.replace(layout.METRICS, evaluations.metrics_json(version, tuning, metrics))
        return metrics

    def whole(self) -> str:
        """Go through all stages; returns the posterior version."""
        with self:
            self.open()
            self.map()
            version = self.reduce()
            self.evaluate(version, self.tune(version))
            return version


class SerialPool:
    """One worker in this process to which nothing happens."""

    size, idle, alive = 1, 1, 1

    def __init__(self, store: Any) -> None:
        self._context, self._tasks = Worker(store), []

    @property
    def busy(self) -> int:
        return len(self._tasks)

    def top_up(self, wanted: int) -> None:
        pass

    def close(self) -> None:
        pass

    def submit(self, task: Any) -> None:
        self._tasks.append(task)

    def wait(self, seconds: float, limit: Any) -> list[Event]:
        tasks, self._tasks = self._tasks, []
        found = [(task, outcome_of(lambda task=task: self._context.carry_out(task))) for task in tasks]
        return [event_of(t, o) if isinstance(o, Raised) else Event(t, receipt=o, seconds=1.0) for t, o in found]
