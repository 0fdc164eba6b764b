"""Dict-like batches that hold more than one tensor with a row for every example."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace, curvature
from laplace.data.batches import few, length_of, part_of, repeated

from .test_uses import Function

X, Y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
TABLE = torch.arange(15, dtype=torch.float64).reshape(5, 3).cos()

# What a batch holds beside, and what the model makes of it: a factor (batch or 1, 3) of the inputs.
PARTS = {
    "a table": (TABLE, lambda t: t.sum(0)),
    "a row for all": (TABLE[:1], lambda t: t),
    "a number": (torch.tensor(2.0), lambda t: t),
    "a dictionary": ({"a": X.cos(), "table": TABLE}, lambda t: t["a"] * t["table"].sum(0)),
    "tensors": ((X.cos(), TABLE), lambda t: t[0] * t[1].sum(0)),
    "numbers": ([float(i) for i in range(7)], lambda t: torch.tensor(t, dtype=torch.float64)[:, None]),
    "words": (
        ["aa", "b", "", "c", "ddd", "e", "f"],
        lambda t: torch.tensor([[1.0 + len(word)] for word in t]).double(),
    ),
}


def factor(m, batch):
    return m.head((m.inner(batch["x"]) * m.factor(batch["part"])).tanh())


def fitted(name, batch, structure, backend, subset):
    torch.manual_seed(0)
    model = Function(factor, inner=nn.Linear(3, 3), head=nn.Linear(3, 2)).double().eval()
    model.factor = PARTS[name][1]
    la = Laplace(model, "regression", subset, structure, dict_key_x="x", backend=getattr(curvature, backend))
    la.fit([batch])
    return la


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    ("structure", "backend"), [("full", "NativeGGN"), ("kron", "NativeGGN"), ("diag", "GGNInterface")]
)
@pytest.mark.parametrize("name", PARTS)
def test_what_is_no_example_belongs_to_all(name, structure, backend, subset):
    part, of_model = PARTS[name]
    la = fitted(name, {"part": part, "x": X, "labels": Y}, structure, backend, subset)
    values = of_model(part).expand(7, 3)
    other = fitted("a number", {"x": X, "part": values, "labels": Y}, structure, backend, subset)
    one, two = (p.H.to_matrix() if structure == "kron" else p.H for p in (la, other))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(la({"x": X, "part": part})[1], other({"x": X, "part": values})[1])


def test_parts_and_copies_of_batches():
    batch = {
        "table": TABLE,
        "x": X,
        "words": list("abcdefg"),
        "labels": Y,
        "n": {"x": X},
        "number": 3,
        "mask": TABLE[:1],
    }
    assert length_of(batch) == 7
    part = part_of(batch, slice(2, 4))
    assert part["words"] == ["c", "d"] and part["number"] == 3 and torch.equal(part["x"], X[2:4])
    assert part["table"] is TABLE and torch.equal(part["n"]["x"], X[2:4]) and part["mask"] is batch["mask"]
    part = part_of(batch, torch.tensor([5, 0]))
    assert part["words"] == ["f", "a"] and torch.equal(part["x"], X[[5, 0]]) and part["table"] is TABLE
    twice = repeated(part, 2)
    assert (
        twice["words"] == ["f", "f", "a", "a"] and torch.equal(twice["x"], X[[5, 5, 0, 0]]) and twice["table"] is TABLE
    )
    assert length_of(few(part_of(batch, slice(0, 1)))) == 2 and few(batch) is batch
    assert length_of({"words": ["a", "b"]}) == 2
    with pytest.raises(ValueError, match=r"the keys \['a'\] holds no tensor"):
        length_of({"a": 3})


@pytest.mark.parametrize(
    ("structure", "backend"),
    [("full", "NativeGGN"), ("diag", "GGNInterface"), ("full", "CurvlinopsGGN"), ("gp", "NativeGGN")],
)
def test_a_batch_as_long_as_a_table_is_refused(structure, backend):
    """What belongs to all examples would be cut as if it had a row for each of them."""
    x, y = torch.cat([X, X]), torch.cat([Y, Y])
    torch.manual_seed(0)
    model = Function(factor, inner=nn.Linear(3, 3), head=nn.Linear(3, 2)).double().eval()
    model.factor = lambda t: t.sum(0)
    la = Laplace(model, "regression", "all", structure, dict_key_x="x", backend=getattr(curvature, backend))
    parts = [{"part": TABLE, "x": x[rows], "labels": y[rows]} for rows in (slice(0, 7), slice(7, 12), slice(12, 14))]
    with pytest.raises(ValueError, match="In a batch of 5 examples, 'part' looks as if it had a row for each of them"):
        la.fit(parts)
    la.fit([parts[0], parts[2]])
    la(parts[0])
    with pytest.raises(ValueError, match="'part' looks as if it had a row for each of them, other than before"):
        la(parts[1])
    assert la({"x": X[:1], "part": TABLE})[0].shape == (1, 2)
