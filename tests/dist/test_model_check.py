"""What is said of a model before it is fitted."""

from __future__ import annotations

import dist_cases
import pytest
import torch
from torch import nn

from laplace_dist import check_model


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(nn.functional.dropout(x))


class Coupled(Noisy):
    def forward(self, x):
        return self.linear(x - x.mean(0))


class Scaled(Noisy):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.linear(x) * self.scale


def test_coverage_outputs_and_what_a_flag_changes():
    model, (x, _) = dist_cases.convnet().train(), dist_cases.tensors("train")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = check_model(model, x[:4])
    assert found.outputs == (4, 3) and found.refused is None
    assert [(name, kind) for name, kind, _ in found.coverage] == [(n, "kron") for n, _ in model.named_parameters()]
    assert list(found.precision) == ["bf16"] and 1e-4 < found.precision["bf16"] < 3e-2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model.eval()(x[:4]).double()
    exact = dist_cases.convnet()(x[:4]).double()
    assert found.precision["bf16"] == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "0.weight  kron  Conv2d" in str(found) and "--precision bf16 changes the outputs by" in str(found)


def test_what_has_no_factors_is_named_with_its_reason():
    found = check_model(Scaled(), torch.randn(4, 4))
    assert dict((name, kind) for name, kind, _ in found.coverage) == {
        "linear.weight": "kron",
        "linear.bias": "kron",
        "scale": "diag",
    }


class Asking(Noisy):
    def forward(self, x):
        return self.linear(x.nothing)


class Twice(Noisy):
    def forward(self, x):
        return self.linear(x), x


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Asking, "its forward fails on these inputs (AttributeError: 'Tensor' object has no attribute 'nothing')"),
        (Twice, "it returns a tuple without logits"),
        (Noisy, "two outputs for one input"),
        (Coupled, "depends on the others of its batch"),
        (lambda: nn.Linear(5, 3), "mat1 and mat2"),
    ],
)
def test_what_would_be_refused_is_said_and_not_raised(model, says):
    torch.manual_seed(0)
    found = check_model(model(), torch.randn(4, 4))
    assert says in found.refused and f"refused: {found.refused}" in str(found)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="likelihood"):
        check_model(nn.Linear(4, 3), torch.randn(4, 4), likelihood="nonsense")
