"""What the driver finds out with its first batch: refused in one line, with status 2, before a worker or the run exists."""

from __future__ import annotations

import json
from types import SimpleNamespace

import calling_cases
import dist_cases
import numpy as np
import pytest
import torch
import zarr
from calling_cases import Rows
from torch import nn
from torch.utils.data import TensorDataset

from laplace_dist import cli
from laplace_dist.data.sources import load_split
from laplace_dist.errors import SettingsError
from laplace_dist.job import evaluate_posterior, tune_posterior
from laplace_dist.run.weights import load_model
from laplace_dist.stages import first_batch

N = 10
IMAGES = torch.linspace(-1, 1, N * 36).reshape(N, 1, 6, 6)
LABELS = torch.arange(N) % 3


def sentences(split: str) -> list:
    return [{"input_ids": [1, 2, 3], "labels": 0}] * N


class Quiet(nn.Module):
    """A network that answers with something else than one tensor."""

    def __init__(self, answer):
        super().__init__()
        self.last, self.answer = nn.Linear(36, 3), answer

    def forward(self, x):
        return self.answer(self.last(x.flatten(1)))


MODELS = {
    "convnet": dist_cases.convnet,
    "one output": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 1)).eval(),
    "pair": lambda: Quiet(lambda f: (f, f)).eval(),
    "sum": lambda: Quiet(lambda f: f.sum()).eval(),
    "no batch": lambda: Quiet(lambda f: f[:1]).eval(),
    "meta": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3, device="meta")).eval(),
    "nothing": lambda: nn.Sequential(nn.Flatten()).eval(),
    "bert": calling_cases.bert,
}


def model(kind: str) -> nn.Module:
    return MODELS[kind]()


def unequal():
    return [(torch.zeros(1, 6, 6), 0)] * 2 + [(torch.zeros(1, 7, 6), 0)] * 2


class Filtered(list):
    """A data set that leaves an example out of a batch."""

    def __init__(self):
        super().__init__(pairs(IMAGES, LABELS))

    def __getitems__(self, indices):
        return [self[i] for i in indices if i != 2]


def pairs(x, y):
    return list(zip(x, y, strict=True))


