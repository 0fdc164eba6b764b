"""Tar shards: WebDataset's rules, an index that is written only where it is asked for, and damaged archives."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import source_cases
import torch
from source_cases import Counting, add, counted, load, npy, shard

from laplace_dist.data import example_weights, tar_index
from laplace_dist.data.collate import Collate
from laplace_dist.data.loader import batches
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan.identity import fingerprint


def first(dataset) -> list[float]:
    return [float(row[0]) for _, x, _ in batches(dataset, 0, len(dataset), 3) for row in x]


def test_folders_and_members_that_are_no_example_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        add(tar, "part", type=tarfile.DIRTYPE)
        for name in ("LICENSE", "part/.DS_Store", "__index__.json__"):
            add(tar, name, b"{}")
        for row in range(3):
            add(tar, f"part/{row:03d}.y.cls", str(row).encode())
            add(tar, f"part/{row:03d}.x.npy", npy(float(row)))
    dataset = load(tmp_path)
    assert len(dataset) == 3 and [dataset[i][1].item() for i in range(3)] == [0, 1, 2]
    assert dataset.where(2) == "row 2 (part/002) of train-000000.tar"


def decoded(items):
    """What a `--collate` does with images, whose bytes it gets."""
    x = torch.tensor([[float(item["jpg"].decode()), len(item["json"]["tags"])] for item in items])
    return x, torch.tensor([int(item["cls"]) for item in items])


def test_members_of_other_kinds_reach_collate_as_they_are(tmp_path):
    kinds = {"jpg": lambda i: str(i).encode(), "json": lambda i: json.dumps({"tags": ["a"] * i}).encode()}
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i in range(4):
            for ending, make in kinds.items():
                add(tar, f"{i}.{ending}", make(i))
            add(tar, f"{i}.cls", b"2")
    with pytest.raises(SettingsError, match="column 'jpg' .* holds bytes.*--collate"):
        load(tmp_path, dict_key_y="cls")
    path = "test_tar_shards:decoded"
    dataset = load(tmp_path, dict_key_y="cls", collate=path)
    ((_, x, y),) = batches(dataset, 1, 4, 4, Collate(path))
    assert x.tolist() == [[1, 1], [2, 2], [3, 3]] and y.tolist() == [2, 2, 2]


def test_a_range_reads_its_own_bytes_once(tmp_path, monkeypatch):
    monkeypatch.setattr("laplace_dist.data.tar_shards.MOST", 4)
    large = {"jpg": lambda row: bytes([row]) * 100_000}
    url = counted(shard(tmp_path / "0.tar", **large))
    dataset = load(url)
    assert [start for _, start, _ in Counting.read] == ["opened"]
    Counting.read.clear()
    list(batches(dataset, 4, 8, 3))
    assert len({start for _, start, _ in Counting.read}) == len(Counting.read) <= 8
    assert sum(length for *_, length in Counting.read) < 10_000, "no pictures"


# ------------------------------------------------------------------ the index


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def scanned(monkeypatch):
    """Note which shards are scanned."""
    found, scan = [], tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda place, file: found.append(file.name) or scan(place, file))
    return found


def test_nothing_is_written_unless_it_is_asked_for(tmp_path, scanned):
    shard(tmp_path / "data/train/0.tar")
    for _ in range(2):
        assert first(load(tmp_path / "data")) == list(range(8))
    assert scanned == ["train/0.tar"] * 2 and everything(tmp_path) == {"data/train/0.tar"}


@pytest.mark.parametrize("beside", [True, False])
def test_the_index_is_written_once(tmp_path, scanned, beside):
    data, place = tmp_path / "data", tmp_path / ("data" if beside else "index")
    shard(data / "train/0.tar")
    shard(data / "train/1.tar", range(8, 13))
    settings = {"data_args": {"index": str(place)}}
    found = fingerprint(load(data, **settings))
    assert scanned == ["train/0.tar", "train/1.tar"] and "train.tar-index.json" in everything(place)
    written = everything(tmp_path)
    again = load(data, **settings)
    assert len(scanned) == 2 and first(again) == list(range(13)) and everything(tmp_path) == written
    assert fingerprint(again) == found == fingerprint(load(data)), "with and without"
    (data / "train/1.tar").unlink()
    shard(data / "train/1.tar", range(20, 25))
    del scanned[:]
    assert first(load(data, **settings)) == [*range(8), *range(20, 25)]
    assert scanned == ["train/1.tar"], "the one that was replaced"


def test_a_damaged_index_is_named(tmp_path):
    shard(tmp_path / "data/train/0.tar")
    settings = {"data_args": {"index": str(tmp_path / "index")}}
    load(tmp_path / "data", **settings)
    (table,) = (tmp_path / "index/train").glob("*.npz")
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ExampleError, match="index .*0.tar.*npz is missing or damaged; delete train.tar-index.json"):
        first(load(tmp_path / "data", **settings))
    manifest = tmp_path / "index/train.tar-index.json"
    manifest.write_text(json.dumps({"format": 99}))
    with pytest.raises(SettingsError, match="train.tar-index.json is of another version; delete it"):
        load(tmp_path / "data", **settings)
    manifest.write_text("{")
    with pytest.raises(SettingsError, match="train.tar-index.json is damaged; delete it"):
        load(tmp_path / "data", **settings)
    manifest.unlink()
    assert first(load(tmp_path / "data", **settings)) == list(range(8))
    with pytest.raises(SettingsError, match="--data-args: index takes a path or URL"):
        load(tmp_path / "data", data_args={"index": 3})


# ------------------------------------------------------------------ damaged archives


def scattered(tar):
    add(tar, "a.x.npy", npy(1.0)), add(tar, "b.x.npy", npy(1.0)), add(tar, "a.y.cls", b"1")


def twice(tar):
    add(tar, "a.x.npy", npy(1.0)), add(tar, "a.x.npy", npy(1.0))


def link(tar):
    add(tar, "a.x.npy", type=tarfile.SYMTYPE, linkname="b.x.npy")


BAD = {
    scattered: "the members of example 'a' do not follow each other",
    twice: "there are two members 'a.x.npy'",
    link: "member 'a.x.npy' is a link or the like",
}


@pytest.mark.parametrize("make", BAD)
def test_what_is_no_row_of_examples_is_refused(tmp_path, make):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        make(tar)
    with pytest.raises(SettingsError, match=f"train-0.tar is no whole, plain tar file .*{BAD[make]}"):
        load(tmp_path)


def test_a_damaged_header_does_not_end_the_shard_quietly(tmp_path):
    """`tarfile` takes it for the end of the archive."""
    path = shard(tmp_path / "train-0.tar")
    with tarfile.open(path) as tar:
        header = tar.getmembers()[6].offset
        good = path.read_bytes()
    path.write_bytes(good[:header] + bytes([good[header] ^ 1]) + good[header + 1 :])
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 6
    with pytest.raises(SettingsError, match=f"after byte {header} there is neither a member nor the end"):
        load(tmp_path)
    path.write_bytes(good[:header])
    with pytest.raises(SettingsError, match="its end is cut off"):
        load(tmp_path)


def test_a_member_that_cannot_be_read_is_named(tmp_path):
    shard(tmp_path / "train-0.tar", z__npy=lambda row: b"")
    with tarfile.open(tmp_path / "train-1.tar", "w") as tar:
        add(tar, "a.x.npy", b"no array"), add(tar, "a.y.cls", b"cat")
    dataset = load(tmp_path, dict_key_x="x", dict_key_y="y")
    for settings, member in (({}, "a.x.npy"), ({"dict_key_x": "y", "dict_key_y": "y"}, "a.y.cls")):
        with pytest.raises(
            ExampleError, match=rf"example 8 cannot be read .*member {member} of train-1.tar cannot be read"
        ):
            list(batches(load(tmp_path, **settings), 8, 9, 1))
    assert len(dataset) == 9


def test_compressed_shards_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    shard(tmp_path / "train/0.tar").rename(tmp_path / "train/0.tar.gz")
    shard(tmp_path / "val/0.tar")
    with pytest.raises(
        SettingsError, match=r"no split 'train' with files of a known kind \(train/0.tar.gz is of none\)"
    ):
        load(tmp_path)
    import gzip

    (tmp_path / "train/0.tar.gz").unlink()
    plain = shard(tmp_path / "val/0.tar").read_bytes()
    (tmp_path / "train/0.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(SettingsError, match="train/0.tar is no whole, plain tar file"):
        load(tmp_path)
    assert source_cases.load(tmp_path, "val")


def test_a_read_that_comes_back_short_is_an_error(tmp_path, monkeypatch):
    """A class of two digits would otherwise lose one."""
    dataset = load(counted(shard(tmp_path / "0.tar")))
    whole = Counting.cat_ranges
    monkeypatch.setattr(Counting, "cat_ranges", lambda *a, **k: [content[:-1] for content in whole(*a, **k)])
    with pytest.raises(ExampleError, match=r"train/0.tar ends within bytes \d+ to \d+: it is truncated; restore it"):
        first(dataset)


def test_weights_that_take_long_to_read_are_said_before_they_are_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("laplace_dist.data.tar_shards.MOST", 4)
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i in range(40):
            add(tar, f"{i:02d}.x.npy", npy(float(i)))
            add(tar, f"{i:02d}.y.cls", b"1")
            add(tar, f"{i:02d}.w.json", str(i + 0.5).encode())
    dataset = load(tmp_path, example_weights="w")
    with caplog.at_level("INFO", logger="laplace_dist"):
        found = example_weights.facts(dataset, "w")
        assert caplog.text == ""
        monkeypatch.setattr(example_weights, "SLOW_SECONDS", 0.0)
        assert example_weights.facts(dataset, "w") == found
    assert "data: reading the weights 'w' of all 40 examples" in caplog.text and found["sum"] == 800.0
