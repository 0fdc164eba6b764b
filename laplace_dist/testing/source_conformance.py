"""What every source of data must do, as tests to inherit: say how columns are written, and let pytest collect the subclass.

    class TestMine(FileConformance):
        def write(self, folder, split, columns):
            my_format.write(f"{folder}/{split}.mine", columns)

Inherit `SourceConformance` for anything that is read by range, `FileConformance` if the data are files, and that of
`table_conformance` if these files have columns, which users choose by the jobs' flags.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laplace_dist.config.settings import Config
from laplace_dist.data.loader import batches
from laplace_dist.data.read_ahead import ReadAhead
from laplace_dist.data.sources import load_split
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan.digests import feed
from laplace_dist.plan.identity import check_data, fingerprint

Columns = Mapping[str, Any]  # an array, or a list with a value for each row, by name
NAMES = ("run[1]", "данные é", "a b*?{c}", "100%25")


def columns(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return inputs of shape (n, 2, 3) and class labels."""
    generator = np.random.default_rng(seed)
    return {"x": generator.normal(size=(n, 2, 3)).astype(np.float32), "y": generator.integers(0, 5, n)}


class SourceConformance:
    """The tests that need nothing but rows; a subclass supplies `write`, and `load` if `--data` does not take the folder.

    Attributes:
        n: Rows of a usual split, in chunks of which the last one should be short.
        copies: Whether batches have memory of their own; slices of tensors in memory have not.
    """

    n, copies = 23, True

    def write(self, folder: str, split: str, columns: Columns) -> None:
        """Write a split into a folder, which exists: columns `x` and `y`, or whatever a test has."""
        raise NotImplementedError("Override write().")

    def load(self, folder: str, split: str = "train", **settings: Any) -> Any:
        """Return a split as the jobs do."""
        values = {"model": "m:f", "data": folder, "checkpoint": "unused", "loader_workers": 0, **settings}
        return load_split(Config(**values), split)

    def made(self, folder: Path, split: str = "train", values: Columns | None = None) -> tuple[str, Columns]:
        """Write a split and return the folder and what was written."""
        values = columns(self.n) if values is None else values
        folder.mkdir(parents=True, exist_ok=True)
        self.write(str(folder), split, values)
        return str(folder), values

    # -------------------------------------------------------------- length, rows, ranges

    def test_length_and_rows(self, tmp_path: Path) -> None:
        """In order and out of it, with the types that a pair of tensors has."""
        folder, values = self.made(tmp_path)
        dataset = self.load(folder)
        assert len(dataset) == self.n
        for index in [*range(self.n), *np.random.default_rng(0).permutation(self.n).tolist()]:
            x, y = dataset[index]
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
            assert np.array_equal(x.numpy(), values["x"][index]) and int(y) == values["y"][index]
        with pytest.raises(IndexError):
            dataset[self.n]

    @pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
    def test_any_range_is_the_rows_read_otherwise(self, tmp_path: Path, batch_size: int) -> None:
        """Whatever was read before, and whatever is done to a batch that was handed out."""
        folder, values = self.made(tmp_path)
        dataset = self.load(folder)
        for start, stop in (
            (0, self.n),
            (5, self.n),
            (3, 4),
            (3, 4),
            (self.n - 1, self.n),
            (0, 9),
            (2, 6),
            (1, 6),
            (2, 17),
        ):
            at = start
            for offset, x, y in batches(dataset, start, stop, batch_size):
                rows = slice(at, min(at + batch_size, stop))
                assert offset == at and np.array_equal(x.numpy(), values["x"][rows])
                assert np.array_equal(y.numpy(), values["y"][rows])
                if self.copies:
                    x.zero_(), y.zero_()
                at = rows.stop
            assert at == stop

    def test_one_row(self, tmp_path: Path) -> None:
        """A split of one example is one batch."""
        folder, values = self.made(tmp_path, values=columns(1))
        ((_, x, y),) = batches(self.load(folder), 0, 1, 4)
        assert np.array_equal(x.numpy(), values["x"]) and y.tolist() == values["y"].tolist()

    def test_an_empty_split_is_refused(self, tmp_path: Path) -> None:
        """Before anything is planned, by its name."""
        folder, _ = self.made(tmp_path)
        self.made(tmp_path, "val", {name: value[:0] for name, value in columns(1).items()})
        with pytest.raises(SettingsError, match="empty data set for split 'val'"):
            self.load(folder, "val")

    def test_a_split_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        """With those that are."""
        folder, _ = self.made(tmp_path)
        self.made(tmp_path, "shifted")
        with pytest.raises(SettingsError) as caught:
            self.load(folder, "test")
        assert "'test'" in str(caught.value) and "shifted, train" in str(caught.value)

    @pytest.mark.parametrize("name", NAMES)
    def test_names_are_taken_as_they_are(self, tmp_path: Path, name: str) -> None:
        """Other alphabets, spaces, and what means something to a shell or a URL."""
        folder, values = self.made(tmp_path / name / "data")
        ((_, x, _),) = batches(self.load(folder), 0, self.n, self.n)
        assert np.array_equal(x.numpy(), values["x"])

    # -------------------------------------------------------------- identity

    def test_the_fingerprint_is_stable(self, tmp_path: Path) -> None:
        """Of the same data opened again, sent elsewhere, or written to another place."""
        folder, values = self.made(tmp_path / "one")
        dataset = self.load(folder)
        found = fingerprint(dataset)
        assert found["length"] == self.n
        sent = pickle.loads(pickle.dumps(dataset))
        other = self.load(self.made(tmp_path / "two", values=values)[0])
        for same in (dataset, self.load(folder), sent, other):
            assert fingerprint(same) == found
            check_data(same, found, "train", "node a")

    def test_the_fingerprint_sees_any_change_of_one_example(self, tmp_path: Path) -> None:
        """Of an input, of a target, of the order, of the number; as far as it samples, which is all of a small set."""
        folder, values = self.made(tmp_path / "one")
        found = fingerprint(self.load(folder))
        for number, changed in enumerate(self._changes(values)):
            dataset = self.load(self.made(tmp_path / f"other {number}", values=changed)[0])
            assert fingerprint(dataset)["sha256"] != found["sha256"], number
            with pytest.raises(SettingsError, match="the split 'train' on node a has"):
                check_data(dataset, found, "train", "node a")

    def _changes(self, values: Columns) -> Iterator[dict[str, np.ndarray]]:
        for index in range(0, self.n, 3):
            for name in ("x", "y"):
                changed = {key: value.copy() for key, value in values.items()}
                changed[name][index] += 1
                yield changed
        yield {key: value[::-1].copy() for key, value in values.items()}
        yield {key: value[:-1] for key, value in values.items()}

    def test_the_digest_is_that_of_the_very_numbers(self, tmp_path: Path) -> None:
        """What a partial's manifest records of a range does not depend on where the numbers lie."""
        folder, values = self.made(tmp_path)
        found, wanted = hashlib.sha256(), hashlib.sha256()
        for offset, x, y in batches(self.load(folder), 2, self.n, 5):
            feed(found, (x, y))
            rows = slice(offset, offset + 5)
            feed(wanted, (torch.tensor(values["x"][rows]), torch.tensor(values["y"][rows])))
        assert found.digest() == wanted.digest()

    def test_batches_are_the_same_from_any_number_of_processes(self, tmp_path: Path) -> None:
        """The data set is sent to them; each reads what is asked of it, in any order."""
        folder, values = self.made(tmp_path)
        dataset = self.load(folder)
        dataset[3]
        found = {}
        for workers in (0, 1, 2):
            ahead = ReadAhead(dataset, 4, workers=workers)
            try:
                found[workers] = [(i, x.clone(), y.clone()) for i, x, y in ahead.batches(1, self.n)]
            finally:
                ahead.close()
        for workers in (0, 1, 2):
            assert [i for i, _, _ in found[workers]] == list(range(1, self.n, 4))
            assert np.array_equal(torch.cat([x for _, x, _ in found[workers]]).numpy(), values["x"][1:])
            assert np.array_equal(torch.cat([y for _, _, y in found[workers]]).numpy(), values["y"][1:])