DATA = {
    # inputs
    "uint8": ("convnet", TensorDataset(IMAGES.mul(100).byte(), LABELS), ["--data", "torch.uint8", "weights are torch.float32",
              "--collate", "x.to(torch.float32)"]),
    "float16": ("convnet", TensorDataset(IMAGES.half(), LABELS), ["--data", "torch.float16", "--collate"]),
    "float64": ("convnet", TensorDataset(IMAGES.double(), LABELS), ["--data", "torch.float64", "--collate"]),
    "floats of Python": ("one output", [([0.5] * 36, 1.0)] * N, ["--data", "x of example 0 is a list of numbers"]),
    "rows without a format": ("bert", sentences("train"), ["--data", "'input_ids' of example 0 is a list of numbers",
                              "with_format('torch')", "--collate"]),
    "unequal": ("convnet", unequal(), ["--data", "examples 0 and 2", "(1, 6, 6)", "(1, 7, 6)", "--collate"]),
    "sparse": ("convnet", pairs([x.to_sparse() for x in IMAGES], LABELS), ["--data", "x of example 0 is a sparse tensor",
               "to_dense()"]),
    "mapping": ("convnet", [{"image": x, "labels": 0} for x in IMAGES], ["--model", "forward does not take the mapping of image",
                "pairs (x, y)"]),
    "shapes": ("convnet", TensorDataset(torch.zeros(N, 5), LABELS), ["--model: its forward fails", "x (2, 5) torch.float32",
               "RuntimeError"]),
    "scalars": ("convnet", [torch.ones(())] * N, ["--data: a batch is a Tensor; expected a pair"]),
    "no values": ("convnet", pairs(IMAGES.to("meta"), LABELS), ["--data: x of example 0 lies on torch's meta device"]),
    "left out": ("convnet", Filtered(), ["--data: examples 0 to 3 gave 3 target(s) in place of 4", "__getitems__", "--collate"]),
    # outputs
    "model without values": ("meta", TensorDataset(IMAGES, LABELS), ["--model: its weights lie on torch's meta device"]),
    "model that raises": ("raises", TensorDataset(IMAGES, LABELS), ["--model: 'test_first_batch:model' raises KeyError: 'raises'",
                          "test_first_batch.py, line"]),
    "two answers": ("pair", TensorDataset(IMAGES, LABELS), ["--model: it returns a tuple", "expected one tensor"]),
    "one number": ("sum", TensorDataset(IMAGES, LABELS), ["--model: it returns () for 2 examples", "(batch, …, outputs)"]),
    "one row": ("no batch", TensorDataset(IMAGES, LABELS), ["--model: it returns (1, 3) for 2 examples"]),
    "no parameters": ("nothing", TensorDataset(IMAGES, LABELS), ["--model: it has no parameters"]),
    # targets
    "strings": ("convnet", pairs(IMAGES, ["cat"] * N), ["--data", "strings, such as 'cat'", "number from 0"]),
    "mappings": ("convnet", [(x, {"box": 1, "class": 2}) for x in IMAGES], ["--data", "a mapping of box, class"]),
    "lists": ("convnet", [(x, [1, 2]) for x in IMAGES], ["--data", "y of example 0 is a list of numbers"]),
    "one-hot": ("convnet", TensorDataset(IMAGES, nn.functional.one_hot(LABELS).float()), ["--data", "are one-hot",
                "y.argmax(-1)"]),
    "one-hot whole numbers": ("convnet", TensorDataset(IMAGES, nn.functional.one_hot(LABELS)), ["--data", "(4, 3)",
                              "y.argmax(-1)"]),
    "columns": ("convnet", TensorDataset(IMAGES, LABELS[:, None]), ["--data", "y.squeeze(-1)"]),
    "float labels": ("convnet", TensorDataset(IMAGES, LABELS.float()), ["--data", "targets are torch.float32", ".long()"]),
    "out of range": ("convnet", TensorDataset(IMAGES, torch.tensor([0, 1, 2, 3] + [0] * 6)), ["--data",
                     "Label 3 of example 3", "0…2"]),
    "negative": ("convnet", TensorDataset(IMAGES, torch.tensor([0, -100] + [0] * 8)), ["--data", "Label -100 of example 1",
                 "WeightedCategorical(ignore_index=-100)"]),
}  # fmt: skip
REGRESSION = {
    "no column": (
        TensorDataset(IMAGES, torch.zeros(N)),
        ["--data", "(4,) do not match outputs of shape (4, 1)", "unsqueeze(-1)"],
    ),
    "many columns": (
        TensorDataset(IMAGES, torch.zeros(N, 2)),
        ["--data", "(4, 2) do not match outputs of shape (4, 1)"],
    ),
    "not finite": (TensorDataset(IMAGES, torch.full((N, 1), float("nan"))), ["--data", "NaN or Inf", "indices 0"]),
}


def data(split: str, name: str, bad: str = "train"):
    good = TensorDataset(IMAGES, torch.zeros(N, 1) if name in REGRESSION else LABELS)
    if split != bad:
        return good
    return REGRESSION[name][0] if name in REGRESSION else DATA[name][1]


def run(tmp_path, capsys, kind, name, *more):
    """Start a job whose cluster nobody would answer for; returns its status and what it said."""
    argv = ["--model=test_first_batch:model", f'--model-args={{"kind": "{kind}"}}', "--data=test_first_batch:data"]
    argv += [
        f"--data-args={json.dumps({'name': name})}",
        "--batch-size=4",
        "--ray-address=127.0.0.1:1",
        "--gpus-per-worker=0",
    ]
    status = cli.main("fit", [*argv, f"--checkpoint={tmp_path / 'run'}", "--skip-tune", *more])
    assert not (tmp_path / "run").exists(), "nothing is written before the first batch has been looked at"
    return status, capsys.readouterr().err


