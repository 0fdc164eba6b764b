"""The temperature of the logits: against scipy, against a network whose logits are divided, and beside the posterior's own."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from laplace import Laplace
from laplace.likelihoods import Bernoulli
from laplace.scoring import score_candidates

from .models import loader
from .posteriors import SIX, close

LINKS = ("probit", "mc", "bridge", "bridge_norm")


def classifier(scale=4.0, n=200, seed=0, outputs=3):
    """A network whose logits are too large, and labels drawn from what they are without that."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    with torch.no_grad():
        model[2].weight *= 3
    x = torch.randn(n, 3, dtype=torch.float64)
    y = torch.distributions.Categorical(logits=model(x).detach()).sample()
    with torch.no_grad():
        model[2].weight *= scale
        model[2].bias *= scale
    return model, x, y


def fitted(subset="all", structure="kron", prior=1e8, **kwargs):
    model, x, y = classifier(**kwargs)
    la = Laplace(model, "classification", subset, structure, prior_precision=prior)
    la.fit(loader(x, y, 64))
    return la, x, y


def loss_at(la, x, y, temperature, **how):
    la.logit_temperature = temperature
    generator = torch.Generator().manual_seed(0)
    logs = la(x, generator=generator, log_probs=True, **how)
    la.logit_temperature = 1.0
    return float(-logs.gather(1, y[:, None]).mean().detach())


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("prior", [1e8, 3.0])
def test_the_temperature_is_that_of_scipy(subset, structure, prior):
    la, x, y = fitted(subset, structure, prior)
    best = minimize_scalar(
        lambda u: loss_at(la, x, y, 10**u), bounds=(-2, 2), method="bounded", options={"xatol": 1e-9}
    )
    la.optimize_logit_temperature(loader(x, y, 64))
    assert la.logit_temperature == pytest.approx(10**best.x, rel=1e-3)
    assert la.prior_precision.tolist() == [pytest.approx(prior)]
    if prior == 1e8:  # the network's own logits: Guo et al.
        exact = minimize_scalar(
            lambda t: float(nn.functional.cross_entropy(la.model(x).detach() / t, y)),
            bounds=(0.1, 50),
            method="bounded",
        )
        assert la.logit_temperature == pytest.approx(exact.x, rel=1e-3)
        assert 3 < la.logit_temperature < 5.5  # they were made four times too large


