"""Parquet and Arrow files: which files are a split, what is read of them, and at 10⁸ rows."""

from __future__ import annotations

import http.server
import pickle
import threading
import tracemalloc
from functools import partial

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_cases import Counting, Many, counted, load, table, write

from laplace_dist.data import arrow_ipc
from laplace_dist.data.loader import batches
from laplace_dist.errors import ExampleError, SettingsError, StorageError
from laplace_dist.plan.identity import fingerprint
from laplace_dist.plan.plan import build_plan
from laplace_dist.storage.sealed_json import seal_json

# ------------------------------------------------------------------ which files


def ys(dataset) -> list[int]:
    return [int(y) for _, _, part in batches(dataset, 0, len(dataset), 64) for y in part]


LAYOUTS = {
    "a folder": ["train/b.parquet", "train/a.parquet"],
    "folders in a folder": ["train/b/x.parquet", "train/a/y.PQ"],
    "files with numbers": ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"],
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_a_split_is_its_files_in_the_order_of_their_names(tmp_path, names):
    for number, name in enumerate(reversed(names)):
        write(tmp_path / name, table(4).set_column(1, "y", pa.array([number] * 4)))
    for other in (
        "train/_metadata",
        "train/.part.crc",
        "train/README.md",
        "train/_temporary/c.parquet",
        "test.parquet",
    ):
        (tmp_path / other).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / other).write_bytes(b"no rows of train")
    for url in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
        assert ys(load(url)) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/a.parquet", "train.parquet"], "has split 'train' twice (train.parquet, train/a.parquet); keep one"),
        (["train.parquet", "train-00000-of-00001.parquet"], "has split 'train' twice"),
        (["train/a.parquet", "train/b.arrow"], "has files of several kinds (arrow, parquet); keep one"),
        (["val/a.parquet", "shifted.parquet"], "has no split 'train'; it has shifted, val"),
        (["val/a.parquet", "train/a.csv"], "(train/a.csv is of none)"),
    ],
)
def test_a_split_that_is_not_clear_is_refused(tmp_path, names, words):
    for name in names:
        write(tmp_path / name, table())
    with pytest.raises(SettingsError) as caught:
        load(tmp_path)
    assert words in str(caught.value)


def test_one_file_is_no_folder_of_splits(tmp_path):
    path = write(tmp_path / "train.parquet", table())
    for url in (str(path), f"file://{path}"):
        with pytest.raises(
            SettingsError, match="train.parquet' is one file; give the folder that it lies in, where split 'train'"
        ):
            load(url)


def test_files_in_a_folder_called_data_are_found(tmp_path):
    """As data sets on Hugging Face's hub have them."""
    write(tmp_path / "data/train-00000-of-00001.parquet", table(4))
    assert len(load(tmp_path)) == 4


def test_files_of_other_schemas_are_refused(tmp_path):
    write(tmp_path / "train/a.parquet", table(4, z=np.arange(4)))
    write(tmp_path / "train/b.parquet", table(4).set_column(1, "y", pa.array([1.5] * 4)))
    with pytest.raises(
        SettingsError, match="column 'y' holds int64 in train/a.parquet and holds double in train/b.parq.*one schema"
    ):
        load(tmp_path)
    with pytest.raises(
        SettingsError, match="column 'z' holds int64 in train/a.parquet and is missing in train/b.parquet"
    ):
        load(tmp_path, dict_key_x="z", dict_key_y="z")


# ------------------------------------------------------------------ what is read


