"""What driver and workers must agree on before a number is added: data, model code, plan, device; and what is recorded."""

from __future__ import annotations

import uuid
from dataclasses import replace

import dist_cases
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import laplace_dist
from laplace.data.calling import adapted
from laplace.data.nested import parts
from laplace.likelihoods import BaseLikelihood, Categorical, WeightedCategorical
from laplace_dist import load_posterior
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.job import evaluate_posterior, tune_posterior
from laplace_dist.plan.identity import SAMPLE, check_data, fingerprint
from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, lifecycle, partial_manifests, probe
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.law import check_law, law_of
from laplace_dist.run.probe import check_probe, make_probe, open_probe, probe_digest
from laplace_dist.stages.context import Context
from laplace_dist.stages.map import MapSegment

ACTIVATION, CHANGED, LOADS, FORMULA = [nn.Tanh], [], [], [1.0]


def activated() -> nn.Module:
    """Return a network whose code somebody edits: names, shapes and weights stay."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), ACTIVATION[0](), nn.Linear(5, 3)).eval()


def noisy() -> nn.Module:
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), Noise(), nn.Linear(5, 3)).eval()


def unseeded(split: str) -> TensorDataset:
    """Return another random half each time, as `random_split` without a generator does."""
    x, y = dist_cases.tensors(split)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(LOADS)))
    LOADS.append(split)
    return TensorDataset(x[chosen], y[chosen])


def long(split: str, n: int = 640) -> TensorDataset:
    """Return a set with more examples than are sampled; those that the test names are changed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2)
    for index in CHANGED:
        x[index] += 1
    return TensorDataset(x, y)


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    ACTIVATION[:], CHANGED[:], LOADS[:], FORMULA[:] = [nn.Tanh], [], [], [1.0]


def config(path, **changes):
    return dist_cases.config(path, **{"segment_size": 64, "batch_size": 32, **changes})


def long_run(path, **changes):
    return config(path, data="test_identity:long", **changes)


# ------------------------------------------------------------------ data


def test_a_split_that_is_another_one_on_the_worker_is_refused(tmp_path):
    with pytest.raises(
        SettingsError, match=r"--data: the split 'train' on node .* has other contents.*of 44 sampled examples differ"
    ):
        dist_cases.run_inline(config(tmp_path, data="test_identity:unseeded"))
    assert Checkpoint(str(tmp_path)).list("partials") == []


@pytest.mark.parametrize("which", ["val", "test", "other"])
def test_the_splits_of_follow_on_stages_are_compared_too(tmp_path, monkeypatch, which):
    whole = {"skip_tune": False, "skip_evaluate": False, "ood": ["other"]}
    original = dist_cases.blobs
    calls = []

    def stale(split):
        calls.append(split)
        x, y = original(split).tensors
        late = split == which and calls.count(split) > 2  # the driver looks twice: at its start, and at the stage's
        return TensorDataset(x + late, y)

    monkeypatch.setattr(dist_cases, "blobs", stale)
    with pytest.raises(SettingsError, match=rf"the split '{which}' on node .* has other contents"):
        dist_cases.run_inline(dist_cases.config(tmp_path, **whole))


def test_another_length_and_the_differing_examples_are_named():
    wanted = fingerprint(long("train"))
    with pytest.raises(SettingsError, match="the split 'train' on node b has 639 examples, the driver's has 640"):
        check_data(TensorDataset(*long("train")[:639]), wanted, "train", "node b")
    CHANGED.append(639)
    with pytest.raises(SettingsError, match=r"1 of 64 sampled examples differ \(639\)"):
        check_data(long("train"), wanted, "train", "node b")


class Flipping(Dataset):
    """Gives one example differently every second time."""

    def __init__(self, at):
        self.at, self.reads = at, 0

    def __len__(self):
        return 640

    def __getitem__(self, index):
        self.reads += index == self.at
        return torch.full((2,), float(index + (index == self.at and self.reads % 2))), 0


