"""Windows that hold the same examples: found at any share that matters, and told from what repeats by nature."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
import torch
import window_cases
from torch.utils.data import TensorDataset
from window_cases import fit_inline

import laplace_dist
from laplace.drift.duplicates import common
from laplace_dist.errors import SettingsError
from laplace_dist.plan.sketch import ALL, KEPT, LEAST, SURE, ExampleDigests, Sketch, limit_of, merged, shared
from laplace_dist.recalibration import recalibrate
from laplace_dist.run import layout
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.storage.sealed_json import seal_json


def sketch_of(ids, limit=None):
    """Return the sketch of examples that are told apart by their numbers, as if every one had a digest of its own."""
    digests = np.random.default_rng(0).integers(0, ALL, 1 << 20, np.uint64, endpoint=False)
    return Sketch.of(limit or limit_of(len(ids)), digests[np.asarray(ids)])


# ------------------------------------------------------------------ what chance explains


def test_the_expected_number_is_that_of_values_dealt_out_at_random():
    """Against simulation: many values that occur several times, dealt to two samples of unequal sizes."""
    rng, times = np.random.default_rng(1), np.array([2] * 40 + [3] * 20 + [7] * 5)
    values = np.concatenate([np.repeat(np.arange(len(times)), times), np.arange(1000, 1600)])
    sizes, found, expected = (250, len(values) - 250), [], []
    for _ in range(2000):
        rng.shuffle(values)
        counts = [np.array([(part == value).sum() for value in range(len(times))]) for part in np.split(values, [250])]
        one = common(*counts, sizes)
        found.append(one.values)
        expected.append(one.expected)
    assert np.ptp(expected) < 1e-9 and abs(np.mean(found) - expected[0]) < 4 * np.std(found) / np.sqrt(2000) + 0.2


@pytest.mark.parametrize("level", [0.2, 0.05, 0.01])
def test_chance_is_taken_for_more_no_oftener_than_the_bound_says(level):
    rng, times = np.random.default_rng(2), np.repeat([2, 3, 5], [60, 30, 10])
    values, alarms = np.repeat(np.arange(len(times)), times), 0
    for _ in range(2000):
        one = rng.random(len(values)) < 0.3
        counts = np.bincount(values[one], minlength=100), np.bincount(values[~one], minlength=100)
        alarms += common(*counts, (int(one.sum()), int((~one).sum()))).p_value <= level
    assert alarms / 2000 <= level


def test_a_copy_is_no_chance_and_single_values_say_nothing():
    ones = np.ones(30, np.int64)
    assert common(ones, ones, (1000, 1000)).p_value == pytest.approx(2.0**-30)
    assert common(ones, ones, (1000, 9000)).p_value == pytest.approx(0.18**30)
    assert common(ones, 0 * ones, (1000, 1000)).p_value == 1 == common(3 * ones, 0 * ones, (90, 90)).p_value


# ------------------------------------------------------------------ sketches


@pytest.mark.parametrize("n", [1, KEPT, KEPT + 1, 10 * KEPT, 10**8])
def test_the_room_of_a_sketch_is_bounded(n):
    """All examples of a small window; of others about 4,096, or one in 512, which is 1.6 MB of 10^8."""
    share = limit_of(n) / ALL
    assert share == (1 if n <= KEPT else pytest.approx(max(KEPT / n, 1 / LEAST)))


def test_a_repeated_example_takes_no_more_room_than_one():
    found = ExampleDigests(ALL)
    for _ in range(50):
        found.add(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))
    values = found.sketch.to_values()
    assert found.sketch.n == 400 and values["repeats"] == [[0, 400]] and len(values["digests"]) == 12


def test_segments_merge_to_the_sketch_of_the_whole_in_any_cut():
    ids = np.random.default_rng(3).integers(0, 9000, 20_000)
    limit = limit_of(20_000)
    parts = [sketch_of(part, limit).to_values() for part in np.split(ids, [17, 5000, 19_999])]
    whole, again = sketch_of(ids), merged(parts)
    assert whole.to_values() == again.to_values() and again.n == sum(whole.counts)
    assert merged([*parts, None]) is None and merged([]) is None


def test_an_example_has_one_digest_in_whatever_batch_it_lies():
    x, y = {"a": torch.randn(12, 3, 2), "b": torch.arange(12)}, torch.arange(12) % 3
    for sizes in ([12], [5, 7], [1] * 12):
        found = ExampleDigests(ALL)
        for rows in torch.arange(12).split(sizes):
            found.add({name: value[rows] for name, value in x.items()}, y[rows])
        assert found.sketch.to_values() == whole_sketch(x, y).to_values() and found.sketch.n == 12
    assert shared(whole_sketch(x, y), whole_sketch(x, (y + 1) % 3))[0].values == 0, "targets count"
    assert shared(whole_sketch(x, y), whole_sketch({**x, "a": x["a"].double()}, y))[0].values == 0


def whole_sketch(x, y):
    found = ExampleDigests(ALL)
    found.add(x, y)
    return found.sketch


def test_batches_that_are_no_rows_have_no_sketch():
    for x in ({"text": ["a", "b"]}, torch.zeros(3, 2), {"a": torch.zeros(2, 2), "b": torch.tensor(1.0)}):
        assert whole_sketch(x, torch.zeros(2)) is None


@pytest.mark.parametrize("harm", ["order", "limit", "repeat", "text"])
def test_a_sketch_that_was_altered_is_refused(harm):
    values = Sketch.of(ALL // 2, np.array([5, 9, 9, 70], np.uint64)).to_values()
    changed = {
        "order": {"digests": Sketch(ALL, np.array([9, 5], np.uint64), np.ones(2, int)).to_values()["digests"]},
        "limit": {"limit": "6"},
        "repeat": {"repeats": [[3, 2]]},
        "text": {"digests": "%%"},
    }[harm]
    with pytest.raises(ValueError):
        Sketch.from_values({**values, **changed})


def overlap(first, second):
    found, size = shared(sketch_of(first), sketch_of(second))
    return found.p_value, found.excess / size


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(4000, 4000), (200_000, 200_000), (400_000, 4000)])
def test_copies_are_found_at_any_share_of_two_percent_and_more(sizes, share):
    n, m = sizes
    copied = int(share * m)
    if n * limit_of(n) / ALL * share * m / n < 12:  # fewer than a dozen of the copies are sampled
        copied = max(copied, 12 * max(n // KEPT, 1))
    p, found = overlap(np.arange(n), np.arange(n - copied, n - copied + m))
    assert p <= SURE and found > 0.01 and found == pytest.approx(copied / m, rel=0.5)


@pytest.mark.parametrize("kinds", [3, 50, 3000, 100_000])
def test_data_that_repeat_by_nature_are_not_taken_for_copies(kinds):
    """Tables of few different rows, drawn anew for every window: of most draws the others have the same."""
    rng = np.random.default_rng(4)
    weights = rng.dirichlet(np.full(kinds, 0.3))
    for sizes in ((20_000, 20_000), (60_000, 2000)):
        p, found = overlap(*(rng.choice(kinds, size, p=weights) for size in sizes))
        assert p > SURE or found <= 0.01


def test_copies_among_data_that_repeat_are_found():
    rng = np.random.default_rng(5)
    one, other = (rng.choice(400_000, 40_000) for _ in range(2))
    assert overlap(one, other)[0] > SURE
    p, found = overlap(one, np.concatenate([other[:30_000], one[:10_000]]))
    assert p <= SURE and 0.15 < found < 0.3


def test_the_cost_of_an_example_is_that_of_its_bytes():
    """Beside the digest of the batch, which has to be taken anyway; less than 20 microseconds of 3 kB on a busy machine."""
    x, y, found = torch.randn(256, 1, 28, 28), torch.zeros(256, dtype=torch.int64), ExampleDigests(ALL)
    times = []
    for _ in range(20):
        begun = time.process_time()
        found.add(x, y)
        times.append(time.process_time() - begun)
    assert min(times) / 256 < 20e-6


# ------------------------------------------------------------------ jobs


def rows(split: str, first: int, n: int, offset: float = 0.0) -> TensorDataset:
    """Return a contiguous part of one stream of examples; what is fresh is the same for every window."""
    if split != "train":
        return window_cases.days(split, "monday")
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(1000, 1, 6, 6, generator=generator)[first : first + n] + offset
    return TensorDataset(x, (x.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2))


def given(place, window, first, n, **changes):
    return window_cases.config(
        place,
        data="test_shared_examples:rows",
        data_args={"first": first, "n": n},
        window=window,
        batch_size=50,
        segment_size=100,
        **{"skip_tune": True, **changes},
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    place = tmp_path_factory.mktemp("shared") / "run"
    fit_inline(given(place, "a", 0, 400))
    return place


@pytest.fixture
def run(fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / "run")


def add(place, window, first, n=400, **changes):
    return recalibrate(given(place, window, first, n, **changes), laplace_dist.Inline)


def test_an_overlap_that_the_sampled_examples_miss_is_refused_and_nothing_is_lost(run):
    """30 of 400 examples, at other places than those of which the fingerprint has digests."""
    store = Checkpoint(str(run))
    before = store.read(layout.CURRENT)
    with pytest.raises(
        SettingsError, match="window b shares examples with window a: 30 different ones of 400 ones"
    ) as e:
        add(run, "b", 370)
    assert "--shared-examples 0.08" in str(e.value) and store.read(layout.CURRENT) == before
    assert add(run, "c", 400).promoted, "what was refused is in nobody's way"


def test_two_windows_that_are_not_in_one_posterior_may_share(run):
    assert add(run, "b", 370, windows="b").promoted
    with pytest.raises(SettingsError, match="shares examples with window"):
        add(run, "c", 500, n=300, windows="a,b,c")


def test_whoever_wants_it_may_have_it_count_twice(run):
    assert add(run, "b", 370, shared_examples=0.08).promoted
    found = open_json(Checkpoint(str(run)).read("windows/b/window.json"), layout.WINDOW)
    assert Sketch.from_values(found["examples"]).n == 400


def test_a_window_of_before_is_said_by_name_and_counts(run, capsys):
    store = Checkpoint(str(run))
    manifest = open_json(store.read(layout.WINDOW), layout.WINDOW)
    store.replace(layout.WINDOW, seal_json({k: v for k, v in manifest.items() if k not in ("read", "examples")}))
    assert add(run, "b", 370).promoted
    assert "whether a shares examples with other windows is not known" in capsys.readouterr().out


def few_kinds(split: str, first: int, n: int) -> TensorDataset:
    """Return examples of 30 kinds, drawn anew for every window."""
    if split != "train":
        return window_cases.days(split, "monday")
    kinds = rows("train", 0, 30).tensors
    chosen = torch.randint(30, (n,), generator=torch.Generator().manual_seed(first))
    return TensorDataset(*(tensor[chosen] for tensor in kinds))


def test_windows_of_data_that_repeat_by_nature_are_added(tmp_path):
    """Every example of the one is in the other too."""
    kinds = {"data": "test_shared_examples:few_kinds"}
    fit_inline(given(tmp_path, "a", 0, 200).model_copy(update=kinds))
    chosen = given(tmp_path, "b", 1, 200, shared_examples=0.0).model_copy(update=kinds)
    assert recalibrate(chosen, laplace_dist.Inline).promoted
