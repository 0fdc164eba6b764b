"""What files with columns must do, as tests to inherit beside those of `source_conformance`: choices, and what is no batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laplace_dist.data import example_weights
from laplace_dist.data.collate import Collate
from laplace_dist.data.loader import batches
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan.identity import fingerprint
from laplace_dist.testing.source_conformance import FileConformance, columns


def listed_rows(items: list[Any]) -> tuple[list[Any], torch.Tensor]:
    """Join anything, as a `--collate`: a list of inputs, and as targets the numbers of the examples in the batch."""
    return [item[0] for item in items], torch.arange(len(items))


class TableConformance(FileConformance):
    """Tests of files with columns: which of them make an example, and what cannot become a batch."""

    def _of(self, tmp_path: Path, **more: Any) -> tuple[str, dict[str, Any]]:
        values = {**columns(self.n), **more}
        return self.made(tmp_path, values={k: v for k, v in values.items() if v is not None})[0], values

    def test_columns_are_chosen_by_the_flags(self, tmp_path: Path) -> None:
        """A pair by --dict-key-x; a mapping of what `columns` lists, or of all there are; the targets by --dict-key-y."""
        z = np.arange(self.n, dtype=np.float32)
        folder, values = self._of(tmp_path, z=z, x=None, image=columns(self.n)["x"])
        x, y = self.load(folder, dict_key_x="image", dict_key_y="y")[5]
        assert np.array_equal(x.numpy(), values["image"][5]) and int(y) == values["y"][5]
        whole = self.load(folder, dict_key_y="y")
        assert {name: value.tolist() for name, value in whole[5].items()} == {
            "image": values["image"][5].tolist(),
            "z": 5.0,
            "y": values["y"][5],
        }
        ((_, found, y),) = batches(whole, 3, 9, 8, Collate(key_y="y"))
        assert found["z"].tolist() == z[3:9].tolist() and y.tolist() == values["y"][3:9].tolist()
        some = self.load(folder, dict_key_y="y", data_args={"columns": ["z", "y"]})
        assert sorted(some[0]) == ["y", "z"]

    def test_the_group_of_each_example_is_kept_apart(self, tmp_path: Path) -> None:
        """It is no input of the model."""
        shops = np.arange(self.n) % 3
        folder, _ = self._of(tmp_path, group=shops)
        assert self.load(folder).group == shops.tolist()
        assert len(self.load(folder)[0]) == 2
        folder, _ = self._of(tmp_path / "named", shop=shops, x=None, z=shops * 1.0)
        dataset = self.load(folder, dict_key_y="y", data_args={"group": "shop"})
        assert dataset.group == shops.tolist() and sorted(dataset[0]) == ["y", "z"]
        assert self.load(folder, dict_key_y="y").group is None
        folder, _ = self._of(tmp_path / "holed", group=["a" if i != 5 else None for i in range(self.n)])
        dataset = self.load(folder)
        with pytest.raises(SettingsError) as caught:
            _ = dataset.group
        assert "group" in str(caught.value) and dataset.where(5) in str(caught.value)
        assert self.load(folder, data_args={"group": None}).group is None

    def test_the_weight_of_each_example_is_kept_apart(self, tmp_path: Path) -> None:
        """It is no input, is read by range, and belongs to the training split."""
        weights = np.arange(self.n) / 4
        folder, _ = self._of(tmp_path, w=weights)
        dataset = self.load(folder, example_weights="w")
        assert example_weights.read(dataset, "w", 0, self.n).tolist() == weights.tolist()
        assert example_weights.read(dataset, "w", 5, 17).tolist() == weights[5:17].tolist()
        found = example_weights.facts(dataset, "w")
        assert (found["sum"], found["zero"]) == (weights.sum(), 1)
        example_weights.check_same(self.load(folder, example_weights="w"), found, "node a")
        assert [len(dataset[0]), fingerprint(dataset)] == [2, fingerprint(self.load(folder))]
        folder, _ = self._of(tmp_path / "wide", w=weights, x=None, z=weights * 2)
        assert sorted(self.load(folder, dict_key_y="y", example_weights="w")[0]) == ["y", "z"]
        with pytest.raises(SettingsError, match="^--example-weights: the split 'train' has no column 'v'; give it one"):
            example_weights.facts(self.load(folder, dict_key_y="y", example_weights="v"), "v")
        folder, _ = self._of(tmp_path / "other", w=weights + 1)
        with pytest.raises(SettingsError, match=r"example 0 .* on node b has the weight 1\.0, the driver's has 0\.0"):
            example_weights.check_same(self.load(folder, example_weights="w"), found, "node b")

    def test_a_weight_that_is_null_or_no_number_is_refused(self, tmp_path: Path) -> None:
        """By the row, and by the flag."""
        folder, _ = self._of(tmp_path, w=[1.0 if i != 5 else None for i in range(self.n)])
        dataset = self.load(folder, example_weights="w")
        with pytest.raises(ExampleError) as caught:
            example_weights.facts(dataset, "w")
        assert "w" in str(caught.value) and dataset.where(5) in str(caught.value)
        folder, _ = self._of(tmp_path / "negative", w=np.where(np.arange(self.n) == 9, -1.0, 1.0))
        dataset = self.load(folder, example_weights="w")
        with pytest.raises(SettingsError) as refused:
            example_weights.facts(dataset, "w")
        assert f"example 9 ({dataset.where(9)}) of the split 'train' has the weight -1.0" in str(refused.value)
        folder, _ = self._of(tmp_path / "words", w=["much"] * self.n)
        with pytest.raises(SettingsError, match="^--example-weights: 'w' of the split 'train' holds no numbers"):
            example_weights.facts(self.load(folder, example_weights="w"), "w")

    def test_a_missing_column_is_refused_with_those_that_are_there(self, tmp_path: Path) -> None:
        """By the flag that asks for it."""
        folder, _ = self._of(tmp_path, z=np.zeros(self.n))
        for flag, settings in (
            ("--dict-key-x", {"dict_key_x": "image", "dict_key_y": "y"}),
            ("--dict-key-y", {"dict_key_x": "x"}),
            ("--data-args: columns", {"data_args": {"columns": ["x", "image"]}, "dict_key_y": "y"}),
            ("--data-args: group", {"data_args": {"group": "shop"}}),
        ):
            with pytest.raises(SettingsError, match=rf"^{flag}: .* has no column '\w+'; it has x, y, z"):
                self.load(folder, **settings)
        with pytest.raises(SettingsError, match="--data-args: colums given.*columns, group, index"):
            self.load(folder, data_args={"colums": ["x"]})

    def test_rows_of_unequal_shapes_are_named_unless_collate_joins_them(self, tmp_path: Path) -> None:
        """With the file and the row of two of them."""
        ragged = [np.arange(3 + (i == 9), dtype=np.float32) for i in range(self.n)]
        folder, _ = self._of(tmp_path, x=ragged)
        dataset = self.load(folder)
        with pytest.raises(
            ExampleError, match=r"column 'x' has shape \(3,\) in .*row \d.* and \(4,\) in .*row \d.*--collate"
        ):
            list(batches(dataset, 0, self.n, 5))
        collate = Collate("laplace_dist.testing.table_conformance:listed_rows")
        found = [x for _, xs, _ in batches(dataset, 0, self.n, 5, collate) for x in _parts(xs)]
        assert [x.tolist() for x in found] == [x.tolist() for x in ragged]

    def test_strings_are_refused_unless_collate_joins_them(self, tmp_path: Path) -> None:
        """When the split is opened, with the way out."""
        texts = [f"text {i} é" for i in range(self.n)]
        folder, _ = self._of(tmp_path, x=texts)
        with pytest.raises(SettingsError, match="column 'x' of .* holds strings; .*--collate"):
            self.load(folder)
        path = "laplace_dist.testing.table_conformance:listed_rows"
        dataset = self.load(folder, collate=path)
        assert [x for _, xs, _ in batches(dataset, 0, self.n, 5, Collate(path)) for x in _parts(xs)] == texts

    def test_a_null_is_an_error_that_names_column_row_and_file(self, tmp_path: Path) -> None:
        """It never becomes a number; where it is not used it does no harm."""
        row = self.n - 2
        holed = [None if i == row else float(i) for i in range(self.n)]
        folder, _ = self._of(tmp_path, z=holed)
        assert len(list(batches(self.load(folder), 0, self.n, 5))) == 5
        dataset = self.load(folder, dict_key_x="z", dict_key_y="y")
        assert dataset[0][0].item() == 0.0
        with pytest.raises(ExampleError) as caught:
            list(batches(dataset, 0, self.n, 5))
        assert "z" in str(caught.value) and dataset.where(row) in str(caught.value)


def _parts(x: Any) -> list[Any]:
    return list(x.values()) if isinstance(x, Mapping) else x
