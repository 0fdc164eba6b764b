"""Import paths, weights files and data sets: what is refused and how, weights' digests, and the batches of a segment."""

from __future__ import annotations

import os
import pickle
import sys

import dist_cases
import numpy as np
import pytest
import torch
import zarr
from item_cases import Items, pairs
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from laplace_dist.config.import_path import load_callable
from laplace_dist.config.settings import Config
from laplace_dist.data.loader import batches
from laplace_dist.data.sources import load_split
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.run.weights import dump_weights, load_model, load_weights, weights_digest

MODULE = """
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

def model(width=3):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))

def data(split, n=10):
    return TensorDataset(torch.zeros(n if split == "train" else 5, 4), torch.zeros(n if split == "train" else 5))

def no_model():
    return "a string"

def no_data(split):
    return {"train": Stream(), "val": "a string", "test": 3}[split]

def no_split():
    return []

class Half:
    def __len__(self):
        return 4.5

    def __getitem__(self, index):
        return index

def half(split):
    return Half()

number = 3
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Make a module of a user's in the current directory."""
    (tmp_path / "user_code.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("user_code", None)


def config(**values):
    return Config(**{"model": "user_code:model", "data": "user_code:data", "checkpoint": "x", **values})


# ------------------------------------------------------------------ import paths


def test_modules_in_the_current_directory_are_found(user):
    assert load_callable("user_code:model")(width=2)[0].out_features == 2
    assert load_callable("user_code:nn.Linear") is nn.Linear


PATHS = [
    ("user_code", ["'user_code'", "module:callable"]),
    ("user_code:", ["module:callable"]),
    ("no_such_module:f", ["'no_such_module:f'", "no module 'no_such_module'"]),
    ("user_code:nothing", ["'user_code:nothing'", "has no 'nothing'", "no_model"]),
    ("user_code:number", ["is a int", "expected a callable"]),
    ("needs_more:f", ["needs 'surely_not_installed'"]),
]


@pytest.mark.parametrize(("path", "words"), PATHS, ids=[path for path, _ in PATHS])
def test_bad_import_paths(user, path, words):
    with pytest.raises(SettingsError) as caught:
        load_callable(path, "--model")
    for word in ["--model", *words]:
        assert word in str(caught.value)


def test_the_current_directory_is_put_on_the_path_once(user):
    load_callable("user_code:model")
    load_callable("user_code:data")
    assert sys.path.count(os.getcwd()) == 1


# ------------------------------------------------------------------ model and weights


def test_a_model_comes_in_eval_mode_with_its_arguments(user):
    model = load_model(config(model_args={"width": 5}))
    assert not model.training
    assert model[0].out_features == 5


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_files(user, suffix):
    torch.manual_seed(1)
    model = load_callable("user_code:model")()
    path = str(user / f"weights{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    for weights in (path, f"file://{path}"):
        assert weights_digest(load_model(config(weights=weights))) == weights_digest(model)


def test_bad_models(user):
    with pytest.raises(
        SettingsError, match=r"--model: 'user_code:no_model' returned a str; expected a torch.nn.Module"
    ):
        load_model(config(model="user_code:no_model"))
    with pytest.raises(SettingsError, match=r"--model: 'user_code:model' cannot be called with depth .*--model-args"):
        load_model(config(model_args={"depth": 5}))


def write_bad_weights(folder, kind):
    path = folder / "w"
    good = load_callable("user_code:model")().state_dict()
    if kind == "text":
        path.write_text("not weights at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        save_file(good, path)
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "object":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "nested":
        torch.save({"state_dict": good, "epoch": 3}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "misfit":
        changed = {name: value for name, value in good.items() if name != "0.bias"}
        torch.save({**changed, "0.weight": torch.ones(9, 4), "head.weight": torch.ones(1)}, path)
    return str(path)


WEIGHTS = [
    ("none", ["cannot read"]),
    ("folder", ["holds no .safetensors"]),
    ("text", ["is not a state dict", ".safetensors"]),
    ("empty", ["is not a state dict"]),
    ("cut", ["is not a state dict"]),
    ("object", ["is not a state dict", "tensors only"]),
    ("nested", ["holds epoch, state_dict", "expected a state dict"]),
    ("misfit", ["do not fit", "missing: 0.bias", "unexpected: head.weight", "0.weight [9, 4] in the file, [3, 4] in"]),
]


@pytest.mark.parametrize(("kind", "words"), WEIGHTS, ids=[kind for kind, _ in WEIGHTS])
def test_bad_weights(user, kind, words):
    path = write_bad_weights(user, kind)
    with pytest.raises(SettingsError) as caught:
        load_model(config(weights=path))
    for word in ["--weights", path, *words]:
        assert word in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to run what the file holds


def test_tied_weights_are_stored_and_digested():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    before = weights_digest(model)
    content = dump_weights(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert weights_digest(model) != before
    load_weights(model, content, "w")
    assert weights_digest(model) == before
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("change", ["parameter", "buffer", "dtype", "name"])
def test_the_weights_digest_sees_every_change(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = weights_digest(model)
    if change == "parameter":
        model[0].bias.data[1] += 1e-6
    elif change == "buffer":
        model[1].num_batches_tracked += 1
    elif change == "dtype":
        model[0].to(torch.bfloat16)
    else:
        model = nn.Sequential(model[0], nn.Identity(), model[1])
    assert weights_digest(model) != before


# ------------------------------------------------------------------ data sets


def test_data_from_a_callable(user):
    assert len(load_split(config(data_args={"n": 7}), "train")) == 7
    assert len(load_split(config(data_args={"n": 7}), "val")) == 5


DATA = [
    ("user_code:no_data", "train", {}, "returned a Stream for split 'train'; expected a map-style"),
    ("user_code:no_data", "val", {}, "returned a str for split 'val'; expected a map-style"),
    ("user_code:no_data", "test", {}, "returned a int for split 'test'; expected a map-style"),
    ("user_code:no_split", "train", {}, "cannot be called with split"),
    ("user_code:data", "train", {"n": 0}, "returned an empty data set for split 'train'"),
    ("user_code:data", "train", {"m": 0}, "cannot be called with split, m"),
    ("user_code:datta", "train", {}, "has no 'datta'"),
    (
        "user_code:half",
        "train",
        {},
        "the length of what 'user_code:half' returned for split 'train' cannot be told (TypeError",
    ),
    ("user_code:data", "train", {"n": "x"}, "'user_code:data' raises TypeError"),
    (
        "nowhere/data.zarr",
        "train",
        {},
        "got 'nowhere/data.zarr'; expected an import path of the form module:callable, or",
    ),
    ("nowhere", "train", {"a": 1}, "--data-args: a given"),
]


@pytest.mark.parametrize(("path", "split", "arguments", "words"), DATA, ids=[f"{d[0]} {d[1]} {d[2]}" for d in DATA])
def test_bad_data(user, path, split, arguments, words):
    with pytest.raises(SettingsError) as caught:
        load_split(config(data=path, data_args=arguments), split)
    assert "--data" in str(caught.value)
    assert words in str(caught.value)


@pytest.fixture(params=["path", "file url", "memory url"])
def zarr_url(request, tmp_path):
    path = str(tmp_path / "data.zarr")
    url = {"path": path, "file url": f"file://{path}", "memory url": f"memory://{tmp_path.name}"}[request.param]
    group = zarr.create_group(url if url.startswith("memory") else path)
    for split, n in (("train", 10), ("val", 4)):
        part = group.create_group(split)
        part.create_array("x", data=np.arange(n * 3, dtype=np.float32).reshape(n, 3), chunks=(4, 3))
        part.create_array("y", data=np.arange(n, dtype=np.int32))
    group.create_group("odd").create_array("x", data=np.ones(3))
    part = group.create_group("uneven")
    part.create_array("x", data=np.ones(3))
    part.create_array("y", data=np.ones(2))
    return url


def test_data_from_zarr(zarr_url):
    dataset = pickle.loads(pickle.dumps(load_split(config(data=zarr_url), "train")))
    assert isinstance(dataset, ZarrSplit)
    assert len(dataset) == 10
    x, y = dataset[9]
    assert x.tolist() == [27, 28, 29]
    assert y.dtype == torch.int64
    assert y.item() == 9
    with pytest.raises(IndexError, match="example 10 of 10"):
        dataset[10]
    got = list(batches(dataset, 2, 9, 4))
    assert [(offset, x.shape[0], y.tolist()) for offset, x, y in got] == [(2, 4, [2, 3, 4, 5]), (6, 3, [6, 7, 8])]
    assert torch.equal(got[0][1], torch.arange(6.0, 18).reshape(4, 3))


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("test", "has no split 'test'; it has odd, train, uneven, val"),
        ("odd", "needs the arrays 'x' and 'y'"),
        ("uneven", "3 x but 2 y"),
    ],
)
def test_bad_zarr(zarr_url, split, words):
    with pytest.raises(SettingsError, match=words):
        load_split(config(data=zarr_url), split)


@pytest.fixture
def chunks_read(monkeypatch):
    """Note the rows that are asked of each array, by its name."""
    found, get = {"x": [], "y": []}, zarr.Array.__getitem__

    def traced(array, index):
        found[array.path.rpartition("/")[2]].append((index.start, index.stop))
        return get(array, index)

    monkeypatch.setattr(zarr.Array, "__getitem__", traced)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 8, 10, 64])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_each_chunk_is_decoded_once_whatever_the_batches(zarr_url, chunks_read, start, batch_size):
    """`x` has chunks of 4 rows, `y` one chunk: batches used to decode a chunk as often as they touched it."""
    got = list(batches(ZarrSplit(zarr_url, "train"), start, 10, batch_size))
    assert torch.cat([x for _, x, _ in got]).tolist() == np.arange(start * 3, 30).reshape(-1, 3).tolist()
    assert torch.cat([y for _, _, y in got]).tolist() == list(range(start, 10))
    for rows, step in ((chunks_read["x"], 4), (chunks_read["y"], 10)):
        chunks = [chunk for first, last in rows for chunk in range(first // step, -(-last // step))]
        assert chunks == sorted(set(chunks)), "in order, and none twice"
        assert all(first % step == 0 and (last % step == 0 or last == 10) for first, last in rows)


def test_examples_and_batches_of_zarr_data_do_not_share_memory(zarr_url):
    """What a model does to its inputs in place must not reach the chunk that is kept."""
    dataset = ZarrSplit(zarr_url, "train")
    for start, stop in ((0, 1), (1, 3), (0, 4), (3, 6), (4, 8)):
        expected = torch.arange(start * 3.0, stop * 3).reshape(-1, 3)
        for _ in range(2):
            x, _ = dataset[start:stop]
            assert torch.equal(x, expected)
            x.zero_()
    dataset[7][0].zero_()
    assert dataset[7][0].tolist() == [21, 22, 23]


def test_zarr_data_of_the_other_byte_order_are_read(tmp_path):
    group = zarr.create_group(tmp_path / "data")
    values = np.arange(6.0).reshape(3, 2)
    group.create_array("train/x", data=values.astype(">f4"))
    group.create_array("train/y", data=np.arange(3).astype(">i2"))
    ((_, x, y),) = batches(ZarrSplit(str(tmp_path / "data"), "train"), 0, 3, 4)
    assert (x.tolist(), x.dtype, y.tolist(), y.dtype) == (values.tolist(), torch.float32, [0, 1, 2], torch.int64)


# ------------------------------------------------------------------ batches


class Batched(Items):
    def __getitems__(self, indices):
        self.asked = indices
        return [self[i] for i in indices]


@pytest.mark.parametrize(
    "dataset",
    [
        Items(pairs(11)),
        Batched(pairs(11)),
        TensorDataset(torch.stack([x for x, _ in pairs(11)]), torch.arange(11)),
    ],
    ids=["items", "getitems", "tensors"],
)
def test_batches_cover_the_range_in_order(dataset):
    got = list(batches(dataset, 3, 10, 3))
    assert [offset for offset, _, _ in got] == [3, 6, 9]
    assert torch.cat([y for _, _, y in got]).tolist() == list(range(3, 10))
    assert torch.equal(torch.cat([x for _, x, _ in got])[:, 0], torch.arange(3.0, 10))


def test_tensor_data_sets_are_sliced_not_read_one_by_one(monkeypatch):
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10))
    asked, get = [], TensorDataset.__getitem__

    def traced(self, index):
        asked.append(index)
        return get(self, index)

    monkeypatch.setattr(TensorDataset, "__getitem__", traced)
    list(batches(dataset, 0, 10, 5))
    assert asked == [slice(0, 5), slice(5, 10)]


def test_mappings_pass_through_whole():
    dataset = Items([{"ids": torch.tensor([i, i]), "labels": i} for i in range(4)])
    ((offset, x, y),) = batches(dataset, 1, 3, 8)
    assert (offset, x["ids"].tolist(), y.tolist()) == (1, [[1, 1], [2, 2]], [1, 2])


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([{"ids": 1}], "--dict-key-y: a batch is a mapping of ids, without 'labels'.*examples that are pairs"),
        ([(1,)], "a list of 1; expected a pair"),
        ([1.0], "a Tensor; expected a pair"),
        (["text"], "a list of 1; expected a pair"),
    ],
)
def test_examples_that_are_no_pairs_are_refused(items, words):
    with pytest.raises(SettingsError, match=words):
        list(batches(Items(items), 0, 1, 1))


