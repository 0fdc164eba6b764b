"""Online empirical Bayes against a naive transcription of its algorithm, and the sinusoid of the documentation."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace import FullLaplace, KronLaplace, Laplace, marglik_training
from laplace.curvature import NativeEF, NativeGGN
from laplace.evidence import maximize_evidence
from tests.core import naive
from tests.core.models import CASES, loader, mlp

# --- against a transcription -----------------------------------------------------------------------------------------


def problem(likelihood, n=10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(n, 2, dtype=torch.float64)
    y = torch.randn(n, 2, dtype=torch.float64) if likelihood == "regression" else torch.arange(n) % 2
    return model, x, y


def evidence(model, x, y, likelihood, structure, prior, sigma, temperature):
    """Negative log evidence from dense matrices."""
    theta = parameters_to_vector(model.parameters()).detach()
    h = naive.full(model, x, y, likelihood, "ggn") / sigma**2 / temperature
    h = torch.diag(h.diagonal()) if structure == "diag" else h
    loss = naive.loss(model, x, y, likelihood) / sigma**2 / temperature
    if likelihood == "regression":
        loss = loss + y.numel() * (sigma.log() + 0.5 * math.log(2 * math.pi))
    log_dets = torch.logdet(h + torch.diag(prior)) - prior.log().sum()
    return loss + 0.5 * (log_dets + (prior * theta * theta).sum())


def transcription(model, x, y, likelihood, structure, sizes, epochs, steps, batch_size, temperature):
    """Algorithm 1, with one number of ``sizes`` for each value of the prior precision."""
    log_prior = torch.zeros(len(sizes), dtype=torch.float64, requires_grad=True)
    log_sigma = torch.zeros((), dtype=torch.float64, requires_grad=True)
    hyper = [log_prior, log_sigma] if likelihood == "regression" else [log_prior]
    adam = torch.optim.Adam(hyper, lr=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    expand = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    margliks, losses = [], []
    for _ in range(epochs):
        total = 0.0
        prior, sigma = log_prior.detach().exp()[expand], log_sigma.detach().exp()
        for start in range(0, len(x), batch_size):
            a, b = x[start : start + batch_size], y[start : start + batch_size]
            optimizer.zero_grad()
            theta = torch.cat([p.flatten() for p in model.parameters()])
            if likelihood == "regression":
                loss, scale = (model(a) - b).square().mean(), 1 / (2 * sigma**2 * temperature)
            else:
                loss, scale = nn.functional.cross_entropy(model(a), b), 1 / temperature
            loss = loss + 0.5 * (prior * theta * theta).sum() / len(x) / scale
            loss.backward()
            optimizer.step()
            total += loss.item() * len(a)
        losses.append(total / len(x))
        for _ in range(steps):
            adam.zero_grad()
            prior, sigma = log_prior.exp()[expand], log_sigma.exp()
            value = evidence(model, x, y, likelihood, structure, prior, sigma, temperature)
            value.backward()
            adam.step()
            margliks.append(value.item())
    return margliks, losses


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("prior_structure, sizes", [("scalar", [17]), ("layerwise", [6, 3, 6, 2]), ("diag", [1] * 17)])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_every_number_is_that_of_the_algorithm(likelihood, structure, prior_structure, sizes, temperature):
    model, x, y = problem(likelihood)
    expected = transcription(copy.deepcopy(model), x, y, likelihood, structure, sizes, 3, 2, 5, temperature)
    la, trained, margliks, losses = marglik_training(
        model,
        DataLoader(TensorDataset(x, y), batch_size=5),
        likelihood,
        structure,
        optimizer_kwargs={"lr": 1e-2},
        n_epochs=3,
        n_hypersteps=2,
        prior_structure=prior_structure,
        temperature=temperature,
    )
    assert trained is model is la.model
    assert margliks == pytest.approx(expected[0], rel=1e-9)
    assert losses == pytest.approx(expected[1], rel=1e-9)
    assert la.prior_precision.shape == (len(sizes),)
    assert la.temperature == temperature


def train(likelihood="regression", structure="full", n=10, batch_size=5, **kwargs):
    model, x, y = problem(likelihood, n)
    kwargs = {"n_epochs": 4, "n_hypersteps": 3, "optimizer_kwargs": {"lr": 1e-2}, "prior_structure": "scalar", **kwargs}
    return marglik_training(
        model, DataLoader(TensorDataset(x, y), batch_size=batch_size), likelihood, structure, **kwargs
    )


# --- what is returned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_best_posterior_and_its_weights_are_returned(structure):
    # From the fifth epoch on the steps are so large that the weights leave the region of high evidence again.
    wild = {"lr_lambda": lambda step: 1 if step < 8 else 200}
    la, model, margliks, _ = train(
        structure=structure, n_epochs=6, scheduler_cls=torch.optim.lr_scheduler.LambdaLR, scheduler_kwargs=wild
    )
    ends = margliks[2::3]
    assert min(ends) < ends[-1] - 0.1
    assert -la.log_marginal_likelihood().item() == pytest.approx(min(ends), rel=1e-9)
    again = Laplace(model, "regression", "all", structure)
    again.fit(DataLoader(TensorDataset(*problem("regression")[1:]), batch_size=5))
    again.prior_precision, again.sigma_noise = la.prior_precision, la.sigma_noise
    assert -again.log_marginal_likelihood().item() == pytest.approx(min(ends), rel=1e-9)
    assert not la.prior_precision.requires_grad and not la.sigma_noise.requires_grad


def test_buffers_return_with_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    _, x, y = problem("regression")
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    la, model, margliks, _ = marglik_training(
        model, loader, "regression", "diag", n_epochs=6, n_hypersteps=1, optimizer_kwargs={"lr": 0.5}
    )
    assert min(margliks) < margliks[-1]
    loss = 0.5 * (model.eval()(x) - y).square().sum()
    assert la.loss.item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize(
    "settings, estimates",
    [
        ({}, 4),
        ({"n_epochs_burnin": 2}, 2),
        ({"marglik_frequency": 2}, 2),
        ({"marglik_frequency": 3}, 1),
        ({"n_epochs_burnin": 3, "marglik_frequency": 2}, 1),
        ({"n_epochs_burnin": 4}, 0),
    ],
)
def test_when_the_evidence_is_estimated(settings, estimates):
    la, model, margliks, losses = train(**settings)
    assert (len(margliks), len(losses)) == (3 * estimates, 4)
    assert torch.equal(la.mean, parameters_to_vector(model.parameters()).detach())
    if not estimates:
        assert (la.prior_precision.item(), la.sigma_noise.item()) == (1.0, 1.0)


def test_hyperparameters_stay_until_the_first_estimate():
    plain, late = train(n_epochs_burnin=4)[3], train(n_epochs_burnin=2)[3]
    assert plain[:3] == late[:3]
    assert plain[3] != late[3]


def test_noise_is_fixed_or_optimised():
    fixed = train(fix_sigma_noise=True, sigma_noise_init=0.5)[0]
    assert fixed.sigma_noise.item() == 0.5
    free = train(sigma_noise_init=0.5)[0]
    assert free.sigma_noise.item() != 0.5
    assert train("classification")[0].sigma_noise.item() == 1.0
    assert train(prior_prec_init=3.0, n_epochs_burnin=4)[0].prior_precision.item() == 3.0


def test_scheduler_steps_after_every_batch():
    optimizers = []

    class Remembered(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    train(
        optimizer_cls=Remembered,
        optimizer_kwargs={"lr": 0.1},
        scheduler_cls=torch.optim.lr_scheduler.ExponentialLR,
        scheduler_kwargs={"gamma": 0.5},
        batch_size=4,
    )
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (4 * 3))  # epochs × batches


def test_learning_rate_of_the_hyperparameters():
    slow, fast = (train(lr_hyp=lr, n_epochs=1, n_hypersteps=2)[0].prior_precision.item() for lr in (0.01, 0.1))
    assert math.log(slow) == pytest.approx(0.01, rel=1e-3)  # Adam's first step is its step size
    assert math.log(fast) == pytest.approx(0.1, rel=1e-3)


def test_backends_classes_and_backprop():
    la = train(structure="kron", enable_backprop=True)[0]
    assert isinstance(la, KronLaplace) and isinstance(la.backend, NativeGGN)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert la(x)[0].requires_grad and la(x)[1].requires_grad
    assert isinstance(train(backend=NativeEF)[0].backend, NativeEF)


class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        return self.net(batch["inputs"])


def test_dict_like_batches_and_outputs_with_positions():
    torch.manual_seed(0)
    batches = [{"inputs": torch.randn(4, 5, 3), "targets": torch.randint(3, (4, 5))} for _ in range(2)]
    arguments = {"dict_key_x": "inputs", "dict_key_y": "targets", "n_epochs": 5, "n_hypersteps": 2}
    model = Dicts()
    pairs = [(batch["inputs"], batch["targets"]) for batch in batches]
    expected = marglik_training(copy.deepcopy(model.net), pairs, "classification", "diag", **arguments)
    la, _, margliks, losses = marglik_training(model, batches, "classification", "diag", **arguments)
    assert (la.n_data, len(margliks)) == (8, 10)
    assert margliks == expected[2] and losses == expected[3]
    assert losses[0] != losses[-1]


class Stream(IterableDataset):
    """A data set without a length."""

    def __init__(self, x, y):
        self.rows = list(zip(x, y, strict=True))

    def __iter__(self):
        return iter(self.rows)


def test_examples_are_counted_where_the_length_is_unknown():
    model, x, y = problem("regression")
    kwargs = {"n_epochs": 2, "n_hypersteps": 2, "prior_structure": "scalar"}
    known = marglik_training(
        copy.deepcopy(model), DataLoader(TensorDataset(x, y), batch_size=5), "regression", "full", **kwargs
    )
    stream = marglik_training(model, DataLoader(Stream(x, y), batch_size=5), "regression", "full", **kwargs)
    assert stream[2:] == known[2:]


def test_progress_bar(capsys):
    train(progress_bar=True)
    assert "Training marginal likelihood" in capsys.readouterr().err


def test_import_paths():
    assert importlib.import_module("laplace.marglik_training").marglik_training is marglik_training


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"likelihood": "reward_modeling"}, "takes likelihood='classification' or 'regression'"),
        ({"likelihood": "count"}, "likelihood='count' is unknown"),
        ({"structure": "block"}, "hessian_structure='block' is unknown"),
        ({"structure": "kron", "prior_structure": "diag"}, "not a diagonal one"),
        ({"prior_structure": "none"}, "prior_structure='none' is unknown"),
        ({"n_epochs": 0}, "n_epochs=0 must be at least 1"),
        ({"n_hypersteps": 0}, "n_hypersteps=0"),
        ({"marglik_frequency": 0}, "marglik_frequency=0"),
        ({"likelihood": "classification", "sigma_noise_init": 0.5}, "no meaning for classification"),
        ({"prior_prec_init": -1.0}, "prior_precision must be positive"),
        ({"optimizer_cls": torch.optim.LBFGS}, "optimizer_cls=LBFGS asks for closure at every step"),
        (
            {"scheduler_cls": torch.optim.lr_scheduler.ReduceLROnPlateau},
            "ReduceLROnPlateau asks for metrics at every step",
        ),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        train(**{"likelihood": "regression", **settings})


def exploding():
    """A float32 network whose evidence is a number after a huge step, and the derivative of whose evidence is none."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), [(x, y)], "classification"