def test_every_sampled_example_is_read_twice():
    sampled = [i * 639 // (SAMPLE - 1) for i in range(SAMPLE)]
    for at in sampled:
        with pytest.raises(SettingsError, match=f"example {at} of split 'train' differs between two readings"):
            fingerprint(Flipping(at))


def test_two_attempts_that_have_read_other_data_stop_the_run_and_name_both_nodes(tmp_path):
    """The block that differs lies between the sampled examples; the digest of what was read tells."""
    chosen = long_run(tmp_path)
    with dist_cases.inline_job(chosen) as job:
        job.open()
        task = MapSegment(job.plan.digest, job.plan.segments[3])
        assert Context(chosen).carry_out(task)["won"]
        CHANGED.extend(range(193, 200))
        with pytest.raises(
            RunFailed, match=r"segment 000003 \(examples 192 to 255\): node .*has read other data than node"
        ):
            Context(chosen).carry_out(task)
    manifest = partial_manifests.read_manifest(Checkpoint(str(tmp_path)), job.plan, job.plan.segments[3])
    assert manifest["environment"]["torch"] == torch.__version__ and manifest["environment"]["threads"] == 1


def test_a_resumed_run_compares_three_committed_segments_with_the_data(tmp_path):
    chosen = long_run(tmp_path)
    with dist_cases.inline_job(chosen) as job:
        job.open()
        for segment in job.plan.segments[:5]:
            Context(chosen).carry_out(MapSegment(job.plan.digest, segment))
    CHANGED.append(130)  # of the third segment, between the sampled ones
    with pytest.raises(RunFailed, match=r"segment 000002 \(examples 128 to 191\).*other data"):
        dist_cases.run_inline(chosen)
    CHANGED.clear()
    dist_cases.run_inline(chosen)


# ------------------------------------------------------------------ code


def test_edited_model_code_is_refused_wherever_the_run_is_met(tmp_path):
    chosen = dist_cases.config(tmp_path, model="test_identity:activated", skip_tune=False, skip_evaluate=False)
    with dist_cases.inline_job(chosen) as job:
        job.open()
        Context(chosen).carry_out(MapSegment(job.plan.digest, job.plan.segments[0]))
        ACTIVATION[0] = nn.ReLU
        with pytest.raises(SettingsError, match="what --model builds on node .* is not the model of the run"):
            Context(chosen).carry_out(MapSegment(job.plan.digest, job.plan.segments[1]))
    with pytest.raises(
        SettingsError, match="what --model builds here is not the model of the run.*outputs on the same inputs"
    ):
        dist_cases.run_inline(chosen)
    ACTIVATION[0] = nn.Tanh
    dist_cases.run_inline(chosen)
    ACTIVATION[0] = nn.ReLU
    with pytest.raises(SettingsError, match="the given model is not the model of the run"):
        load_posterior(str(tmp_path), activated())
    for job in (tune_posterior, evaluate_posterior):
        with pytest.raises(SettingsError, match="is not the model of the run"):
            job(chosen.model_copy(update={"seed": 7}), executor=laplace_dist.Inline)
    ACTIVATION[0] = nn.Tanh
    assert load_posterior(str(tmp_path), activated().train()).n_data == dist_cases.N


def test_a_model_that_is_random_in_eval_mode_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        SettingsError, match="The model is random in evaluation mode: .* gives two outputs for one input"
    ):
        dist_cases.run_inline(dist_cases.config(tmp_path / "run", model="test_identity:noisy"))
    assert not (tmp_path / "run" / "plan.json").exists()


def waiting():
    return Waiting()


class Waiting(BaseLikelihood):
    """A likelihood of one's own, whose formula is edited."""

    def nll(self, f, y):
        return (FORMULA[0] * y[:, None] * f.exp() - f).sum(-1)

    def draw(self, f, u):
        return (-torch.log1p(-u) * (-f).exp() * FORMULA[0])[:, 0]


@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
def test_an_edited_likelihood_is_refused_wherever_the_run_is_met(tmp_path, estimator):
    """Its name and settings are what they were: with the rest of the segments, the sum would be of two formulas."""
    chosen = dist_cases.config(tmp_path, likelihood="test_identity:waiting", estimator=estimator)
    with dist_cases.inline_job(chosen) as job:
        job.open()
        Context(chosen).carry_out(MapSegment(job.plan.digest, job.plan.segments[0]))
        FORMULA[0] = 3.0
        with pytest.raises(
            SettingsError, match="what --model builds on node .* what 'test_identity:waiting' makes there"
        ):
            Context(chosen).carry_out(MapSegment(job.plan.digest, job.plan.segments[1]))
    with pytest.raises(SettingsError, match="--likelihood: .* the loss of the same outputs differs by .* of its size"):
        dist_cases.run_inline(chosen)
    FORMULA[0] = 1.0
    dist_cases.run_inline(chosen)
    FORMULA[0] = torch.ones(7)
    with pytest.raises(SettingsError, match="the given model is the run's, but .* it fails on the run's examples"):
        load_posterior(str(tmp_path), dist_cases.convnet())


def test_a_likelihood_whose_curvature_alone_was_edited_is_refused(tmp_path, monkeypatch):
    chosen = dist_cases.config(tmp_path, likelihood="test_identity:waiting")
    dist_cases.run_inline(chosen)
    monkeypatch.setattr(Waiting, "root_columns", lambda self, f, y: iter([torch.ones_like(f)]))
    with pytest.raises(SettingsError, match="the curvature in the outputs of the same outputs differs"):
        load_posterior(str(tmp_path), dist_cases.convnet())


