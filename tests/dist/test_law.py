"""What the likelihood makes of the probe's examples: what is kept of it, and what counts as another formula."""

import dist_cases
import pytest
import torch

from laplace.likelihoods import BaseLikelihood, Categorical, Gaussian
from laplace_dist.errors import SettingsError
from laplace_dist.run import law
from laplace_dist.run.law import check_law, difference, law_of

STATE = []


def unsteady():
    return Unsteady()


class Unsteady(BaseLikelihood):
    """Another loss at every call."""

    def nll(self, f, y):
        STATE.append(None)
        return (f - len(STATE)).square().sum(-1)


def failing():
    return Failing()


class Failing(BaseLikelihood):
    def nll(self, f, y):
        return f.sum(-1)

    def root_columns(self, f, y):
        raise TypeError("no such columns")


@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
def test_little_is_kept_of_many_outputs(monkeypatch, estimator):
    monkeypatch.setattr(law, "LARGEST", 2000)
    f, y = torch.randn(4, 30, 50 if estimator == "ggn" else 100), torch.randint(50, (4, 30))
    found = law_of(Categorical(), f, y, estimator)
    rows = len(found["targets"])
    assert 1 <= rows == max(1, 2000 // f[0].numel())
    assert found["loss"].numel() == 1 and found["lengths"].shape == (rows,) and bool((found["lengths"] > 0).all())
    check_law(found, f, Categorical(), "classification", estimator, "it")


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
def test_lengths_are_those_of_the_dense_curvature(estimator):
    f, y, law_ = torch.randn(3, 4).double(), torch.tensor([0, 3, 1]), Categorical()
    along = law.fixed_directions(f)
    p = f.softmax(-1)
    dense = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if estimator == "ef":
        g = p - torch.nn.functional.one_hot(y, 4)
        dense = g[:, :, None] * g[:, None, :]
    expected = torch.einsum("ni,nij,nj->n", along, dense, along).sqrt()
    assert torch.allclose(law_of(law_, f, y, estimator)["lengths"], expected)


def test_rounding_of_confident_predictions_is_no_other_formula():
    """On another machine the loss of such examples is another one in its first digit."""
    f = torch.tensor([[33.0, 0.0, 1.0]])
    found = law_of(Categorical(), f, torch.tensor([0]), "ef")
    rounded = {name: value + 3e-15 if value.is_floating_point() else value for name, value in found.items()}
    assert difference(found, rounded, f) is None
    doubled = law_of(Categorical(), f / 20, torch.tensor([0]), "ef")
    assert "the loss of the same outputs" in difference(doubled, {**doubled, "loss": 2 * doubled["loss"]}, f / 20)


def test_infinite_losses_are_the_same_as_themselves():
    f, y = torch.ones(2, 1), torch.full((2, 1), 1e200, dtype=torch.float64)
    found = law_of(Gaussian(), f, y, "ef")
    assert difference(found, law_of(Gaussian(), f, y, "ef"), f) is None
    assert difference(found, law_of(Gaussian(), f, -y.sign(), "ef"), f)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("unsteady", "'test_law:unsteady' makes something else of the same examples each time: the loss .* no random"),
        ("failing", "'test_law:failing' fails on the first examples: no such columns"),
    ],
)
def test_a_likelihood_that_changes_or_fails_is_refused_before_anything_is_written(tmp_path, name, match):
    chosen = dist_cases.config(tmp_path / "run", likelihood=f"test_law:{name}", estimator="ggn")
    with pytest.raises(SettingsError, match=f"--likelihood: {match}"):
        dist_cases.run_inline(chosen)
    assert not (tmp_path / "run" / "plan.json").exists()
