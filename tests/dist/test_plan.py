"""Segments cover the data exactly once; plans survive JSON, and say in words how they differ."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan, build_plan, differences
from laplace_dist.plan.segments import default_segment_size, plan_segments
from laplace_dist.run import layout
from laplace_dist.run.checkpoint import open_json
from laplace_dist.storage.sealed_json import seal_json

SETTINGS = {"batch_size": 8, "segment_size": 20, "seed": 0, "hessian_structure": "kron", "device_type": "cpu"}
SPEC = {"structure": "kron", "factors": {"a.weight/A": {"shape": (3, 3), "symmetric": True}}}


def make_plan(length=50, weights="w0", data="d0", model_args=None, spec=SPEC, **settings):
    return build_plan(
        {**SETTINGS, **settings},
        data={"length": length, "sha256": data},
        weights=weights,
        model={"path": "m:f", "args": model_args or {}},
        spec=spec,
    )


sizes = st.integers(1, 5000)


@given(n=sizes, segment_size=sizes, batch_size=st.integers(1, 600))
def test_segments_cover_every_example_once_in_whole_batches(n, segment_size, batch_size):
    segments = plan_segments(n, segment_size, batch_size)
    assert [s.start for s in segments] == [0, *(s.stop for s in segments[:-1])]
    assert segments[-1].stop == n
    assert all(s.stop > s.start for s in segments)
    assert all(s.start % batch_size == 0 for s in segments)
    lengths = {s.stop - s.start for s in segments[:-1]}
    assert len(lengths) <= 1
    assert all(segment_size <= length < segment_size + batch_size for length in lengths)
    assert [s.id for s in segments] == sorted({s.id for s in segments})


@given(n=st.integers(1, 10**9), batch_size=st.integers(1, 4096))
def test_default_segments_are_few_and_long_enough(n, batch_size):
    size = default_segment_size(n, batch_size)
    batches = -(-n // batch_size)
    count = -(-n // size)
    assert size % batch_size == 0
    assert count <= 4096
    if batches >= 256:
        assert size // batch_size >= 20
        assert count >= 8


@pytest.mark.parametrize(
    ("n", "batch_size", "batches", "count"),
    [(60_000, 256, 30, 8), (1_000_000, 256, 32, 123), (1, 256, 1, 1), (5, 2, 1, 3)],
)
def test_default_segment_sizes(n, batch_size, batches, count):
    size = default_segment_size(n, batch_size)
    assert size == batches * batch_size
    assert len(plan_segments(n, size, batch_size)) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 4, 4), "--data: got an empty data set"),
        ((5, 0, 4), "--segment-size: got 0"),
        ((5, 4, 0), "--batch-size: got 0"),
    ],
)
def test_sizes_below_one_are_refused(arguments, words):
    with pytest.raises(SettingsError, match=words):
        plan_segments(*arguments)


def test_a_plan_survives_json():
    plan = make_plan()
    again = Plan.from_values(plan.to_values())
    assert again == plan
    assert again.digest == plan.digest
    assert again.n_examples == 50
    assert [(s.start, s.stop) for s in again.segments] == [(0, 24), (24, 48), (48, 50)]


def test_a_default_that_is_spelled_out_is_the_same_plan():
    length, batch = 2000, 8
    assert make_plan(length, segment_size=None) == make_plan(length, segment_size=default_segment_size(length, batch))


DIFFER = [
    ({"batch_size": 4}, ["--batch-size: stored 8, now 4", "--segment-size: stored 24, now 20"]),
    ({"hessian_structure": "diag"}, ["--hessian-structure: stored 'kron', now 'diag'"]),
    ({"device_type": "cuda"}, ["--device: stored 'cpu', now 'cuda'"]),
    ({"length": 49}, ["--data: the train split's length changed: stored 50 examples, now 49"]),
    ({"data": "d1"}, ["--data (contents, as sha256): stored 'd0', now 'd1'"]),
    ({"weights": "w1"}, ["--weights (values, as sha256): stored 'w0', now 'w1'"]),
    ({"model_args": {"k": 1}}, ["--model-args: stored {}, now {'k': 1}"]),
    ({"seed": 5, "weights": "w1"}, ["--seed: stored 0, now 5", "--weights (values, as sha256): stored 'w0', now 'w1'"]),
]


@pytest.mark.parametrize(("changes", "lines"), DIFFER, ids=[str(c) for c, _ in DIFFER])
def test_differences_name_each_field_with_both_values(changes, lines):
    stored, now = make_plan(), make_plan(**changes)
    assert differences(stored, now) == lines
    assert stored.digest != now.digest


def test_equal_plans_do_not_differ():
    assert differences(make_plan(), make_plan()) == []


def test_sums_that_are_described_in_other_words_are_the_same():
    """As by another version of the core library."""
    block = {"parameter": "a.weight", "layer": "a", "factors": ["a.weight/A"]}
    said = [{**SPEC, "blocks": [{**block, "reason": word}]} for word in ("Linear", "a linear layer")]
    assert differences(*(make_plan(spec=spec) for spec in said)) == []
    assert differences(*(make_plan(spec=spec) for spec in (said[0], {**said[1], "blocks": [{**block, "layer": None}]})))


def test_another_specification_is_a_difference():
    other = {"structure": "kron", "factors": {}}
    assert "factors of the curvature" in differences(make_plan(), make_plan(spec=other))[0]


def test_a_newer_format_is_refused_by_version_number():
    newer = dataclasses.replace(make_plan(), format_version=FORMAT_VERSION + 1)
    with pytest.raises(SettingsError, match=rf"plan.json has format_version {FORMAT_VERSION + 1}.*newer version"):
        open_json(seal_json(newer.to_values()), layout.PLAN)


def test_every_altered_byte_of_sealed_json_is_noticed():
    values = {"format_version": FORMAT_VERSION, "name": "x", "n": [1, 2.5], "ok": True}
    data = seal_json(values)
    assert open_json(data, "k") == values
    for position in range(len(data)):
        for flip in (1, 4):
            altered = bytearray(data)
            altered[position] ^= flip
            try:
                assert open_json(bytes(altered), "some/key.json") == values  # white space may change without harm
                assert chr(data[position]).isspace()
            except (CheckpointError, SettingsError) as error:
                assert "some/key.json" in str(error)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"nope", b"\xff", b'{"sha256": 1}'])
def test_what_is_no_sealed_json_is_refused(data):
    with pytest.raises(CheckpointError, match=r"plan.json is truncated or altered.*--fresh"):
        open_json(data, "plan.json")


def test_a_truncated_plan_is_refused():
    data = seal_json(make_plan().to_values())
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match="plan.json is truncated"):
            open_json(data[:length], layout.PLAN)


def test_the_plan_holds_plain_json_only():
    assert json.loads(seal_json(make_plan().to_values()))["spec"]["factors"]["a.weight/A"]["shape"] == [3, 3]