NESTED = [
    lambda n: torch.arange(3.0 * n).reshape(n, 3),
    lambda n: {"a": torch.arange(3.0 * n).reshape(n, 3), "names": ["x", None, True, 1.5]},
    lambda n: parts([torch.arange(3 * n).reshape(n, 3), {"b": [torch.ones(n, 3, dtype=torch.float64)]}]),
]


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, more=None):
        x = x["a"] if isinstance(x, dict) else x
        return self.layer(x if more is None else (x + more["b"][0]).float())


@pytest.mark.parametrize("batch", NESTED)
def test_a_probe_keeps_nested_inputs_and_knows_its_model(batch):
    model = adapted(Takes())
    content = make_probe(model, batch, 4)
    check_probe(content, probe_digest(content), model, "probe", "it")
    with torch.no_grad():
        model.layer.weight[0, 0] += 0.1
    with pytest.raises(SettingsError, match="it is not the model of the run: its outputs on the same inputs differ by"):
        check_probe(content, probe_digest(content), model, "probe", "it")
    model.layer = nn.Linear(3, 4)
    with pytest.raises(SettingsError, match=r"outputs of shape \(4, 4\), the run's \(4, 2\)"):
        check_probe(content, probe_digest(content), model, "probe", "it")
    model.layer = nn.Linear(7, 4)
    with pytest.raises(SettingsError, match="it fails on the run's inputs"):
        check_probe(content, probe_digest(content), model, "probe", "it")
    with pytest.raises(CheckpointError, match="probe is truncated or altered"):
        check_probe(content[:-1], probe_digest(content), model, "probe", "it")


class PerWord(nn.Module):
    """Logits of every word, and at padding whatever `filled` says, as implementations of attention differ there."""

    def __init__(self, filled=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.filled = nn.Linear(1, 3), filled

    def forward(self, x):
        return torch.where((x > 0)[..., None], self.layer(x[..., None]), self.filled)


def test_outputs_at_positions_that_do_not_count_are_not_compared():
    x = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0], [4.0, 5.0, 6.0], [0.0, 7.0, 8.0]])
    y = torch.where(x > 0, 1, -100)
    law = lambda count, outputs: {"targets": y[:count]}  # noqa: E731
    content = make_probe(PerWord(), lambda n: x[:n], 4, law)
    counts, how = WeightedCategorical(ignore_index=-100).counts, (content, probe_digest(content))
    check_probe(*how, PerWord(9.0), "probe", "it", counts)
    with pytest.raises(SettingsError, match=r"its outputs on the same inputs differ .*such as attn_implementation"):
        check_probe(*how, PerWord(9.0), "probe", "it")
    other = PerWord(9.0)
    with torch.no_grad():
        other.layer.weight *= 1.1
    with pytest.raises(SettingsError, match="its outputs on the same inputs differ"):
        check_probe(*how, other, "probe", "it", counts)


def test_padding_is_not_compared_of_outputs_that_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(probe, "MOST", 8)
    test_outputs_at_positions_that_do_not_count_are_not_compared()


def test_a_rounding_of_the_outputs_is_no_other_model():
    model = Takes()
    content = make_probe(model, NESTED[0], 4)
    with torch.no_grad():
        model.layer.weight *= 1 + 1e-5
    check_probe(content, probe_digest(content), model, "probe", "it")


class Vocabulary(nn.Module):
    """As many outputs as a language model has."""

    def __init__(self, words=5000, positions=300):
        super().__init__()
        self.table = nn.Parameter(torch.randn(words, 3, generator=torch.Generator().manual_seed(0)))
        self.positions, self.slope = positions, 0.1

    def forward(self, x):
        places = torch.linspace(0.5, 1, self.positions)[:, None]
        return nn.functional.leaky_relu(x[:, None] * places @ self.table.T, self.slope)


def judged(count, outputs):
    y = torch.zeros(outputs.shape[:-1], dtype=torch.int64)
    return law_of(Categorical(), outputs, y[:count], "ggn")


