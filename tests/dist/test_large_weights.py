"""Weights that do not lie in one file: written, read and verified shard by shard, without a copy of the whole."""

from __future__ import annotations

import json
import subprocess
import sys

import dist_cases
import pytest
import torch
from torch import nn

import laplace_dist
from laplace_dist import cli
from laplace_dist.data import weight_files
from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.run import weight_shards
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.weights import check_fit, load_model, weights_digest

INDEX = "weights.safetensors.index.json"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Store the convnet's 456 bytes in three shards: its largest tensor has 324."""
    monkeypatch.setattr(weight_shards, "SHARD_BYTES", 130)


def config(place, **changes):
    return dist_cases.config(place, **changes)


def shards_in(place):
    return sorted(path.name for path in place.glob("weights-*.safetensors"))


def fit(chosen):
    return laplace_dist.fit(chosen, executor=laplace_dist.Inline)


@pytest.fixture
def run(tmp_path):
    fit(config(tmp_path / "run"))
    return tmp_path / "run"


def test_a_run_with_shards_is_the_run_with_one_file(run, tmp_path, monkeypatch):
    assert len(shards_in(run)) == 3 and not (run / "weights.safetensors").exists()
    assert laplace_dist.verify(str(run)).problems == []
    fresh = dist_cases.convnet()
    torch.nn.init.zeros_(fresh[0].weight)
    la = laplace_dist.load_posterior(str(run), fresh, load_weights=True)
    assert weights_digest(la.model) == weights_digest(dist_cases.convnet())
    monkeypatch.undo()
    fit(config(tmp_path / "one"))
    assert (tmp_path / "one" / "weights.safetensors").exists()
    one = dist_cases.load_sums(tmp_path / "one")
    assert all(torch.equal(value, one[name]) for name, value in dist_cases.load_sums(run).items())


def test_it_goes_on_and_is_deleted_with_its_shards(run):
    (run / "partials" / "000001.json").unlink()
    (run / "CURRENT.json").unlink()
    names = shards_in(run)
    fit(config(run))
    assert shards_in(run) == names
    fit(config(run, model="dist_cases:tiny", model_args={"name": "one unit"}, data="dist_cases:tiny_data",
               data_args={"name": "one unit"}, likelihood="regression", fresh=True))  # fmt: skip
    assert shards_in(run) == [] and not (run / INDEX).exists() and (run / "weights.safetensors").exists()


def test_weights_of_another_model_without_a_run_are_refused_and_the_same_ones_taken_over(run):
    kept = {name: (run / name).read_bytes() for name in [INDEX, *shards_in(run)]}
    for path in sorted(run.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    for name, content in kept.items():
        (run / name).write_bytes(content)
    other = config(run, model_args={"dtype": "float64"}, data_args={"dtype": "float64"})
    with pytest.raises(SettingsError, match=f"holds no run.*but the {INDEX} of another one"):
        fit(other)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == kept
    fit(config(run))
    assert {name: (run / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("how", ["missing", "altered", "truncated", "another's"])
def test_damage_to_a_shard_is_named(how, run):
    first, second, _ = (run / name for name in shards_in(run))
    if how == "missing":
        first.unlink()
    else:
        content = first.read_bytes()
        changed = {"altered": content[:-1] + bytes([content[-1] ^ 1]), "truncated": content[:-4]}
        first.write_bytes(changed.get(how) or second.read_bytes())
    assert first.name in dict(laplace_dist.verify(str(run)).problems)[INDEX]
    (run / "CURRENT.json").unlink()
    (run / "partials" / "000001.json").unlink()
    with pytest.raises(CheckpointError, match=first.name):
        fit(config(run))


def test_an_index_that_was_altered_is_named(run):
    values = json.loads((run / INDEX).read_text())
    values["weight_map"]["0.bias"] = "weights-0000000000000000.safetensors"
    (run / INDEX).write_text(json.dumps(values))
    assert "is truncated or altered" in dict(laplace_dist.verify(str(run)).problems)[INDEX]


def test_the_index_is_one_that_weights_are_loaded_from(run, tmp_path):
    loaded = load_model(config(tmp_path / "x", weights=str(run / INDEX)))
    assert weights_digest(loaded) == weights_digest(dist_cases.convnet())
    found = weight_files.shards_of(str(run / INDEX), {}, "--weights")
    assert sorted(found.names) == shards_in(run)


class Tied(nn.Module):
    """A weight under two names, a view of another tensor, and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.register_buffer("part", torch.arange(12.0)[2:9])


def test_tied_weights_and_views_come_back(tmp_path):
    store, model = Checkpoint(str(tmp_path)), Tied()
    for key, content, _ in weight_shards.shards(model):
        assert store.create(key, content)
    store.create(INDEX, weight_shards.index_of(model))
    weight_shards.check_shards(store, weights_digest(model))
    other = Tied()
    with torch.no_grad():
        other.one.weight.zero_()
        other.part.zero_()
    weight_shards.load_shards_of_run(store, other)
    assert weights_digest(other) == weights_digest(model)
    with pytest.raises(CheckpointError, match="of another model than the plan's"):
        weight_shards.check_shards(store, "0" * 64)
    with pytest.raises(SettingsError, match="do not fit the model"):
        weight_shards.load_shards_of_run(store, nn.Linear(3, 2))


# Peak above what the process held with its model, while weights are stored, and while they are read into it.
SCRIPT = """
import sys
import torch
from torch import nn
from laplace_dist.run import weight_shards
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.run_weights import check_run_weights
from laplace_dist.run.weights import weights_digest

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

weight_shards.SHARD_BYTES = 4 * 2**20
small, store = nn.Linear(9, 9), Checkpoint(sys.argv[1])
list(weight_shards.shards(small)), weights_digest(small), weight_shards.index_of(small), store.create("x", b"x")
model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(15)])
before = status("VmRSS")
for key, content, _ in weight_shards.shards(model):
    store.create(key, content)
    del content
store.create("weights.safetensors.index.json", weight_shards.index_of(model))
weight_shards.load_shards_of_run(store, model)
check_run_weights(store, weights_digest(model), "weights.safetensors.index.json")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_nobody_holds_the_weights_twice(tmp_path, environment):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert float(done.stdout.split()[-1]) < 30, "of 63 MB of weights, the largest tensor of 4"


def test_the_lines_that_load_a_posterior_do_not_name_a_file_that_is_not_there(tmp_path, capsys):
    flags = [
        "--model=dist_cases:convnet",
        "--data=dist_cases:blobs",
        f"--checkpoint={tmp_path / 'run'}",
        "--batch-size=4",
    ]
    flags += ["--ray-address=inline", "--skip-tune", "--skip-evaluate", "--skip-report"]
    assert cli.main("fit", flags) == 0
    said = capsys.readouterr().out
    assert "load_weights=True" in said and "load_file" not in said


@pytest.mark.parametrize(("prefix", "wrapper"), [("module.", "DataParallel"), ("_orig_mod.", "torch.compile")])
def test_weights_of_a_wrapped_model_say_what_to_take_off(prefix, wrapper):
    model = torch.nn.Linear(2, 3)
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(SettingsError, match=f"missing: bias, weight; .* in {wrapper}: take '{prefix}' off every name"):
        check_fit(model, "w", state, state)
    with pytest.raises(SettingsError, match="unexpected: module.other$"):
        check_fit(model, "w", [*model.state_dict(), "module.other"], {})
