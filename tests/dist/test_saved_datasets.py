"""Folders of Hugging Face's `save_to_disk`: splits, formats, the missing package, and files that are cut off."""

from __future__ import annotations

import sys

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from source_cases import load, table

from laplace_dist.data.hugging_face import SavedDataset
from laplace_dist.data.loader import batches
from laplace_dist.errors import SettingsError

datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    splits = {name: datasets.Dataset(table(n)) for name, n in (("train", 20), ("val", 6))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_each_split_of_a_dictionary_is_read(folder):
    for name, n in (("train", 20), ("val", 6)):
        dataset = load(folder, name)
        assert isinstance(dataset, SavedDataset) and len(dataset) == n
        ((_, x, y),) = batches(dataset, 0, n, n)
        assert torch.equal(x, torch.arange(2.0 * n).reshape(n, 2)) and y.tolist() == [i % 3 for i in range(n)]


def test_a_url_is_copied_with_its_options_which_no_message_repeats(folder, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/saved", recursive=True)
    assert load("memory://saved", "val")[5][1] == 2
    monkeypatch.setattr(datasets, "load_from_disk", lambda *_, **options: _fail(options))
    with pytest.raises(SettingsError, match=r"memory://saved/val cannot be loaded \(OSError: .*\*\*\*") as caught:
        load("memory://saved", "val", data_storage_options={"password": "planted-secret"})
    assert "planted" not in str(caught.value)


def _fail(options):
    raise OSError(str(options))


def test_rows_that_were_chosen_and_the_format_are_kept(tmp_path):
    rows = datasets.Dataset(table(20, text=[f"row {i}" for i in range(20)], number=np.arange(20)))
    rows = rows.shuffle(seed=1).select(range(3, 15)).with_format("torch", columns=["number", "y"])
    wanted = [int(row["number"]) for row in rows]
    rows.save_to_disk(tmp_path / "train")
    dataset = load(tmp_path, dict_key_y="y")
    assert sorted(dataset[0]) == ["number", "y"], "the text is not of the format"
    assert [int(dataset[i]["number"]) for i in range(12)] == wanted != sorted(wanted)


def test_arrays_of_a_feature_keep_their_shape(tmp_path):
    values = np.arange(24.0, dtype=np.float32).reshape(4, 2, 3)
    features = datasets.Features({"x": datasets.Array2D((2, 3), "float32"), "y": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"x": list(values), "y": ["a", "b", "b", "a"]}, features=features)
    rows.save_to_disk(tmp_path / "train")
    ((_, x, y),) = batches(load(tmp_path), 0, 4, 4)
    assert np.array_equal(x.numpy(), values) and y.tolist() == [0, 1, 1, 0]


def test_a_missing_package_is_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        SettingsError, match=r"written by Hugging Face's datasets, which is not installed.*pip install datasets"
    ):
        load(folder)


def test_what_is_no_split_is_refused(folder, tmp_path):
    with pytest.raises(SettingsError, match="has no split 'test'; it has train, val"):
        load(folder, "test")
    with pytest.raises(SettingsError, match="is one data set without splits; save a datasets.DatasetDict"):
        load(folder / "train")


def test_a_file_that_ends_between_two_batches_is_refused(tmp_path):
    """Arrow takes what is left for all there is."""
    datasets.Dataset(pa.Table.from_batches(table(20).to_batches(max_chunksize=5))).save_to_disk(tmp_path / "train")
    (file,) = (tmp_path / "train").glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pa.ipc.open_stream(file) as stream:
        stream.read_all()
    with pytest.raises(SettingsError, match="arrow is truncated; restore it"):
        load(tmp_path)