def check(said, status, words):
    assert status == 2 and said.count("\n") == 1 and len(said) < 900, said
    for word in words:
        assert word in said


@pytest.mark.parametrize("name", DATA)
def test_data_that_do_not_suit_the_model_are_refused_in_one_line(tmp_path, capsys, name):
    kind, _, words = DATA[name]
    status, said = run(tmp_path, capsys, kind, name, "--skip-evaluate")
    print(said)
    check(said, status, words)


@pytest.mark.parametrize("name", REGRESSION)
def test_targets_that_do_not_suit_a_regression_are_refused_in_one_line(tmp_path, capsys, name):
    status, said = run(tmp_path, capsys, "one output", name, "--skip-evaluate", "--likelihood=regression")
    check(said, status, REGRESSION[name][1])


@pytest.mark.parametrize("name", ["uint8", "strings", "one-hot"])
def test_the_other_splits_are_looked_at_too_and_named(tmp_path, capsys, name):
    argv = ["--data-args", json.dumps({"name": name, "bad": "test"})]
    status, said = run(tmp_path, capsys, "convnet", name, *argv)
    words = {"uint8": "torch.uint8", "strings": "'cat'", "one-hot": "argmax"}
    check(said, status, ["(split 'test')", words[name]])


def test_labels_of_splits_that_are_out_of_distribution_do_not_matter(tmp_path):
    config = dist_cases.config(tmp_path, skip_evaluate=False, ood=["far"])
    strange = TensorDataset(IMAGES, LABELS + 100)
    first_batch.check(config, dist_cases.convnet(), {"train": dist_cases.blobs("train"), "far": strange})


def test_an_error_of_the_model_is_one_line_with_its_type(tmp_path):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(2, 2)

        def forward(self, x):
            raise ZeroDivisionError("somewhere deep\ninside\nof it")

    with pytest.raises(first_batch.SettingsError) as caught:
        first_batch.check(dist_cases.config(tmp_path), Broken(), {"train": dist_cases.blobs("train")})
    assert str(caught.value).startswith(
        "--model: its forward fails on the first examples, which are x (2, 1, 6, 6) torch.float32"
    )
    assert "(ZeroDivisionError: somewhere deep)" in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_mapping_of_which_the_model_takes_a_part_is_refused_in_one_line(tmp_path):
    config = dist_cases.config(tmp_path, model="calling_cases:model")
    rows = Rows(lambda a, b, y: {"a": a, "b": b, "weight": 1.0, "labels": y})
    with pytest.raises(
        first_batch.SettingsError, match="--model: The model's forward takes a, b .* does not take weight"
    ):
        first_batch.check(config, load_model(config), {"train": rows})


FINE = {
    "big-endian, reversed": [(x.flip(2).numpy()[:, :, ::-1].astype(">f4"), int(y)) for x, y in pairs(IMAGES, LABELS)],
    "big-endian labels of no dimension": [(x.numpy(), np.array(int(y), ">i8")) for x, y in pairs(IMAGES, LABELS)],
    "numpy scalars": [(x.numpy(), np.int16(y)) for x, y in pairs(IMAGES, LABELS)],
    "labels of one byte": TensorDataset(IMAGES, LABELS.to(torch.uint8)),
}


def fine(split: str, name: str):
    return FINE[name]


@pytest.mark.parametrize("name", FINE)
def test_what_can_be_converted_without_loss_is(tmp_path, name):
    found = {}
    for case, values in {"ours": {"data": "test_first_batch:fine", "data_args": {"name": name}},
                         "plain": {"data": "test_first_batch:data", "data_args": {"name": "none", "bad": ""}}}.items():  # fmt: skip
        config = dist_cases.config(tmp_path / case, **values)
        dist_cases.run_inline(config)
        found[case] = dist_cases.load_sums(tmp_path / case)
    assert all(torch.equal(found["ours"][factor], found["plain"][factor]) for factor in found["plain"])


