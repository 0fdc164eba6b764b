"""Examples that depend on one another where the first batch cannot show it: the first one that can is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace, curvature
from laplace.capture import soundness, unproven

from .test_uses import Function, P

STRUCTURES = ["full", "diag", "kron", "ekfac"]


def over_the_batch(h):
    """Attention of examples over examples."""
    return (h @ h.T).softmax(-1) @ h


def dead(m, x):
    """All is zero for small inputs, so that no batch of these shows the coupling."""
    return m.head(over_the_batch((m.inner(x) - 5).relu()))


def dead_branch(m, x):
    """Beside a branch that is alive the coupling has no module of its own to show it, only a gradient."""
    return m.head(x + over_the_batch((m.inner(x) - 5).relu()))


def dead_product(m, x):
    """The same of a weight without a module."""
    return m.head(x + over_the_batch((x @ m.weight - 5).relu()))


def expert(m, x):
    """A module that runs for large inputs alone, and gives what couples examples."""
    return m.head(x + m.inner(x - x.mean(0)) if float(x.abs().max()) > 5 else x)


MODELS = {
    "dead": lambda: Function(dead, inner=nn.Linear(3, 3), head=nn.Linear(3, 2)),
    "dead branch": lambda: Function(dead_branch, inner=nn.Linear(3, 3), head=nn.Linear(3, 2)),
    "dead product": lambda: Function(dead_product, weight=P(3, 3), head=nn.Linear(3, 2)),
}
REFUSAL = "the output of an example depends on the others of its batch"


def made(name):
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for p in (model.weight,) if name == "dead product" else (model.inner.weight, model.inner.bias):
            p.abs_()
    x = torch.rand(4, 3)
    return model.double().eval(), x.double(), 20 * (1 + x.double())


def fit(model, batches, structure):
    la = Laplace(model, "regression", "all", structure)
    la.fit([(x, torch.zeros(len(x), 2, dtype=torch.float64)) for x in batches])
    return la


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_a_later_batch_that_is_alive_is_refused(name, structure):
    model, small, large = made(name)
    with pytest.raises(ValueError, match=REFUSAL):
        fit(model, [small, small, large], structure)


@pytest.mark.parametrize("name", MODELS)
def test_batches_that_are_all_dead_are_fitted_and_one_alive_in_a_prediction_is_refused(name):
    model, small, large = made(name)
    la = fit(model, [small, small], "diag")
    la(small)
    for _ in range(2):  # a refusal proves nothing
        with pytest.raises(ValueError, match=REFUSAL):
            la(large)


@pytest.mark.parametrize("backend", ["NativeGGN", "CurvlinopsGGN"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_state_refuses_what_the_fitted_posterior_does(name, backend):
    model, small, large = made(name)
    la, loaded = (
        Laplace(model, "regression", "all", "diag", backend=getattr(curvature, backend)) for _ in ("fit", "load")
    )
    la.fit([(small, torch.zeros(len(small), 2, dtype=torch.float64))])
    loaded.load_state_dict(la.state_dict())
    assert torch.equal(loaded(small)[1], la(small)[1])
    for posterior in (la, loaded):
        with pytest.raises(ValueError, match=REFUSAL):
            posterior(large)


def test_sums_of_the_sources_that_a_fit_found_prove_nothing_anew(monkeypatch):
    """Those of another specification do: what is known of one is not known of the other."""
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval(), torch.randn(4, 3).double()
    la = fit(model, [x], "diag")
    asked = []
    monkeypatch.setattr(unproven, "check_function", lambda *args: asked.append(soundness.check_function(*args)))
    la.load_state_dict(la.state_dict())
    la(x)
    assert not asked
    fresh = Laplace(model, "regression", "all", "diag")
    fresh.load_state_dict(la.state_dict())
    for _ in range(3):
        fresh(x)
    assert len(asked) == 2  # its modules, and its gradients


def test_a_loaded_state_knows_how_many_dimensions_inputs_have():
    """Of steps of a sequence, one example by itself looks like a batch of steps."""
    torch.manual_seed(4)
    model, x = nn.Linear(3, 2).double().eval(), torch.randn(4, 5, 3).double()
    la, loaded = (Laplace(model, "regression", "all", "diag") for _ in ("fit", "load"))
    la.fit([(x, torch.zeros(4, 5, 2, dtype=torch.float64))])
    loaded.load_state_dict(la.state_dict())
    for posterior in (la, loaded):
        with pytest.raises(ValueError, match="the batch dimension is missing"):
            posterior(x[0])


@pytest.mark.parametrize("row", [0, 9, 11])
@pytest.mark.parametrize("name", MODELS)
def test_one_example_that_is_alive_is_found_wherever_it_is(name, row):
    """The first batch is asked with its first eight examples."""
    model, small, large = made(name)
    batch = torch.cat([small, small, small])
    batch[row] = large[0]
    with pytest.raises(ValueError, match=REFUSAL):
        fit(model, [batch], "diag")


def words(m, x):
    h = m.table(x).mean(1)
    return m.head(over_the_batch(h))


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_loaded_state_that_one_example_of_words_proved_nothing_of(subset):
    torch.manual_seed(2)
    model = Function(words, table=nn.Embedding(9, 3), head=nn.Linear(3, 2)).double().eval()
    x = torch.randint(9, (5, 4))
    la, loaded = (Laplace(model, "regression", subset, "diag") for _ in ("fit", "load"))
    la.fit([(x[:1], torch.zeros(1, 2, dtype=torch.float64))])
    loaded.load_state_dict(la.state_dict())
    for posterior in (la, loaded):
        with pytest.raises(ValueError, match=REFUSAL):
            posterior(x)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_example_of_words_proves_nothing(structure):
    """It is doubled, and two equal examples attend to one another as one to itself; numbers would be moved apart."""
    torch.manual_seed(2)
    model = Function(words, table=nn.Embedding(9, 3), head=nn.Linear(3, 2)).double().eval()
    x = torch.randint(9, (5, 4))
    fit(model, [x[:1], x[1:2]], structure)
    with pytest.raises(ValueError, match=REFUSAL):
        fit(model, [x[:1], x[1:]], structure)
    la = fit(model, [x[:1], x[1:2]], structure)
    with pytest.raises(ValueError, match=REFUSAL):
        la(x)


def test_a_module_that_runs_in_a_later_batch_alone():
    torch.manual_seed(3)
    inner = nn.Linear(3, 3)
    inner.requires_grad_(False)
    model = Function(expert, inner=inner, head=nn.Linear(3, 2)).double().eval()
    x = torch.rand(4, 3).double()
    with pytest.raises(ValueError, match=REFUSAL):
        fit(model, [x, 20 * x], "diag")


def test_models_of_which_everything_is_proven_are_not_asked_again(monkeypatch):
    asked = []
    monkeypatch.setattr(unproven, "check_function", lambda *args: asked.append(soundness.check_function(*args)))
    torch.manual_seed(4)
    places = Function(lambda m, x: m.inner(torch.eye(3, dtype=torch.float64)), inner=nn.Linear(3, 3))
    model = (
        Function(lambda m, x: m.head(x.relu() + m.places(x)[0]), places=places, head=nn.Linear(3, 2)).double().eval()
    )
    x = torch.randn(4, 3).double()
    fit(model, [x, x, x], "kron")
    assert not asked  # values of positions are the same for all examples, and stay so
    fit(model, [0 * x, x, x], "kron")
    assert not asked  # equal examples are moved apart by the first look


def test_what_was_dead_and_is_sound_is_asked_once_and_fitted(monkeypatch):
    asked = []
    monkeypatch.setattr(unproven, "check_function", lambda *args: asked.append(soundness.check_function(*args)))
    run = lambda m, x: m.head((m.inner(x) - 5).relu())  # noqa: E731
    torch.manual_seed(5)
    model = Function(run, inner=nn.Linear(3, 3), head=nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        model.inner.weight.abs_()
    x = torch.rand(4, 3).double()
    fit(model, [x, 20 * (1 + x), 20 * (1 + x), 30 * (1 + x)], "diag")
    assert 1 <= len(asked) <= 2  # a module that differs between examples, and a gradient


# --- backends of other packages, and products with vectors ---------------------------------------------------------------


BACKENDS = {
    "CurvlinopsGGN": ["full", "diag", "kron"],
    "CurvlinopsEF": ["full"],
    "AsdlGGN": ["full", "diag", "kron"],
    "AsdlEF": ["diag"],
    "CurvlinopsHessian": ["full", "lowrank"],
    "AsdlHessian": ["full", "lowrank"],
    "NativeHessian": ["full", "lowrank"],
    "NativeGGN": ["lowrank", "gp"],
    "GGNInterface": ["diag"],
}


@pytest.mark.parametrize("name", ["dead", "dead branch"])
@pytest.mark.parametrize(("backend", "structure"), [(b, s) for b, found in BACKENDS.items() for s in found])
def test_a_later_batch_is_refused_whoever_makes_the_passes(backend, structure, name):
    model, small, large = made(name)
    la = Laplace(model, "regression", "all", structure, backend=getattr(curvature, backend))
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=REFUSAL):
        la.fit([(x, zeros) for x in (small, small, large)])


@pytest.mark.parametrize("backend", ["CurvlinopsGGN", "AsdlGGN", "GGNInterface"])
@pytest.mark.parametrize("how", ["backprop", "joint"])
def test_a_prediction_is_refused_whoever_makes_the_passes(backend, how):
    model, small, large = made("dead branch")
    la = Laplace(model, "regression", "all", "diag", backend=getattr(curvature, backend))
    la.fit([(small, torch.zeros(4, 2, dtype=torch.float64))])
    la.enable_backprop = how == "backprop"
    la(small, joint=how == "joint")
    with pytest.raises(ValueError, match=REFUSAL):
        la(large, joint=how == "joint")


# --- what a fit does not differentiate -----------------------------------------------------------------------------------


def frozen(model):
    """The model with its head alone to be inferred."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    return model


