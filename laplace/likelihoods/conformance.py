"""What holds for every likelihood, as tests to inherit: yours among them.

.. code-block:: python

    class TestMine(LikelihoodConformance):
        def make_likelihood(self):
            return MyLikelihood()
"""

from __future__ import annotations

import pickle

import torch
from torch import Tensor

try:
    import pytest
except ImportError as error:
    raise ImportError("The conformance suite needs pytest: pip install 'laplace-dist[test]'.") from error

from laplace.enums import LinkApprox
from laplace.likelihoods.base import BaseLikelihood


class LikelihoodConformance:
    """Loss, derivatives, samples and predictions of one likelihood agree; inherit and override the makers where needed.

    Attributes:
        positive_hessian: Whether the Gauss-Newton matrix has the Hessian in the outputs; False where it has the Fisher
            information instead.
        has_draws: Whether the likelihood has :meth:`BaseLikelihood.draw`; :meth:`make_targets` is then to be overridden.
    """

    positive_hessian = True
    has_draws = True

    def make_likelihood(self) -> BaseLikelihood:
        """The likelihood under test; equal ones at every call."""
        raise NotImplementedError("Override make_likelihood().")

    def make_outputs(self) -> Tensor:
        """Outputs ``(examples, outputs)`` in float64, the same at every call; at least three examples."""
        return torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def make_targets(self) -> Tensor:
        """Targets of these outputs, the same at every call."""
        f = self.make_outputs()
        u = torch.rand(f.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return self.make_likelihood().draw(f, u)

    def test_targets_are_accepted_and_too_few_are_refused(self):
        """One per example."""
        f, y = self.make_outputs(), self.make_targets()
        self.make_likelihood().check(f, y)
        with pytest.raises(ValueError):
            self.make_likelihood().check(f, y[:-1])

    def test_loss_is_the_sum_of_its_terms(self):
        """In float64, whatever the outputs are in; and over examples, in any parts."""
        law, f, y = self.make_likelihood(), self.make_outputs(), self.make_targets()
        assert law.loss(f.float(), y).dtype == torch.float64
        torch.testing.assert_close(law.loss(f, y), law.nll(f, y).sum())
        torch.testing.assert_close(law.loss(f, y), law.loss(f[:2], y[:2]) + law.loss(f[2:], y[2:]))

    def test_gradient_is_that_of_the_loss(self):
        """By automatic differentiation."""
        law, f, y = self.make_likelihood(), self.make_outputs().requires_grad_(), self.make_targets()
        torch.testing.assert_close(law.gradient(f.detach(), y), torch.autograd.grad(law.loss(f, y), f)[0])

    def test_root_is_one_of_the_hessian(self):
        """Of the loss of every example, by automatic differentiation twice."""
        law, f, y = self.make_likelihood(), self.make_outputs(), self.make_targets()
        if not self.positive_hessian:
            pytest.skip("this likelihood takes its Fisher information for the Hessian")
        truth = [
            torch.autograd.functional.hessian(lambda v, i=i: law.loss(v[None], y[i : i + 1]), f[i])
            for i in range(len(f))
        ]
        torch.testing.assert_close(_summed(law.hessian_root(f, y)), torch.stack(truth), rtol=1e-6, atol=1e-8)

    def test_sampled_gradients_estimate_the_root(self):
        """Their outer products have it for mean: within six standard errors."""
        if not self.has_draws:
            pytest.skip("this likelihood draws no targets")
        law, f, y, n = self.make_likelihood(), self.make_outputs(), self.make_targets(), 4000
        drawn = torch.stack(list(law.sampled_gradients(f, y, n, seed=0, offset=0))) * n**0.5
        products = torch.einsum("sbo,sbp->sbop", drawn, drawn)
        error = products.mean(0) - _summed(law.hessian_root(f, y))
        assert bool((error.abs() <= 6 * products.std(0) / n**0.5 + 1e-9).all())

    def test_draws_belong_to_the_example(self):
        """Not to the batch."""
        if not self.has_draws:
            pytest.skip("this likelihood draws no targets")
        law, f, y = self.make_likelihood(), self.make_outputs(), self.make_targets()
        whole = torch.stack(list(law.sampled_gradients(f, y, 3, seed=5, offset=7)))
        part = torch.stack(list(law.sampled_gradients(f[2:], y[2:], 3, seed=5, offset=9)))
        torch.testing.assert_close(whole[:, 2:], part)

    def test_no_variance_is_the_network_itself(self):
        """Whatever the link."""
        law, f = self.make_likelihood(), self.make_outputs()
        nothing = torch.zeros(*f.shape, f.shape[-1], dtype=f.dtype)
        alone = _tensors(law.public(law.at(f)))
        for link in (LinkApprox.PROBIT, LinkApprox.MC):
            for one, two in zip(_tensors(law.public(law.integrate(f, nothing, link, 7))), alone, strict=True):
                if one.shape == two.shape:  # of a Gaussian, covariances stand beside variances
                    torch.testing.assert_close(one, two)

    def test_what_does_not_move_is_the_same_under_any_variance(self):
        """A search of the prior ends where nothing moves, so `moves` and `integrate` have to agree."""
        law, f = self.make_likelihood(), torch.zeros_like(self.make_outputs())
        some = torch.eye(f.shape[-1], dtype=f.dtype).expand(*f.shape, f.shape[-1])
        assert not law.moves(f, 0 * some, LinkApprox.MC) and law.moves(f + 1, some, LinkApprox.PROBIT)
        for link in (LinkApprox.PROBIT, LinkApprox.MC):
            found = [_tensors(law.public(law.integrate(f, size * some, link, 7))) for size in (0.0, 1.0, 1e6)]
            if not law.moves(f, some, link):
                assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

    def test_scores_are_finite_and_of_examples(self):
        """The same in parts as in the whole."""
        law, f, y = self.make_likelihood(), self.make_outputs(), self.make_targets()
        whole = law.scores(law.at(f), y)
        parts = [law.scores(law.at(f[p]), y[p]) for p in (slice(0, 2), slice(2, None))]
        assert "nll" in whole and all(bool(torch.isfinite(v).all()) for v in whole.values())
        for name, values in whole.items():
            torch.testing.assert_close(values, torch.cat([part[name] for part in parts]))
        assert all(isinstance(value, float) for value in law.summarize(whole).values())

    def test_details_are_of_examples_and_agree_with_the_scores(self):
        """The same in parts as in the whole, one row per example; of Gaussian predictions those that the scores are of."""
        law, f, y = self.make_likelihood(), self.make_outputs(), self.make_targets()
        whole, scores = law.details(law.at(f), y, 0.7), law.scores(law.at(f), y, 0.7)
        parts = [law.details(law.at(f[p]), y[p], 0.7) for p in (slice(0, 2), slice(2, None))]
        for name, values in whole.items():
            assert len(values) == len(f) and bool(torch.isfinite(values).all())
            torch.testing.assert_close(values, torch.cat([part[name] for part in parts]))
        if whole:
            found = torch.distributions.Normal(whole["mean"], whole["deviation"]).log_prob(whole["target"])
            torch.testing.assert_close(scores["nll"], -found.mean(1))

    def test_it_can_be_sent_to_another_process(self):
        """And is the same likelihood there."""
        law = self.make_likelihood()
        assert pickle.loads(pickle.dumps(law)).identity == law.identity == self.make_likelihood().identity


def _summed(columns: object) -> Tensor:
    return sum(v[..., :, None] * v[..., None, :] for v in columns)


def _tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