def test_training_that_diverges_says_so():
    with pytest.raises(ValueError, match="NaN|Inf|is inf|is nan"):
        train(optimizer_cls=torch.optim.SGD, optimizer_kwargs={"lr": 1e200})
    with pytest.raises(
        ValueError, match="The log marginal likelihood is -.*it or its gradient is not finite. Lower lr_hyp"
    ):
        marglik_training(*exploding(), optimizer_cls=torch.optim.SGD, optimizer_kwargs={"lr": 1e9}, n_epochs=3)
    for steps in (1, 5):  # the last step, and one that an evidence follows
        with pytest.raises(
            ValueError, match="leads to a prior precision or observation noise of 0 or Inf. Lower lr_hyp"
        ):
            train(lr_hyp=1e3, n_hypersteps=steps)
    model, batches, likelihood = exploding()
    for p in model.parameters():
        p.data *= 1e20
    la = Laplace(model, likelihood, "all", "diag")
    la.fit(batches)
    with pytest.raises(ValueError, match="at step 0, and it or its gradient is not finite, at weights up to .*e.19"):
        la.optimize_prior_precision()
    assert float(la.prior_precision) == 1
    with pytest.raises(ValueError, match="loader is empty"):
        marglik_training(problem("regression")[0], [], "regression")


# --- the sinusoid of the documentation -------------------------------------------------------------------------------