@pytest.mark.parametrize(
    ("backend", "structure"),
    [("NativeGGN", s) for s in [*STRUCTURES, "gp"]]
    + [("CurvlinopsGGN", "kron"), ("AsdlGGN", "diag"), ("GGNInterface", "full")],
)
@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize("name", ["dead branch", "dead product"])
def test_what_comes_alive_before_the_inferred_parameters_is_refused(name, subset, backend, structure):
    model, small, large = made(name)
    if name == "dead product":  # ASDL takes a model with a frozen weight for a frozen layer
        model.matrix = model.weight
        del model.weight
        model.function = lambda m, x: m.head(x + over_the_batch((x @ m.matrix - 5).relu()))
    model = frozen(model) if subset == "all" else model
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    la, loaded = (
        Laplace(model, "regression", subset, structure, backend=getattr(curvature, backend)) for _ in ("fit", "load")
    )
    with pytest.raises(ValueError, match=REFUSAL):
        la.fit([(x, zeros) for x in (small, small, large)])
    la.fit([(x, zeros) for x in (small, small)])
    if structure != "gp":
        loaded.load_state_dict(la.state_dict())
    for posterior in (la, loaded) if structure != "gp" else (la,):
        posterior(small)
        for _ in range(2):
            with pytest.raises(ValueError, match=REFUSAL):
                posterior(large)