def test_the_check_reads_the_first_batch_of_the_training_split_and_one_example_of_others(tmp_path):
    class Counting(TensorDataset):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    asked = []
    splits = {name: Counting(*dist_cases.blobs(name).tensors) for name in ("train", "test")}
    first_batch.check(dist_cases.config(tmp_path), dist_cases.convnet(), splits)
    assert asked == [0, slice(0, 4), 0, slice(0, 1)]


def test_a_model_that_is_used_from_now_on_is_left_in_order(tmp_path):
    model = dist_cases.convnet()
    first_batch.check(dist_cases.config(tmp_path), model, {"train": dist_cases.blobs("train")})
    assert all(p.grad is None for p in model.parameters()) and not model.training


SPLITS = {}


def changing(split: str):
    """Return splits of which tests change one after the fit."""
    return SPLITS.get(split) or dist_cases.blobs(split)


@pytest.mark.parametrize(("job", "split"), [(tune_posterior, "val"), (evaluate_posterior, "test")])
def test_a_follow_on_job_looks_at_its_splits_before_anything_starts(tmp_path, monkeypatch, job, split):
    chosen = dist_cases.config(tmp_path, data="test_first_batch:changing", data_args={})
    dist_cases.run_inline(chosen)
    x, y = dist_cases.blobs(split).tensors
    monkeypatch.setitem(SPLITS, split, TensorDataset(x.double(), y))
    chosen = chosen.model_copy(update={"tuning": "gridsearch"})
    with pytest.raises(SettingsError, match=rf"inputs are torch.float64, but .* torch.float32.*\(split '{split}'\)"):
        job(chosen, executor=lambda *_: SimpleNamespace(device_type=lambda: "cpu", close=lambda: None))


def test_weights_that_are_no_numbers_are_named(tmp_path):
    broken = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        broken[2].bias[1] = float("nan")
    data = TensorDataset(IMAGES, LABELS)
    with pytest.raises(
        SettingsError, match=r"its outputs are NaN or Inf, and so are weights in 2.bias; give --weights"
    ):
        first_batch.check(dist_cases.config(tmp_path), broken, {"train": data})
    spoilt = TensorDataset(torch.full_like(IMAGES, float("nan")), LABELS)
    first_batch.check(dist_cases.config(tmp_path), CLASSES, {"train": spoilt})  # of which a worker names the examples


@pytest.mark.parametrize("form", [2, 3])
def test_chunks_that_are_not_stored_are_said_before_anything_begins(tmp_path, caplog, form):
    """They read as the fill value, as those do that hold nothing else and that Zarr does not write."""
    group = zarr.open_group(tmp_path / "data", mode="w", zarr_format=form)
    for name, values in (("x", IMAGES.numpy() + 2), ("y", LABELS.numpy() + 1)):
        array = group.create_array(
            f"train/{name}", shape=values.shape, dtype=values.dtype, chunks=(4, *values.shape[1:])
        )
        array[:] = values
    chosen = dist_cases.config(tmp_path / "run", data=str(tmp_path / "data"), model_args={}, skip_tune=True)

    def said():
        caplog.clear()
        with caplog.at_level("INFO", logger="laplace_dist"):
            first_batch.check(chosen, CLASSES, {"train": load_split(chosen, "train")})
        return caplog.text

    assert "not stored" not in said()
    [chunk] = (tmp_path / "data" / "train" / "x").glob("1.0.0.0" if form == 2 else "c/1/0/0/0")
    chunk.unlink()
    assert "data: split 'train': 1 of 3 chunks of x are not stored and read as 0.0" in said()


CLASSES = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()
