"""What works in a `DataLoader` works here: examples of every form, batches on a device, and how they reach a model."""

from __future__ import annotations

import copy
from collections import UserDict

import calling_cases
import dist_cases
import numpy as np
import pytest
import torch
from calling_cases import FORMS, Point, Rows
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from laplace import Laplace
from laplace.data.calling import adapted
from laplace.data.nested import flat, nested, parts
from laplace.errors import CallError
from laplace_dist import load_posterior
from laplace_dist.data.collate import Collate
from laplace_dist.data.device import to_device
from laplace_dist.data.loader import batches
from laplace_dist.errors import ExampleError, SettingsError
from laplace_dist.run.weights import weights_digest

CALLS = {
    "TwoArguments": [form for form in FORMS if form != "a nested mapping"],
    "OneList": ["three in a row", "nested", "numpy"],
    "OneMapping": ["a mapping", "a mapping and y"],
    "NestedMapping": ["a nested mapping"],
    "Anything": ["a mapping", "a mapping and y"],
}


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind, forms in CALLS.items() for form in forms])
def test_every_form_of_example_reaches_the_model_as_its_forward_takes_it(kind, form):
    a, b, y = calling_cases.numbers()
    plain = calling_cases.model("TwoArguments")
    model = adapted(calling_cases.model(kind))
    for start, x, targets in batches(Rows(FORMS[form]), 2, 11, 4):
        rows = slice(start, start + len(targets))
        assert targets.tolist() == y[rows].tolist() and not targets.is_floating_point()
        assert torch.equal(model(x), plain(a[rows], b[rows]))


@pytest.mark.parametrize(("kind", "form"), [("TwoArguments", "nested"), ("NestedMapping", "a nested mapping")])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_posterior_is_that_of_a_network_with_one_tensor(tmp_path, kind, form, structure):
    """The core library cuts the inputs into parts, differentiates example by example, and asks for two at a time."""

    class One(calling_cases.Two):
        def forward(self, x):
            return self.of(x[:, :4], x[:, 4:])

    alone_model = One().eval()
    alone_model.scale.requires_grad_(False)
    alone = Laplace(alone_model, "classification", "all", structure)
    a, b, y = calling_cases.numbers()
    x = torch.cat([a, b], 1)
    alone.fit(DataLoader(list(zip(x, y, strict=True)), batch_size=4))
    case = {"model": "calling_cases:model", "model_args": {"kind": kind}}
    data = {"data": "calling_cases:rows", "data_args": {"form": form}, "skip_tune": False, "skip_evaluate": False}
    config = dist_cases.config(tmp_path, **case, **data, hessian_structure=structure, grid_size=3)
    _, metrics = dist_cases.run_inline(config)
    la = load_posterior(str(tmp_path), calling_cases.model(kind), tuned=False)
    for name, value in alone.sums.to_tensors().items():
        torch.testing.assert_close(la.sums.to_tensors()[name], value, rtol=1e-5, atol=1e-6)
    _, inputs, _ = next(batches(Rows(FORMS[form]), 0, 12, 12))
    torch.testing.assert_close(la(inputs), alone(x), rtol=1e-5, atol=1e-6)
    assert set(metrics) == {"map", "laplace"}


# ------------------------------------------------------------------ Hugging Face