SIGMA = 0.3


def sinusoid(dtype, n=150):
    """Inputs uniform on [0, 8], targets ``sin(x)`` with noise of standard deviation 0.3."""
    generator = torch.Generator().manual_seed(711)
    x = 8 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    y = x.sin() + SIGMA * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype), DataLoader(TensorDataset(x.to(dtype), y.to(dtype)), batch_size=n)


def get_model(dtype):
    torch.manual_seed(711)
    return nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1)).to(dtype)


# The noise of 150 targets is known to a standard error of 0.3 / sqrt(300) = 0.017; the documentation finds 0.28 with
# data of its own. Three of them:
NOISE = pytest.approx(SIGMA, abs=3 * SIGMA / math.sqrt(2 * 150))
# The prior precision is an estimate from about ten well-determined weights, so its relative standard error is
# sqrt(2 / 10) = 0.45; over four draws of the data it came out between 0.10 and 0.12, and the documentation finds 0.10.
PRIOR = pytest.approx(0.10, rel=0.45)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.01), (torch.float64, 2e-3)])
def test_post_hoc_optimisation_of_the_documentation(dtype, tolerance):
    n_epochs = 1000
    x, y, train_loader = sinusoid(dtype)
    model = get_model(dtype)
    criterion = torch.nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(n_epochs):
        for a, b in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(a), b)
            loss.backward()
            optimizer.step()

    la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    la.fit(train_loader)
    log_prior, log_sigma = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    hyper_optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    for _ in range(n_epochs):
        hyper_optimizer.zero_grad()
        neg_marglik = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
        neg_marglik.backward()
        hyper_optimizer.step()

    sigma, delta = la.sigma_noise.item(), la.prior_precision.item()
    assert sigma == NOISE
    assert delta == PRIOR
    # At the optimum MacKay's fixed point holds: with the effective number of parameters g, delta = g / |theta|^2 and
    # sigma^2 = (sum of squares) / (n - g). In float32 the small eigenvalues of H are rounding noise,
    # of both signs: it moves g by little, as long as neither sign is cut off.
    f_mu, f_var = la(x)
    inside = (f_mu - y).abs().squeeze() < 2 * (f_var.squeeze() + sigma**2).sqrt()
    assert float(inside.double().mean()) == pytest.approx(0.954, abs=3 * math.sqrt(0.954 * 0.046 / 150))
    model = model.double()
    js = naive.jacobians(model, x.double())[:, 0]
    eigenvalues = torch.linalg.eigvalsh(js.T @ js).clamp(min=0) / sigma**2
    effective = (eigenvalues / (eigenvalues + delta)).sum().item()
    squares = (model(x.double()) - y.double()).square().sum().item()
    assert sigma**2 == pytest.approx(squares / (150 - effective), rel=tolerance)
    assert delta == pytest.approx(effective / float(la.mean.double().square().sum()), rel=tolerance)


