"""Whole jobs on data in files: the same factors as from an import path, bit for bit; on S3, and written by Ray Data."""

from __future__ import annotations

import os

import datasets
import dist_cases
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_cases import add, npy
from test_source_conformance import table

from laplace_dist import Inline, fit, verify
from laplace_dist.data.loader import batches
from laplace_dist.data.sources import load_split
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.run import lifecycle, pointer, versions
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.evaluations import joined_groups
from laplace_dist.run.layout import METRICS

datasets.disable_progress_bars()
SPLITS = ("train", "val", "test")


def columns(split):
    x, y = dist_cases.tensors(split)
    return {"x": x.numpy(), "y": y.numpy()}


def write_parquet(folder, rows=7):
    for split in SPLITS:
        os.makedirs(f"{folder}/{split}", exist_ok=True)
        whole = table(columns(split))
        pq.write_table(whole.slice(0, 12), f"{folder}/{split}/a.parquet", row_group_size=rows)
        pq.write_table(whole.slice(12), f"{folder}/{split}/b.parquet", row_group_size=rows)


def write_arrow(folder):
    for split in SPLITS:
        with pa.ipc.new_file(f"{folder}/{split}.arrow", table(columns(split)).schema) as file:
            for batch in table(columns(split)).to_batches(max_chunksize=7):
                file.write_batch(batch)


def write_saved(folder):
    datasets.DatasetDict({split: datasets.Dataset(table(columns(split))) for split in SPLITS}).save_to_disk(folder)


def write_tar(folder):
    import tarfile

    for split in SPLITS:
        found = columns(split)
        for number in range(2):
            with tarfile.open(f"{folder}/{split}-{number:06d}.tar", "w") as tar:
                half = len(found["y"]) // 2
                for row in range(number * half, (number + 1) * half if not number else len(found["y"])):
                    add(tar, f"{row:06d}.x.npy", npy(found["x"][row]))
                    add(tar, f"{row:06d}.y.cls", str(found["y"][row]).encode())