def test_a_pass_reads_each_row_group_once_and_no_other_column(tmp_path):
    """More than 64 KB lie between what is used, so that it would be noticed; a range reads its own row groups alone."""
    junk = pa.array([np.random.default_rng(i).bytes(40_000) for i in range(20)])
    path = write(
        tmp_path / "a.parquet", pa.table({"x": table()["x"], "junk": junk, "y": table()["y"]}), compression="none"
    )
    url = counted(path)
    dataset, size = load(url), path.stat().st_size
    assert [(n, length) for n, _, length in Counting.read] == [("a.parquet", 2**16)], "one read to open"
    Counting.read.clear()
    assert ys(dataset) == (np.arange(20) % 3).tolist()
    (_, _, footer), *groups = Counting.read
    assert footer < 5000 and [length < 1000 for _, _, length in groups] == [True] * 8, "two columns of four row groups"
    assert len({start for _, start, _ in groups}) == 8 and size > 700_000
    Counting.read.clear()
    list(batches(dataset, 6, 10, 2))
    assert len(Counting.read) == 2
    write(tmp_path / "a.parquet", table(), compression="none")
    dataset = load(counted(tmp_path / "a.parquet"))
    Counting.read.clear()
    ys(dataset)
    assert len(Counting.read) == 1 + 4, "columns that lie together are one read"


def test_a_footer_that_is_longer_than_what_is_read_first_is_read_again(tmp_path):
    path = write(tmp_path / "a.parquet", table(20, **{f"column {i}": np.arange(20) for i in range(300)}))
    dataset = load(counted(path))
    assert len(Counting.read) == 2 and len(dataset) == 20
    assert ys(dataset) == (np.arange(20) % 3).tolist()


def test_a_pass_over_arrow_reads_each_record_batch_once(tmp_path):
    with pa.ipc.new_file(tmp_path / "a.arrow", table().schema) as file:
        for batch in table().to_batches(max_chunksize=5):
            file.write_batch(batch)
    dataset = load(counted(tmp_path / "a.arrow"))
    Counting.read.clear()
    assert ys(dataset) == (np.arange(20) % 3).tolist()
    large = [start for _, start, length in Counting.read if length > 100]
    assert len(large) == len(set(large)) == 1 + 4, "the footer and four record batches"


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_the_rows_of_record_batches_are_those_that_pyarrow_finds(codec):
    """Which has to read the batches for that."""
    counts = [1, 7, 300, 2, 0, 5]
    strings = pa.array(["a", "é", "a"]).dictionary_encode()
    schema = pa.schema([("n", pa.int64()), ("s", strings.type)], metadata={"k": "v" * 1000})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as file:
        for count in counts:
            texts = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), strings.dictionary)
            file.write_batch(pa.record_batch([pa.array(range(count), pa.int64()), texts], schema=schema))
    content = sink.getvalue().to_pybytes()
    blocks = arrow_ipc._blocks(content[-arrow_ipc._footer_length(content) :])
    with pa.ipc.open_file(content) as reader:
        assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == counts
    assert [arrow_ipc._rows(content[offset : offset + header]) for offset, header, _ in blocks] == counts


def test_an_altered_byte_of_a_page_is_an_error_where_the_writer_has_put_checksums(tmp_path):
    path = write(
        tmp_path / "train/a.parquet", table(), compression="none", write_page_checksum=True, use_dictionary=False
    )
    good, column = path.read_bytes(), pq.read_metadata(path).row_group(1).column(0)
    last = column.data_page_offset + column.total_compressed_size - 1
    path.write_bytes(good[:last] + bytes([good[last] ^ 1]) + good[last + 1 :])
    dataset = load(tmp_path)
    assert dataset[0][0].tolist() == [0.0, 1.0]
    with pytest.raises(
        ExampleError, match=r"examples 4 to 7 .*train/a.parquet is damaged .*begins with row 5.*(crc|checksum|CRC)"
    ):
        list(batches(dataset, 0, 20, 4))


def test_an_arrow_stream_is_told_apart(tmp_path):
    (tmp_path / "train").mkdir()
    with pa.ipc.new_stream(tmp_path / "train/a.arrow", table().schema) as file:
        file.write_table(table())
    with pytest.raises(
        SettingsError, match="train/a.arrow is damaged or of another format .*Arrow stream.*new_file or Feather"
    ):
        load(tmp_path)


# ------------------------------------------------------------------ secrets, and many rows


