"""Laws that a backend's sums have to satisfy, as tests to inherit.

Whatever distributes, resumes or reorders the accumulation of curvature relies on these laws and on nothing else. A
backend proves them for itself by a subclass in its test suite::

    class TestMyBackend(SumsConformance):
        backend = MyBackend
        hessian_structure = "kron"

which pytest collects. A backend that draws random numbers passes if its draws depend on the seed and on the example's
index in the data set alone; give it a seed in ``backend_kwargs``.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("The conformance suite needs hypothesis and pytest: pip install 'laplace-dist[test]'.") from error

from laplace.backends.interface import CurvatureInterface
from laplace.laplace import Laplace
from laplace.likelihoods.named import likelihood_of
from laplace.posterior.parametric import ParametricLaplace
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums

_SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors])


class SumsConformance:
    """The monoid laws of raw sums for one backend; inherit, set the attributes, override the makers where needed.

    Attributes:
        backend: The class under test; None for the default backend.
        backend_kwargs: Its further arguments.
        likelihood: By name or an object; :meth:`make_data` draws targets from it.
        subset_of_weights: ``'all'`` or ``'last_layer'``.
        hessian_structure: ``'full'``, ``'kron'`` or ``'diag'``.
        tolerance: Largest relative difference (Frobenius norm of each factor) between sums in different orders, as of
            float64 rounding.
    """

    backend: type[CurvatureInterface] | None = None
    backend_kwargs: dict[str, Any] = {}
    likelihood = "classification"
    subset_of_weights = "all"
    hessian_structure = "kron"
    tolerance = 1e-12

    def make_model(self) -> nn.Module:
        """A trained network in float64; the same weights at every call."""
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    def make_data(self) -> tuple[Any, Tensor]:
        """Inputs and targets of a whole data set, the same at every call; at least three examples."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(11, 3, generator=generator, dtype=torch.float64)
        outputs, uniform = torch.randn(2, 11, 3, generator=generator, dtype=torch.float64)
        return x, likelihood_of(self.likelihood).draw(outputs, uniform.sigmoid())

    def make_laplace(self) -> ParametricLaplace:
        """An approximation that knows its model, not yet fitted."""
        la = Laplace(
            self.make_model(),
            self.likelihood,
            self.subset_of_weights,
            self.hessian_structure,
            backend=self.backend,
            backend_kwargs=self.backend_kwargs,
        )
        la.initialize(self.make_data()[0])
        return la

    def sums_of(self, la: ParametricLaplace, start: int, stop: int, batch_size: int | None = None) -> CurvatureSums:
        """Sums over one contiguous range of the data, in batches."""
        x, y = self.make_data()
        sums = la.zero_sums()
        step = batch_size or max(1, stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            la.accumulate(sums, x[first:last], y[first:last], offset=first)
        return sums

    def check_equal(self, one: CurvatureSums, two: CurvatureSums, tolerance: float | None = None) -> None:
        """Fail, naming the factor, unless the two agree up to rounding."""
        tolerance = self.tolerance if tolerance is None else tolerance
        assert one.spec == two.spec
        assert one.n_data == two.n_data
        ours, theirs = one.to_tensors(), two.to_tensors()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            error = float((value.double() - theirs[name].double()).norm())
            scale = float(theirs[name].double().norm())
            assert error <= tolerance * scale, f"factor {name!r}: relative difference {error / max(scale, 1e-300):.2e}"

    def test_names_and_shapes_are_those_of_the_specification(self):
        """Accumulating changes values, never names, shapes or types; symmetric factors are symmetric."""
        la = self.make_laplace()
        sums = self.sums_of(la, 0, 3)
        spec = la.sums_spec()
        assert sums.tensors.keys() == spec.factors.keys()
        for name, factor in spec.factors.items():
            value = sums.tensors[name]
            assert tuple(value.shape) == factor.shape, name
            assert value.dtype == torch.float64, name
            assert not value.requires_grad, name
            assert float(value.norm()) > 0, name
            if factor.symmetric:
                torch.testing.assert_close(value, value.T, rtol=1e-10, atol=1e-10)

    def test_zero_is_the_identity(self):
        """``0 + s = s = s + 0``, exactly."""
        la = self.make_laplace()
        s = self.sums_of(la, 0, 3)
        self.check_equal(la.zero_sums().merge(s), s, 0.0)
        self.check_equal(self.sums_of(la, 0, 3).merge(la.zero_sums()), s, 0.0)

    def test_addition_commutes(self):
        """``a + b = b + a``."""
        la = self.make_laplace()
        one = self.sums_of(la, 0, 2).merge(self.sums_of(la, 2, 5))
        self.check_equal(one, self.sums_of(la, 2, 5).merge(self.sums_of(la, 0, 2)))

    def test_addition_associates(self):
        """``(a + b) + c = a + (b + c)``."""
        la = self.make_laplace()
        left = self.sums_of(la, 0, 2).merge(self.sums_of(la, 2, 3)).merge(self.sums_of(la, 3, 6))
        right = self.sums_of(la, 0, 2).merge(self.sums_of(la, 2, 3).merge(self.sums_of(la, 3, 6)))
        self.check_equal(left, right)

    def test_round_trip_through_tensors(self):
        """``from_tensors(to_tensors(s)) = s``, exactly, and goes on being a sum."""
        la = self.make_laplace()
        sums = self.sums_of(la, 0, 3)
        stored = {name: value.clone() for name, value in sums.to_tensors().items()}
        again = CurvatureSums.from_tensors(la.sums_spec(), stored, sums.n_data)
        self.check_equal(again, sums, 0.0)
        self.check_equal(again.merge(self.sums_of(la, 3, 5)), sums.merge(self.sums_of(la, 3, 5)), 0.0)

    def test_specification_round_trips_through_json(self):
        """A specification survives JSON text, and sums of the two add."""
        la = self.make_laplace()
        spec = SumsSpec.from_json(json.loads(json.dumps(la.sums_spec().to_json())))
        assert spec == la.sums_spec()
        assert list(spec.factors) == list(la.sums_spec().factors)
        self.check_equal(CurvatureSums.zero(spec).merge(self.sums_of(la, 0, 3)), self.sums_of(la, 0, 3), 0.0)

    def test_accumulating_twice_gives_the_same_bits(self):
        """The same batches in the same order: the same sums, exactly."""
        one, two = self.make_laplace(), self.make_laplace()
        self.check_equal(self.sums_of(one, 0, 5, 2), self.sums_of(two, 0, 5, 2), 0.0)

    @_SETTINGS
    @given(data=st.data())
    def test_any_partition_equals_the_whole(self, data: st.DataObject):
        """Segments of any lengths, in batches of any size, merged in any order: the sum over the data set."""
        la = self.make_laplace()
        n = len(self.make_data()[1])
        cuts = data.draw(st.lists(st.integers(0, n), max_size=4), label="cuts")
        edges = [0, *sorted(cuts), n]
        segments = data.draw(st.permutations(list(zip(edges, edges[1:], strict=False))), label="segments")
        batch_size = data.draw(st.integers(1, n), label="batch size")
        total = la.zero_sums()
        for start, stop in segments:
            total.merge(self.sums_of(la, start, stop, batch_size))
        self.check_equal(total, self.sums_of(la, 0, n))

    def test_batch_size_does_not_matter(self):
        """One example at a time equals all at once."""
        la = self.make_laplace()
        n = len(self.make_data()[1])
        whole = self.sums_of(la, 0, n)
        for batch_size in (1, 2, n - 1):
            self.check_equal(self.sums_of(la, 0, n, batch_size), whole)

    def test_sums_do_not_drift(self):
        """A float32 model's batch adds to a large sum what it adds to zero."""
        la = self.make_laplace()
        la.model.float()
        x, y = (_single(part) for part in self.make_data())
        la.initialize(x)
        alone, total = la.zero_sums(), la.zero_sums()
        la.accumulate(alone, x, y)
        la.accumulate(total, x, y)
        for _ in range(20):
            total.merge(total)
        before = {name: value.clone() for name, value in total.tensors.items()}
        la.accumulate(total, x, y)
        for name, value in alone.tensors.items():
            error = float((total.tensors[name] - before[name] - value).norm() / value.norm())
            assert error < 1e-3, f"factor {name!r}: a batch lost {error:.1e} of its curvature in a large sum"

    def test_an_example_of_weight_two_is_that_example_twice(self):
        """And one of weight 0 is none; a backend that takes no weights refuses them."""
        la, (x, y) = self.make_laplace(), self.make_data()
        sums = la.zero_sums()
        try:
            la.accumulate(sums, x[:3], y[:3], example_weights=[1.0, 0.0, 2.0])
        except ValueError as error:
            assert not la.backend.weighs_examples and "takes no weights of examples" in str(error)
            return
        assert la.backend.weighs_examples
        twice = self.sums_of(la, 0, 1).merge(self.sums_of(la, 2, 3)).merge(self.sums_of(la, 2, 3))
        self.check_equal(sums, twice)

    def test_fit_equals_finalised_sums(self):
        """``fit`` is nothing but this sum: predictions agree."""
        x, y = self.make_data()
        n = len(y)
        fitted, merged = self.make_laplace(), self.make_laplace()
        fitted.fit([(x[:4], y[:4]), (x[4:], y[4:])])
        merged.set_sums(self.sums_of(merged, 4, n).merge(self.sums_of(merged, 0, 4)))
        for one, two in zip(_tensors(fitted(x)), _tensors(merged(x)), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fitted.log_marginal_likelihood(), merged.log_marginal_likelihood())

    def test_the_model_stays_as_it_was(self):
        """Neither weights nor flags nor gradients of the model change."""
        la = self.make_laplace()
        la.model.train()
        before = {name: value.clone() for name, value in la.model.state_dict().items()}
        self.sums_of(la, 0, 3)
        assert all(module.training for module in la.model.modules())
        assert all(parameter.grad is None for parameter in la.model.parameters())
        assert all(torch.equal(before[name], value) for name, value in la.model.state_dict().items())


def _single(data: Any) -> Any:
    """Data with its float64 tensors in float32."""
    if isinstance(data, MutableMapping):
        return {**data, **{key: _single(value) for key, value in data.items()}}
    return data.float() if isinstance(data, Tensor) and data.is_floating_point() else data


def _tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