@pytest.mark.parametrize(
    "how", [*({"link_approx": link} for link in LINKS[:3]), {"pred_type": "nn", "link_approx": "mc"}]
)
def test_every_predictive_has_its_best_temperature(how):
    la, x, y = fitted(prior=30.0)
    la.optimize_logit_temperature([(x, y)], n_samples=100, **how)
    found = la.logit_temperature
    losses = [loss_at(la, x, y, found * 10**u, **how) for u in (-0.02, 0.0, 0.02)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


@pytest.mark.parametrize("far", [100.0, 0.01])
def test_a_temperature_far_from_one_is_found(far):
    la, x, y = fitted(scale=4 * far)
    la.optimize_logit_temperature([(x, y)])
    assert la.logit_temperature == pytest.approx(_plain(x, y, la), rel=1e-3)
    assert abs(la.logit_temperature / far - 4) < 1.5


def _plain(x, y, la):
    f = la.model(x).detach()
    found = minimize_scalar(
        lambda u: float(nn.functional.cross_entropy(f / 10**u, y)),
        bounds=(-4, 4),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return 10**found.x


class Divided(nn.Module):
    """A network whose logits are divided."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, x):
        return self.model(x) / self.temperature


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("how", [*({"link_approx": link} for link in LINKS), {"pred_type": "nn", "link_approx": "mc"}])
def test_a_predictive_is_that_of_the_network_with_divided_logits(how, structure):
    """At the same posterior over the weights: mean divided, covariance by the square."""
    la, x, _ = fitted(structure=structure, prior=20.0)
    la.logit_temperature = 2.5
    ours = la(x, generator=torch.Generator().manual_seed(3), **how)
    js, f = la.backend.jacobians(x)
    covariance = la.functional_variance(js)
    if how.get("pred_type") == "nn":
        draws = la.functional_samples(x, "nn", 100, generator=torch.Generator().manual_seed(3))
        truth = (draws / 2.5).softmax(-1).mean(0)
    else:
        law = la.likelihood_object
        variance = covariance.diagonal(dim1=1, dim2=2) if how["link_approx"] == "probit" else covariance
        from laplace.enums import LinkApprox

        generator = torch.Generator().manual_seed(3)
        truth = law.integrate(f / 2.5, variance / 6.25, LinkApprox(how["link_approx"]), 100, generator)[0].exp()
    close(ours, truth, 1e-8)
    js_divided, f_divided = Laplace(Divided(la.model, 2.5), "classification", "all", "diag").backend.jacobians(x)
    close(f_divided, f / 2.5)
    close(js_divided, js / 2.5)


def test_it_is_not_the_temperature_of_the_posterior():
    """The latter scales the curvature: variances, samples and evidence; the former the logits, and nothing else."""
    la, x, _ = fitted(prior=20.0)
    evidence, precision = la.log_marginal_likelihood(), la.posterior_precision.to_matrix()
    before, samples = la(x), la.functional_samples(x, generator=torch.Generator().manual_seed(0))
    la.logit_temperature = 3.0
    assert torch.equal(la.log_marginal_likelihood(), evidence)
    assert torch.equal(la.posterior_precision.to_matrix(), precision)
    assert torch.equal(la.functional_samples(x, generator=torch.Generator().manual_seed(0)), samples)
    assert not torch.allclose(la(x), before)
    generator = torch.Generator().manual_seed(0)
    close(la.predictive_samples(x, generator=generator), (samples / 3).softmax(-1))
    la.logit_temperature = 1.0
    assert torch.equal(la(x), before)
    la.temperature = 3.0
    assert not torch.allclose(la.posterior_precision.to_matrix(), precision)
    assert la.logit_temperature == 1.0


def test_scores_are_those_of_the_predictive_at_each_temperature():
    la, x, y = fitted(prior=20.0)
    found = score_candidates(la, loader(x, y, 64), [5.0, 20.0], [0.5, 1.0, 4.0], keep=True)
    for i, prior in enumerate((5.0, 20.0)):
        la.prior_precision = prior
        for t, temperature in enumerate((0.5, 1.0, 4.0)):
            assert float(found.totals[i, t]) / 200 == pytest.approx(loss_at(la, x, y, temperature), rel=1e-10)
            nll = found.examples["nll"][3 * i + t]
            assert float(nll.mean()) == pytest.approx(float(found.totals[i, t]) / 200)
    plain = la.model(x).detach()
    for t, temperature in enumerate((0.5, 1.0, 4.0)):
        truth = nn.functional.cross_entropy(plain / temperature, y, reduction="sum")
        assert float(found.map_totals[t]) == pytest.approx(float(truth))
    close(found.examples["nll"][-1], nn.functional.cross_entropy(plain, y, reduction="none"))
    close(found.examples["confidence"][-1], plain.softmax(-1).amax(1))


def test_one_logit_has_a_temperature_too():
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    x = torch.randn(300, 2, dtype=torch.float64)
    y = torch.bernoulli(model(x).sigmoid()).detach()
    with torch.no_grad():
        model.weight *= 3
        model.bias *= 3
    la = Laplace(model, Bernoulli(), "all", "full", prior_precision=1e8)
    la.fit([(x, y)])
    la.optimize_logit_temperature([(x, y)])
    loss = nn.functional.binary_cross_entropy_with_logits
    best = minimize_scalar(lambda t: float(loss(model(x).detach() / t, y)), bounds=(0.1, 50), method="bounded")
    assert la.logit_temperature == pytest.approx(best.x, rel=1e-3)


def test_it_belongs_to_the_state(tmp_path):
    la, x, _ = fitted()
    la.logit_temperature = 1.75
    torch.save(la.state_dict(), tmp_path / "la.pt")
    again = Laplace(la.model, "classification", "all", "kron")
    again.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert again.logit_temperature == 1.75
    assert torch.equal(again(x), la(x))
    old = {name: value for name, value in la.state_dict().items() if name != "logit_temperature"} | {
        "schema_version": 2
    }
    again.load_state_dict(old)
    assert again.logit_temperature == 1.0


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "2", None, True])
def test_a_temperature_that_is_none_is_refused(value):
    la, _, _ = fitted()
    with pytest.raises(ValueError, match="logit_temperature=.* must be positive and finite"):
        la.logit_temperature = value
    assert la.logit_temperature == 1.0


def test_outputs_that_are_no_logits_have_none():
    model = nn.Linear(2, 2).double()
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "diag")
    la.fit([(x, y)])
    with pytest.raises(ValueError, match="logit_temperature=2.0 has no meaning for regression"):
        la.logit_temperature = 2.0
    with pytest.raises(ValueError, match="regression has no logits"):
        la.optimize_logit_temperature([(x, y)])
    la = Laplace(nn.Linear(2, 2), "classification", "all", "diag")
    la.logit_temperature = 2.0
    with pytest.raises(ValueError, match="has no meaning for regression"):
        la.likelihood = "regression"
    assert la.likelihood == "classification"


def test_a_predictive_that_normalises_its_variances_does_not_depend_on_it():
    la, x, y = fitted()
    with pytest.raises(ValueError, match="or do not depend on the temperature"):
        la.optimize_logit_temperature([(x, y)], link_approx="bridge_norm")


def test_predictions_that_are_all_right_have_no_best_temperature():
    la, x, _ = fitted(prior=1e25)  # a variance would set an end to how sure they can be
    with pytest.raises(ValueError, match="no lowest point between the temperatures .*Nothing was changed"):
        la.optimize_logit_temperature([(x, la.model(x).argmax(-1))])
    assert la.logit_temperature == 1.0
    with pytest.raises(ValueError, match="The validation data is empty"):
        la.optimize_logit_temperature([])