def test_errors_do_not_repeat_the_options(tmp_path):
    class Locked(Counting):
        protocol, cachable, store, pseudo_dirs, shut = "locked", False, {}, [""], False

        def __init__(self, password="", **others):
            super().__init__()
            self.password = password

        def cat_file(self, path, *arguments, **options):
            if self.shut:
                raise PermissionError(f"{path}: {self.password} is not accepted")
            return super().cat_file(path, *arguments, **options)

    fsspec.register_implementation("locked", Locked, clobber=True)
    path = write(tmp_path / "a.parquet", table())
    Locked().pipe_file("/set/train/a.parquet", path.read_bytes())
    options = {"data_storage_options": {"password": "planted-secret"}}
    dataset = load("locked:///set", **options)
    Locked.shut = True
    for call in (
        lambda: dataset[0],
        lambda: load("locked:///set", **options),
    ):
        with pytest.raises((OSError, SettingsError)) as caught:
            call()
        assert (
            "train/a.parquet" in str(caught.value) and "planted" not in str(caught.value) and "***" in str(caught.value)
        )


def test_a_hundred_million_rows_are_planned_by_their_footers_alone(tmp_path):
    """A hundred files of a million rows, in row groups of 100,000: reads, bytes and memory do not follow the rows."""
    y = np.zeros(10**6, np.int8)
    path = write(tmp_path / "a.parquet", pa.table({"x": y, "y": y}), rows=10**5)
    Many.content, Many.count = path.read_bytes(), 100
    Counting.read.clear()
    tracemalloc.start()
    dataset = load("many:///set")
    assert len(dataset) == 10**8
    assert len(Counting.read) == 100 and sum(length for *_, length in Counting.read) <= 100 * 2**16
    Counting.read.clear()
    found = fingerprint(dataset)
    read = {(name, start) for name, start, _ in Counting.read}
    assert len(found["examples"]) == 64 and len(read) <= 2 * 8, (
        "at most eight row groups and the footers of their files"
    )
    spec = {"factors": {"w": {"shape": [2, 2], "symmetric": True}}}
    plan = build_plan(
        {"batch_size": 256, "segment_size": None}, data=found, weights="w", model={"path": "m:f", "args": {}}, spec=spec
    )
    content = seal_json(plan.to_values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.n_examples == 10**8 and len(plan.segments) <= 4096 and len(content) < 2**19
    assert len(pickle.dumps(dataset)) < 2**17 and peak < 12 * 2**20
    Counting.read.clear()
    segment = plan.segments[2000]
    ((_, x, _),) = batches(dataset, segment.start, segment.start + 256, 256)
    assert len(x) == 256 and len(Counting.read) == 2, "a footer and one row group"


def test_a_file_system_that_fails_is_no_mistake_of_the_settings(tmp_path, monkeypatch):
    """Another attempt may succeed, and a worker makes one; a file that is not there stays so."""
    url = counted(write(tmp_path / "a.parquet", table()))
    for error, kind in ((TimeoutError("no answer"), StorageError), (PermissionError("no"), SettingsError)):
        with monkeypatch.context() as patch:
            patch.setattr(Counting, "cat_ranges", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(kind, match=f"--data: train/a.parquet cannot be read .{type(error).__name__}: no"):
                load(url)


@pytest.mark.parametrize("parts", [True, False])
def test_a_web_server_has_to_send_parts_of_files(tmp_path, parts):
    path = write(tmp_path / "train/a.parquet", table())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked = self.headers.get("Range")
            if not parts or not asked or not self.path.endswith(".parquet"):
                return super().do_GET()
            start, stop = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            content = path.read_bytes()[start : stop + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dataset = load(f"http://127.0.0.1:{server.server_port}")
        if parts:
            assert ys(dataset) == (np.arange(20) % 3).tolist()
        else:
            with pytest.raises(
                ExampleError, match=r"train/a.parquet: \d+ bytes came for bytes .* sends parts of files"
            ):
                ys(dataset)
        server.shutdown()