class FileConformance(SourceConformance):
    """Tests of data in files: what is damaged, replaced or gone is an error that names it."""

    def files(self, folder: str, split: str) -> list[Path]:
        """Return the files that hold the rows of a split."""
        return sorted(path for path in Path(folder).rglob("*") if path.is_file())

    def name_of(self, file: Path) -> str:
        """Return what a message about a file has to contain."""
        return file.name

    def _read_all(self, folder: str) -> None:
        for _ in batches(self.load(folder), 0, self.n, 4):
            pass

    def test_a_truncated_file_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        """Wherever it is cut."""
        folder, _ = self.made(tmp_path)
        for file in self.files(folder, "train"):
            good = file.read_bytes()
            for length in sorted({0, 1, 13, len(good) // 3, 2 * len(good) // 3, len(good) - 9, len(good) - 1}):
                file.write_bytes(good[:length])
                with pytest.raises((SettingsError, ExampleError)) as caught:
                    self._read_all(folder)
                assert self.name_of(file) in str(caught.value), length
            file.write_bytes(good)
        self._read_all(folder)

    def test_a_file_that_is_no_such_file_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        """Such as the page of an error that was saved under its name."""
        folder, _ = self.made(tmp_path)
        file = self.files(folder, "train")[0]
        file.write_bytes(b"<html>404 Not Found</html>" * 80)
        with pytest.raises((SettingsError, ExampleError)) as caught:
            self._read_all(folder)
        assert self.name_of(file) in str(caught.value)

    @pytest.mark.parametrize("what", ["replaced", "removed", "altered"])
    def test_a_file_that_changes_under_an_open_data_set_is_an_error(self, tmp_path: Path, what: str) -> None:
        """From the plan to the read, also in the file that was read last; the job that comes next has another fingerprint."""
        folder, _ = self.made(tmp_path / "one")
        dataset = self.load(folder)
        found, reading = fingerprint(dataset), batches(dataset, 0, self.n, 2)
        next(reading)
        other, _ = self.made(tmp_path / "two", values=columns(self.n, seed=1))
        for file, new in zip(self.files(folder, "train"), self.files(other, "train"), strict=True):
            time = file.stat().st_mtime_ns + 10**9
            if what == "removed":
                file.unlink()
                continue
            content = new.read_bytes() if what == "replaced" else _one_bit_off(file.read_bytes())
            file.write_bytes(content)
            os.utime(file, ns=(time, time))
        with pytest.raises(ExampleError) as caught:
            list(reading)
        assert any(self.name_of(file) in str(caught.value) for file in (self.files(folder, "train") or [Path("train")]))
        if what == "replaced":
            assert fingerprint(self.load(folder))["sha256"] != found["sha256"]


def _one_bit_off(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