def test_little_is_kept_of_the_outputs_of_a_language_model():
    model = Vocabulary()
    content = make_probe(model, NESTED[0], 4, judged)
    assert len(content) < 5 * 2**20  # 6 MB each are the outputs of an example
    probe = open_probe(content, probe_digest(content), "probe")
    assert probe.shape == (1, 300, 5000) and len(probe.outputs) <= 1 << 20 and len(probe.inputs) == 1
    every = torch.arange(300 * 5000)[:: -(-300 * 5000 // len(probe.outputs))]
    assert set((every % 5000).tolist()) == set(range(5000)) and set((every // 5000).tolist()) == set(range(300))
    check_probe(content, probe_digest(content), model, "probe", "it")
    check_law(probe.law, probe.judged, Categorical(), "classification", "ggn", "it")
    with pytest.raises(SettingsError, match="the loss of the same outputs differs"):
        check_law(probe.law, probe.judged, WeightedCategorical(label_smoothing=0.1), "classification", "ggn", "it")
    model.slope = 0.2  # an edited activation
    with pytest.raises(SettingsError, match="its outputs on the same inputs differ by"):
        check_probe(content, probe_digest(content), model, "probe", "it")
    model.slope, model.positions = 0.1, 299
    with pytest.raises(SettingsError, match=r"outputs of shape \(1, 299, 5000\), the run's \(1, 300, 5000\)"):
        check_probe(content, probe_digest(content), model, "probe", "it")


# ------------------------------------------------------------------ plan, device, place


def test_a_task_of_another_plan_is_refused(tmp_path):
    """Another driver has started anew under the same checkpoint: its run is not this worker's."""
    with dist_cases.inline_job(dist_cases.config(tmp_path, estimator="ef")) as late:
        late.open()
    dist_cases.run_inline(dist_cases.config(tmp_path, fresh=True))
    before = Checkpoint(str(tmp_path)).list()
    with pytest.raises(SettingsError, match="another job has begun a run there meanwhile"):
        Context(late.config).carry_out(MapSegment(late.plan.digest, late.plan.segments[0]))
    assert Checkpoint(str(tmp_path)).list() == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"device": "cuda"}, "--gpus-per-worker: got 0 with --device cuda"),
    ({"device": "cpu", "gpus_per_worker": 1.0}, "--gpus-per-worker: got 1 with --device cpu"),
])  # fmt: skip
def test_devices_that_contradict_each_other_are_refused(tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        dist_cases.run_inline(dist_cases.config(tmp_path / "run", **changes))


def test_the_device_of_a_run_is_that_of_its_beginning(tmp_path, monkeypatch):
    """A cluster that has no GPUs yet, or none any more, does not change what the run computes on."""
    chosen = dist_cases.config(tmp_path, gpus_per_worker=None)
    monkeypatch.setattr("laplace_dist.execution.inline.Inline.device_type", lambda self: "cpu")
    dist_cases.run_inline(chosen)
    monkeypatch.setattr("laplace_dist.execution.inline.Inline.device_type", lambda self: "cuda")
    with dist_cases.inline_job(chosen) as job:
        assert job.device_type == "cpu"
    with dist_cases.inline_job(chosen.model_copy(update={"device": "cuda"})) as job:
        with pytest.raises(SettingsError, match="--device: stored 'cpu', now 'cuda'"):
            job.open()


def test_a_file_system_that_overwrites_in_create_mode_is_refused_by_name(tmp_path, monkeypatch):
    original = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, mode="overwrite", **k: original(self, path, value)
    )
    url = f"memory://{uuid.uuid4().hex}/run"
    with pytest.raises(SettingsError, match="MemoryFileSystem let a create-only write overwrite an object"):
        dist_cases.run_inline(dist_cases.config(url))
    assert Checkpoint(url).list() == []


def test_everything_committed_says_where_it_was_made_and_verify_lists_it(tmp_path):
    once = {"grid_size": 5, "prior_range": [1e-4, 1e4]}  # one round
    dist_cases.run_inline(dist_cases.config(tmp_path, skip_tune=False, skip_evaluate=False, **once))
    store = Checkpoint(str(tmp_path))
    kinds = {"partials": 6, "parts": 1, "tuning": 4, "evaluation": 4}
    for folder, count in kinds.items():
        keys = [key for key in store.list(folder) if layout.MANIFEST.fullmatch(key) and key != layout.METRICS]
        assert len(keys) == count
        for key in keys:
            assert open_json(store.read(key), key)["environment"]["torch"] == torch.__version__, key
    report = laplace_dist.verify(str(tmp_path))
    assert report.ok and list(report.environments.values()) == [sum(kinds.values())]
    assert f"torch {torch.__version__}" in next(iter(report.environments))


def test_a_plan_of_the_first_format_is_compared_by_what_it_has():
    plan = Plan((), {"seed": 0}, {"length": 4, "sha256": "d"}, "w", {"path": "m", "args": {}}, {}, format_version=1)
    assert "probe" not in plan.to_values()
    now = replace(plan, format_version=2, probe="p", settings={"seed": 0, "precision": "float32"})
    lifecycle._refuse_another_plan(Checkpoint("x"), plan, now)
    with pytest.raises(SettingsError, match="--seed: stored 0, now 1"):
        lifecycle._refuse_another_plan(Checkpoint("x"), plan, replace(now, settings={"seed": 1}))