@pytest.mark.parametrize("structure, tolerance", [("full", 0.005), ("kron", 0.002), ("diag", 1e-5), ("lowrank", 0.02)])
def test_float32_finds_the_prior_of_float64(structure, tolerance):
    """One trained network, its float32 curvature against its float64 curvature: the tuned hyperparameters agree."""
    x, y, train_loader = sinusoid(torch.float32)
    model = get_model(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    found = []
    for dtype in (torch.float32, torch.float64):
        kwargs = {"backend": NativeGGN, "backend_kwargs": {"low_rank": 60}} if structure == "lowrank" else {}
        la = Laplace(copy.deepcopy(model).to(dtype), "regression", "all", structure, sigma_noise=0.3, **kwargs)
        la.fit([(x.to(dtype), y.to(dtype))])
        found.append(maximize_evidence(la, torch.ones(1), torch.tensor(0.3), n_steps=200))
    for one, two in zip(*found, strict=True):
        assert float(one) == pytest.approx(float(two), rel=tolerance)


def test_a_float32_prior_survives_next_to_large_curvature():
    """Of the Cholesky factor that a diagonal prior takes: in float32 a precision of 10⁶ swallows most of a prior of 0.1."""
    found = []
    for dtype in (torch.float32, torch.float64):
        model = nn.Linear(3, 1, bias=False).to(dtype)
        x = torch.tensor([[1000.0, 1001.0, 0.0], [0.0, 0.0, 1000.0]], dtype=dtype)
        la = Laplace(model, "regression", "all", "full", prior_precision=torch.tensor([0.1, 0.1, 0.3]))
        la.fit([(x, torch.zeros(2, 1, dtype=dtype))])
        found.append((la.log_det_ratio, la(torch.tensor([[1.0, -1.0, 0.0]], dtype=dtype))[1]))
    for one, two in zip(*found, strict=True):
        assert float(one) == pytest.approx(float(two), rel=1e-3)


def test_joint_optimisation_of_the_documentation():
    x, y, train_loader = sinusoid(torch.float32)
    la, model, margliks, losses = marglik_training(
        model=get_model(torch.float32),
        train_loader=train_loader,
        likelihood="regression",
        hessian_structure="full",
        n_epochs=200,
        optimizer_kwargs={"lr": 1e-2},
        prior_structure="scalar",
    )
    assert isinstance(la, FullLaplace)
    assert la.sigma_noise.item() == NOISE
    assert la.prior_precision.item() == pytest.approx(
        0.10, rel=1.0
    )  # of other weights than after training without prior
    assert margliks[-1] < margliks[0] - 50
    assert (len(margliks), len(losses)) == (2000, 200)
    f_mu, f_var = la(torch.tensor([[4.0], [20.0]]))
    assert f_var[1].item() > 20 * f_var[0].item()  # less certain far from the data
    assert f_mu[0].item() == pytest.approx(math.sin(4.0), abs=0.15)


# --- examples that are used, not those that there are ----------------------------------------------------------------


def trained(loader, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    _, model, _, losses = marglik_training(
        model, loader, n_epochs=30, n_epochs_burnin=100, prior_prec_init=5.0, optimizer_kwargs={"lr": 0.05}, **kwargs
    )
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), losses


def many(n=80):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long())


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler", "drop_last", "collate", "batches"])
def test_a_sampler_that_uses_fewer_examples_counts_as_a_smaller_data_set(kind):
    data, few = many(), torch.utils.data.Subset(many(), range(8))
    loaders = {
        "sampler": lambda: DataLoader(data, batch_size=8, sampler=range(8)),
        "batch_sampler": lambda: DataLoader(data, batch_sampler=[list(range(8))]),
        "drop_last": lambda: DataLoader(torch.utils.data.Subset(data, range(15)), batch_size=8, drop_last=True),
        "collate": lambda: DataLoader(few, batch_size=8),
        "batches": lambda: [tuple(next(iter(DataLoader(few, batch_size=8))))],
    }
    found, truth = trained(loaders[kind]()), trained(DataLoader(few, batch_size=8))
    assert torch.equal(found[0], truth[0])
    assert found[1] == truth[1]
    assert float(truth[0].norm()) < 0.5 * float(trained(DataLoader(data, batch_size=80))[0].norm())