def test_backbones_that_are_alive_take_no_backward_pass_again(monkeypatch):
    seen = []
    monkeypatch.setattr(unproven, "live_rows", lambda *args: seen.append(1) or {})
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval(), torch.randn(4, 3).double()
    la = Laplace(model, "regression", "last_layer", "kron")
    la.fit([(x, torch.zeros(4, 2, dtype=torch.float64))] * 3)
    la(x)
    assert not seen


class OneWay(torch.autograd.Function):
    """A kernel without a backward pass, as quantised ones are."""

    @staticmethod
    def forward(ctx, x, w):
        return x @ w


def test_a_backbone_without_a_backward_pass_is_fitted():
    torch.manual_seed(4)
    model = (
        Function(lambda m, x: m.head(OneWay.apply(x, m.weight)), weight=P(3, 3), head=nn.Linear(3, 2)).double().eval()
    )
    x, y = torch.randn(4, 3).double(), torch.zeros(4, 2, dtype=torch.float64)
    la = Laplace(model, "regression", "last_layer", "full")
    la.fit([(x, y)])
    plain = Laplace(nn.Sequential(model.head), "regression", "all", "full")
    plain.fit([(x @ model.weight.detach(), y)])
    torch.testing.assert_close(la.H, plain.H)


@pytest.mark.parametrize("structure", ["kron", "full", "diag"])
def test_a_module_that_never_runs_costs_no_pass_where_there_is_one_already(structure):
    torch.manual_seed(4)
    x, y = torch.randn(4, 3).double(), torch.zeros(4, 2, dtype=torch.float64)

    def passes(batches, **modules):
        model = Function(lambda m, x: (counts.append(1), m.head(x))[1], head=nn.Linear(3, 2), **modules).double().eval()
        if modules:
            model.spare.requires_grad_(False)
        counts = []
        fit_by = Laplace(model, "regression", "all", structure, backend=curvature.CurvlinopsGGN)
        fit_by.fit([(x, y)] * batches)
        return len(counts)

    def of_a_batch(**modules):
        return passes(3, **modules) - passes(2, **modules)

    assert of_a_batch(spare=nn.Linear(3, 3)) == of_a_batch()