@pytest.mark.parametrize("kind", [Items, Batched])
def test_an_error_of_the_data_set_names_the_example(kind):
    items = pairs(8)
    items[5] = KeyError("no file 5.png")
    with pytest.raises(
        ExampleError, match=r"examples? (5|4 to 7) cannot be read \(KeyError: 'no file 5.png'\)"
    ) as caught:
        list(batches(kind(items), 0, 8, 4))
    assert 5 in caught.value.examples
    assert isinstance(caught.value.__cause__, KeyError)
    assert pickle.loads(pickle.dumps(caught.value)).examples == caught.value.examples


def test_a_range_that_cannot_be_sliced_is_named(tmp_path):
    """A chunk of the user's own Zarr data whose checksum is wrong; and a data set of tensors that raises."""
    group = zarr.create_group(tmp_path / "data")
    x = torch.arange(24.0).reshape(12, 2).numpy()
    codec = {"compressors": zarr.codecs.Crc32cCodec()}
    group.create_array("train/x", shape=x.shape, chunks=(4, 2), dtype=x.dtype, **codec)[:] = x
    group.create_array("train/y", shape=(12,), chunks=(4,), dtype="int64")[:] = 0
    chunk = tmp_path / "data" / "train" / "x" / "c" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    found = batches(ZarrSplit(str(tmp_path / "data"), "train"), 0, 12, 4)
    assert next(found)[1].tolist() == x[:4].tolist()
    with pytest.raises(ExampleError, match=r"examples 4 to 7 cannot be read \(.*checksum") as caught:
        next(found)
    assert caught.value.examples == [4, 5, 6, 7]
    with pytest.raises(ExampleError, match=r"examples 4 to 7 cannot be read \(OSError"):
        list(batches(dist_cases.unreadable("train", bad="train", at=6), 0, 12, 4))


def test_examples_of_different_shapes_are_named():
    items = [*pairs(3), (torch.ones(5), 3)]
    with pytest.raises(
        ExampleError, match=r"examples 2 and 3 cannot be stacked .* x is of shape \(2,\) in the one and of shape \(5,\)"
    ):
        list(batches(Items(items), 0, 4, 2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def net(:\n    pass", "raises SyntaxError: .*broken_module.py, line 1"),
        ("import torch\nnet = torch.nn.Lineal(3, 2)", "raises AttributeError: .*Lineal.*broken_module.py, line 2"),
        ("from torch import no_such_name", "raises ImportError: cannot import name 'no_such_name'.*line 1"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(tmp_path, monkeypatch, text, said):
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    with pytest.raises(SettingsError, match=f"--model: got 'broken_module:net'; importing 'broken_module' {said}"):
        load_callable("broken_module:net")