def factors(checkpoint, options=None) -> dict[str, str]:
    """Return the sha256 of every factor of the current posterior."""
    store = Checkpoint(str(checkpoint), options)
    plan = lifecycle.read_plan(store)
    found = versions.read_version(store, plan, pointer.read_current(store)["version"])["factors"]
    return {name: place["entry"]["sha256"] for name, place in found.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Factors and metrics of the data given as an import path."""
    folder = tmp_path_factory.mktemp("expected")
    result = fit(dist_cases.config(folder, skip_tune=False, skip_evaluate=False), Inline)
    return factors(folder), result.metrics


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_saved, write_tar])
def test_the_factors_are_those_of_an_import_path_bit_for_bit(tmp_path, expected, write):
    (tmp_path / "data").mkdir()
    write(str(tmp_path / "data"))
    config = dist_cases.config(tmp_path / "run", data=str(tmp_path / "data"), skip_tune=False, skip_evaluate=False)
    result = fit(config, Inline)
    assert (factors(tmp_path / "run"), result.metrics) == expected
    assert verify(str(tmp_path / "run")).ok


def test_the_group_of_each_example_lies_beside_its_scores(tmp_path, expected):
    """In the order of the examples, whatever shards they are scored in."""
    write_parquet(tmp_path / "data")
    sites = [f"site {i % 3}" for i in range(len(columns("test")["y"]))]
    for path in (tmp_path / "data/test").iterdir():
        path.unlink()
    pq.write_table(table({**columns("test"), "group": sites}), tmp_path / "data/test/a.parquet", row_group_size=7)
    config = dist_cases.config(tmp_path / "run", data=str(tmp_path / "data"), skip_tune=False, skip_evaluate=False)
    assert fit(config, Inline).metrics == expected[1]
    store = Checkpoint(str(tmp_path / "run"))
    (key,) = [
        key for key in store.list("evaluation") if key.count("/") == 1 and key.endswith(".json") and key != METRICS
    ]
    shards = open_json(store.read(key), key)["shards"]["test"]
    assert len(shards) > 1 and joined_groups(store, key, shards) == sites


def test_a_relative_path_is_the_drivers(tmp_path, expected, monkeypatch):
    """Workers have another directory."""
    write_parquet(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    config = dist_cases.config(tmp_path / "run", data="data")
    with dist_cases.inline_job(config) as job:
        assert job.config.data == str(tmp_path / "data")
        job.open(), job.map(), job.reduce()
    assert factors(tmp_path / "run") == expected[0]


def test_files_that_were_written_anew_are_refused_by_a_run_that_goes_on(tmp_path):
    """With the same rows in other row groups the factors would be the same, and a file is another one all the same."""
    write_parquet(tmp_path / "data")
    config = dist_cases.config(tmp_path / "run", data=str(tmp_path / "data"))
    fit(config, Inline)
    assert fit(config, Inline).version
    write_parquet(tmp_path / "data", rows=6)
    with pytest.raises(
        SettingsError, match="--data .contents, as sha256.*the files have other names, sizes or footers"
    ):
        fit(config, Inline)
    changed = table({**columns("train"), "y": (columns("train")["y"] + 1) % 3})
    pq.write_table(changed.slice(0, 12), tmp_path / "data/train/a.parquet", row_group_size=7)
    with pytest.raises(SettingsError, match="sampled examples differ"):
        fit(config, Inline)


def test_a_row_that_cannot_be_read_is_named_before_anything_starts(tmp_path):
    write_parquet(tmp_path / "data")
    whole = table(columns("train"))
    holed = pa.array([None if i == 3 else v for i, v in enumerate(whole["y"].to_pylist())])
    pq.write_table(whole.set_column(1, "y", holed).slice(0, 12), tmp_path / "data/train/a.parquet")
    with pytest.raises(SettingsError, match=r"--data: example 0 .*column 'y' has a null.* in row 3 of train/a.parquet"):
        fit(dist_cases.config(tmp_path / "run", data=str(tmp_path / "data")), Inline)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


# ------------------------------------------------------------------ S3 and Ray


def test_data_on_s3_and_a_file_that_changes_there(s3, tmp_path, expected):
    """A replaced object is told by its ETag, although it is as long as the old one."""
    write_parquet(tmp_path / "data")
    fs, url = fsspec.filesystem("s3", **s3.options), s3.url()
    root = url.removeprefix("s3://") + "/data [1]"
    for path in sorted((tmp_path / "data").rglob("*.parquet")):
        fs.pipe_file(f"{root}/{path.relative_to(tmp_path / 'data')}", path.read_bytes())
    options = {"data": f"{url}/data [1]", "data_storage_options": s3.options}
    fit(dist_cases.config(tmp_path / "run", loader_workers=1, **options), Inline)
    assert factors(tmp_path / "run") == expected[0]
    dataset = load_split(dist_cases.config(tmp_path / "run", **options), "train")
    reading = batches(dataset, 0, 44, 4)
    next(reading)
    content = fs.cat_file(f"{root}/train/b.parquet")
    fs.pipe_file(f"{root}/train/b.parquet", content[:8] + bytes([content[8] ^ 1]) + content[9:])
    with pytest.raises(ExampleError, match="train/b.parquet has changed since the data set was opened"):
        list(reading)


def test_ray_data_writes_what_the_job_reads(cluster, tmp_path):
    """Preprocessing that is too large for one process is Ray Data's: it writes Parquet, and that is the source."""
    import ray.data

    x = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
    rows = ray.data.from_items([{"x": x[i], "y": i} for i in range(10)], override_num_blocks=2)
    rows = rows.map_batches(lambda batch: {"x": batch["x"] * 2, "y": batch["y"]}, batch_format="numpy")
    rows.sort("y").write_parquet(str(tmp_path / "train"))
    dataset = load_split(dist_cases.config(tmp_path / "run", data=str(tmp_path)), "train")
    ((_, found, y),) = batches(dataset, 0, 10, 16)
    assert np.array_equal(found.numpy(), 2 * x[y.numpy()]) and sorted(y.tolist()) == list(range(10))