@pytest.mark.parametrize(("backend", "package"), [("CurvlinopsGGN", "curvlinops"), ("AsdlGGN", "ASDL")])
def test_packages_that_lose_a_layer_are_refused_by_name(backend, package):
    torch.manual_seed(4)
    model = Function(
        lambda m, x: m.head(m.inner(x[:, None]).relu_()[:, 0]), inner=nn.Linear(3, 3), head=nn.Linear(3, 2)
    )
    la = Laplace(model.eval(), "regression", "all", "kron", backend=getattr(curvature, backend))
    with pytest.raises(ValueError, match=f"{package} has not seen the gradient of layer 'inner'"):
        la.fit([(torch.randn(4, 3), torch.zeros(4, 2))])


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_asdl_and_a_frozen_weight_of_the_model_itself(structure):
    model = Function(lambda m, x: m.head(x @ m.weight), weight=P(3, 3), head=nn.Linear(3, 2)).eval()
    model.weight.requires_grad_(False)
    la = Laplace(model, "regression", "all", structure, backend=curvature.AsdlGGN)
    with pytest.raises(ValueError, match="that of Function has requires_grad=False"):
        la.fit([(torch.randn(4, 3), torch.zeros(4, 2))])


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.uint16, torch.int64])
def test_inputs_of_any_kind_of_whole_numbers_are_compared(kind):
    torch.manual_seed(0)
    model = Function(lambda m, x: m.head(x.double()), head=nn.Linear(3, 2)).double().eval()
    x, y = torch.arange(12).reshape(4, 3) % 2, torch.zeros(4, 2, dtype=torch.float64)
    one, other = (Laplace(model, "regression", "all", "full") for _ in range(2))
    one.fit([(x.to(kind), y)])
    other.fit([(x, y)])
    torch.testing.assert_close(one.H, other.H)


def test_a_graph_that_does_not_fit_into_memory_is_done_without():
    class Large(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("no room")
            return x.tanh()

    la = Laplace(nn.Sequential(nn.Linear(3, 3), Large(), nn.Linear(3, 2)), "regression", "last_layer", "full")
    la.fit([(torch.randn(4, 3), torch.zeros(4, 2))])
    assert la(torch.randn(2, 3))[1].shape == (2, 2, 2)


def test_a_backbone_that_asks_its_parameters_for_more_is_fitted():
    """As quantised weights, which hold what turns them into numbers."""
    model = Function(
        lambda m, x: m.head(x @ (m.weight * m.weight.scale)), weight=torch.ones(3, 3), head=nn.Linear(3, 2)
    )
    model.weight.scale = 2.0
    la = Laplace(model.eval(), "regression", "last_layer", "full")
    la.fit([(torch.randn(4, 3), torch.zeros(4, 2))])
    assert la(torch.randn(2, 3))[1].shape == (2, 2, 2)