class Wrapped(nn.Module):
    """The wrapper that laplace-torch asks for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, data):
        return self.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits


@pytest.mark.parametrize("changes", [{}, {"collate": "calling_cases:to_encoding"}, {"dict_key_y": "target"}], ids=str)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_hugging_face_model_runs_as_it_is(tmp_path, subset, changes):
    key = changes.get("dict_key_y", "labels")
    data = {"data": "calling_cases:sentences", "data_args": {"key": key}}
    config = dist_cases.config(tmp_path, model="calling_cases:bert", **data, subset_of_weights=subset, **changes)
    dist_cases.run_inline(config)
    model = calling_cases.bert()
    la = load_posterior(str(tmp_path), model)
    alone = Laplace(Wrapped(calling_cases.bert()), "classification", subset, "kron", dict_key_y=key)
    alone.fit(DataLoader(calling_cases.sentences("train", key), batch_size=4))
    theirs = {name.removeprefix("model."): value for name, value in alone.sums.to_tensors().items()}
    assert theirs.keys() == la.sums.to_tensors().keys()
    for name, value in la.sums.to_tensors().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
    batch = next(iter(DataLoader(calling_cases.sentences("test", key), batch_size=5)))
    torch.testing.assert_close(la(batch), alone(batch), rtol=1e-4, atol=1e-6)
    inputs = {name: value for name, value in batch.items() if name != key}
    torch.testing.assert_close(la(inputs), la(batch))
    assert type(model(**inputs)).__name__ == "SequenceClassifierOutput", "the user's own object is left as it was"


def test_indices_alone_reach_a_hugging_face_model_too():
    model, ids = calling_cases.bert(), calling_cases.sentences("train").ids
    assert torch.equal(adapted(model)(ids), model(ids).logits)


# ------------------------------------------------------------------ the adapted model


def test_adapting_changes_no_name_no_weight_and_not_the_model_itself():
    model = calling_cases.model("Anything")
    before = copy.copy(model.__dict__)
    twin = adapted(model)
    assert twin is not model and adapted(twin) is twin and type(twin) is type(model)
    assert model.__dict__ == before and not model._forward_pre_hooks and not model._forward_hooks
    assert {n: id(p) for n, p in twin.named_parameters()} == {n: id(p) for n, p in model.named_parameters()}
    assert {n: id(b) for n, b in twin.named_buffers()} == {n: id(b) for n, b in model.named_buffers()}
    assert [n for n, _ in twin.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(twin.state_dict()) == list(model.state_dict())
    assert weights_digest(twin) == weights_digest(model)
    model.double()
    assert twin.first.weight.dtype == torch.float64, "what becomes of the model becomes of its twin"


def test_an_adapted_model_can_be_copied_and_called_with_other_weights():
    a, b, _ = calling_cases.numbers()
    twin = adapted(calling_cases.model("TwoArguments"))
    x = {"a": a, "b": b}
    other = copy.deepcopy(twin)
    with torch.no_grad():
        other.last.bias += 1
    assert torch.allclose(other(x), twin(x) + 1)
    changed = {**dict(twin.named_parameters()), "last.bias": other.last.bias}
    assert torch.allclose(torch.func.functional_call(twin, changed, (x,)), twin(x) + 1)


def test_scripted_models_are_left_alone():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    assert adapted(model) is model


MISMATCHES = [
    ({"a": 1, "b": 2, "c": 3, "labels": 4}, ["takes a, b of the batch by name", "does not take c"]),
    ({"a": 1, "labels": 4}, ["takes a of the batch by name", "needs b too"]),
]


@pytest.mark.parametrize(("batch", "words"), MISMATCHES, ids=["one too many", "one too few"])
def test_a_mapping_of_which_forward_takes_a_part_is_refused_not_cut_down(batch, words):
    with pytest.raises(CallError) as caught:
        adapted(calling_cases.model())(batch)
    for word in words:
        assert word in str(caught.value)


def test_targets_go_to_a_forward_that_cannot_do_without():
    class Needs(calling_cases.Two):
        def forward(self, a, b, labels):
            return self.of(a, b) + labels[:, None]

    a, b, y = calling_cases.numbers()
    model = adapted(Needs())
    assert torch.equal(model({"a": a, "b": b, "labels": y}), model.of(a, b) + y[:, None])


# ------------------------------------------------------------------ nested inputs


def test_nested_inputs_come_back_as_a_loader_gives_them():
    t = torch.zeros(2)
    for x in (t, ["a", "b"], {"a": t, "b": ["x", "y"]}, UserDict(a=t)):
        assert flat(x) is x
    deep = {"a": {"b": [t, t + 1]}, "c": [[t], {"d": ["x", "y"]}]}
    leaves = flat(deep)
    assert set(leaves) == {("a", "b", 0), ("a", "b", 1), ("c", 0, 0), ("c", 1, "d")}
    assert nested(leaves) == deep
    assert nested(parts([t, {"k": t}])) == [t, {"k": t}]


def test_a_batch_moves_to_a_device_whatever_holds_it():
    """The device `meta` stands for a GPU: what lies there has moved."""
    t, meta = torch.zeros(2), torch.device("meta")
    encoding = BatchEncoding({"ids": t})
    encoding.note = "kept"
    batch = {"a": [t, (t, 3)], "b": Point(t, "text", 1.0), "c": UserDict(d=t), "e": encoding, "f": None}
    moved = to_device(batch, meta)
    found = [moved["a"][0], moved["a"][1][0], moved["b"].a, moved["c"]["d"], moved["e"]["ids"]]
    assert all(tensor.device == meta for tensor in found) and t.device.type == "cpu"
    assert [type(moved[key]) for key in "bce"] == [Point, UserDict, BatchEncoding]
    assert (moved["a"][1][1], moved["b"].b, moved["e"].note, moved["f"]) == (3, "text", "kept", None)
    assert batch["e"]["ids"] is t


# ------------------------------------------------------------------ collate


def sequences(n=6):
    return [(torch.arange(float(i + 1)), i) for i in range(n)]


def test_examples_of_unequal_length_are_joined_by_a_function_of_the_users():
    collate = Collate("loading_cases:join", "ids", "target")
    ((offset, x, y),) = batches(sequences(), 1, 4, 8, collate)
    assert (offset, x["ids"].shape, x["lengths"].tolist(), y.tolist()) == (1, (3, 4), [2, 3, 4], [1, 2, 3])


def test_a_function_that_joins_gets_the_examples_themselves_of_every_data_set():
    from torch.utils.data import TensorDataset

    asked = []
    collate = Collate("loading_cases:join")
    object.__setattr__(collate, "batch", lambda items, start: asked.append(items) or (torch.zeros(2), torch.zeros(2)))
    list(batches(TensorDataset(torch.zeros(2, 3), torch.arange(2)), 0, 2, 2, collate))
    assert [[type(part) for part in item] for item in asked[0]] == [[torch.Tensor, torch.Tensor]] * 2


BATCHES = [
    (
        Collate("loading_cases:bad_join"),
        (1, 1),
        ExampleError,
        "--collate: 'loading_cases:bad_join' fails on examples 0 to 1",
    ),
    (Collate("nowhere:f"), (1, 1), SettingsError, "--collate: got 'nowhere:f'; there is no module"),
    (Collate(key_y="y"), {"x": 1, "z": 2}, SettingsError, "--dict-key-y: a batch is a mapping of x, z, without 'y'"),
    (Collate(key_x="w"), {"x": 1, "labels": 2}, SettingsError, "--dict-key-x: .* x, labels, without 'w'"),
    (Collate(), (1.0, "cat"), SettingsError, "targets are strings, such as 'cat'; give each class a number"),
    (Collate(), (1.0, {"box": 1}), SettingsError, "targets are a mapping of box; choose one"),
    (Collate(), (1.0, [1, 2]), SettingsError, "targets are lists of 2 numbers, .*make each a tensor"),
    (Collate(), (1.0, object()), ExampleError, "examples 0 to 1 cannot be stacked .*object.*--collate"),
    (Collate(), (1.0, None), ExampleError, "examples 0 to 1 cannot be stacked .*NoneType.*--collate"),
]


@pytest.mark.parametrize(("collate", "example", "kind", "words"), BATCHES, ids=[case[3][:40] for case in BATCHES])
def test_bad_batches_are_refused_by_name(collate, example, kind, words):
    with pytest.raises(kind, match=words) as caught:
        list(batches([example] * 2, 0, 2, 2, collate))
    assert "\n" not in str(caught.value)


UNEQUAL = [
    ([(torch.zeros(2), 1), (torch.zeros(2), 1), (torch.zeros(3), 1)], "examples 5 and 7 .*x is of shape .2,. .* .3,."),
    ([{"ids": np.zeros(2), "labels": 1}, {"ids": np.zeros(4), "labels": 1}], "examples 5 and 6 .*'ids' is of shape"),
    (
        [{"ids": 1, "labels": 1}, {"labels": 1}],
        "examples 5 and 6 .*'ids' is a number in the one and missing in the other",
    ),
    ([(1.0, 2.0, 1), (1.0, torch.zeros(2), 1)], "input 1 is a number in the one and of shape .2,. in the other"),
]


@pytest.mark.parametrize(("items", "words"), UNEQUAL, ids=["tensors", "arrays", "keys", "kinds"])
def test_examples_that_differ_are_both_named(items, words):
    with pytest.raises(ExampleError, match=words) as caught:
        list(batches([None] * 5 + items, 5, 5 + len(items), 8))
    assert "--collate" in str(caught.value) and caught.value.examples == list(range(5, 5 + len(items)))


def test_strings_pass_to_the_model_and_numbers_become_targets():
    ((_, x, y),) = batches([("one", np.float32(1.5)), ("two", np.float32(2.5))], 0, 2, 2)
    assert (x, y.tolist(), y.dtype) == (("one", "two"), [1.5, 2.5], torch.float32)
    ((_, x, y),) = batches([(1, 2.0), (3, 4.0)], 0, 2, 2)
    assert (x.tolist(), y.dtype) == ([1, 3], torch.float64), "as torch has it"


def test_a_network_of_strings_is_fitted(tmp_path):
    config = dist_cases.config(tmp_path, model="calling_cases:reader", data="calling_cases:texts")
    dist_cases.run_inline(config)
    assert load_posterior(str(tmp_path), calling_cases.reader())(["some", "text"]).shape == (2, 3)
