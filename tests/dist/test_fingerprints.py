"""Fingerprints of data sets: what they see of length, contents and types, and which data have none."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from item_cases import Items, pairs

from laplace_dist.data.collate import Collate
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.plan.identity import check_data, fingerprint


def test_the_fingerprint_sees_length_and_sampled_contents():
    base = fingerprint(Items(pairs(500)))
    assert base["length"] == 500
    assert fingerprint(Items(pairs(500))) == base
    assert fingerprint(Items(pairs(499)))["length"] == 499
    assert fingerprint(Items(pairs(499)))["sha256"] != base["sha256"]
    for index in (0, 499):
        changed = pairs(500)
        changed[index] = (changed[index][0] + 1e-3, changed[index][1])
        assert fingerprint(Items(changed))["sha256"] != base["sha256"]
    assert fingerprint(Items([(x + 1, y) for x, y in pairs(500)]))["sha256"] != base["sha256"]


@pytest.mark.parametrize("seconds, said", [(0.01, []), (1.0, ["about 81 s more"])])
def test_examples_that_take_long_to_read_are_said_once_while_they_are_read(monkeypatch, caplog, seconds, said):
    clock = iter(range(10**6))
    own = SimpleNamespace(monotonic=lambda: next(clock) * seconds)  # four seconds after three examples, 61 are left
    monkeypatch.setattr("laplace_dist.plan.identity.time", own)
    with caplog.at_level("INFO", "laplace_dist"):
        slow = fingerprint(Items(pairs(500)), "val")
    assert slow == fingerprint(Items(pairs(500)))
    lines = [text for text in caplog.messages if "data: reading 64 examples of split 'val', each twice" in text]
    assert [text.partition("; ")[2] for text in lines] == said


VALUES = [1, 1.0, True, "1", b"1", None, [1], [[1]], {"a": 1}, {"b": 1}, np.ones(1), torch.ones(1), torch.ones(1, 1)]


def test_the_fingerprint_tells_types_and_nesting_apart():
    digests = [fingerprint(Items([value]))["sha256"] for value in VALUES]
    assert len(set(digests)) == len(VALUES)


def test_the_fingerprint_reads_a_sample_only():
    class Counting(Items):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return self.items[index]

    dataset = Counting(pairs(5000))
    fingerprint(dataset)
    assert dataset.reads == 2 * 64, "each of them twice"


def test_random_augmentation_is_refused():
    class Noisy(Items):
        def __getitem__(self, index):
            return torch.randn(2), 0

    with pytest.raises(SettingsError, match=r"--data: example 0 .* differs between two readings.*augmentation off"):
        fingerprint(Noisy([None] * 4))


def test_examples_of_unknown_types_are_refused():
    with pytest.raises(SettingsError, match=r"--data: example 0 holds a builtins.object; expected tensors"):
        fingerprint(Items([(object(), 1)]))


class Picture:
    """What only the user's collate knows."""

    def __init__(self, value: float) -> None:
        self.value = value


def collate_pictures(items):
    return torch.tensor([[picture.value] for picture, _ in items]), torch.tensor([label for _, label in items])


def collate_to_pictures(items):
    return [picture for picture, _ in items], torch.tensor([label for _, label in items])


def test_what_collate_makes_of_an_example_of_another_type_stands_for_it():
    collate = Collate("test_fingerprints:collate_pictures")
    splits = [Items([(Picture(value + i), 0) for i in range(3)]) for value in (0.5, 0.5, 1.5)]
    one, same, other = (fingerprint(split, "train", collate) for split in splits)
    assert one == same and len({*one["examples"].values()}) == 3
    check_data(splits[0], same, "train", "node a", collate)
    with pytest.raises(SettingsError, match="other contents than the driver's: 3 of 3 sampled examples differ"):
        check_data(splits[0], other, "train", "node a", collate)
    with pytest.raises(SettingsError, match="--collate: the batch of example 0 holds a test_fingerprints.Picture"):
        fingerprint(splits[0], "train", Collate("test_fingerprints:collate_to_pictures"))


def test_an_example_that_cannot_be_read_is_named_by_the_fingerprint():
    with pytest.raises(ExampleError, match="example 1 cannot be read"):
        fingerprint(Items([(1, 2), OSError("gone")]))