def test_a_collate_that_drops_examples_is_counted_after_the_first_epoch():
    def half(examples):
        return torch.utils.data.default_collate(examples[: len(examples) // 2])

    found = trained(DataLoader(many(), batch_size=80, collate_fn=half))[1]
    truth = trained(DataLoader(torch.utils.data.Subset(many(), range(40)), batch_size=80))[1]
    assert found[-1] == pytest.approx(truth[-1], rel=0.05)


def test_an_iterator_that_is_used_up_says_so():
    with pytest.raises(ValueError, match="is used up after one pass|empty, so there is nothing to train on"):
        trained(iter([tuple(next(iter(DataLoader(many(), batch_size=8))))]))


# --- after an empirical Bayes loop of one's own ----------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank", "gp"])
def test_after_evidence_at_tensors_with_gradients_everything_works(structure):
    model, x, y = CASES["regression"].make(n=6)
    la = Laplace(model, "regression", "all", structure)
    la.fit(loader(x, y))
    log_prior = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    log_noise = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (-la.log_marginal_likelihood(log_prior.exp(), log_noise.exp())).backward()
    assert float(log_prior.grad.abs()) > 0 and float(log_noise.grad.abs()) > 0
    copied = copy.deepcopy(la)
    assert torch.equal(copied.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert not copied.prior_precision.requires_grad
    if structure != "gp":
        assert la.sample(3).numpy().shape == (3, la.n_params)
    for out in (la(x), la(x, joint=True) if structure != "gp" else la(x)):
        assert not out[1].requires_grad
    assert torch.equal(copied(x)[1], la(x)[1])
