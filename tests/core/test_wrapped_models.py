"""Models as they come out of training: compiled, distributed, in other memory, with fused kernels; right, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from laplace import Laplace, curvature
from laplace.likelihoods import Bernoulli

from .planned import planned
from .random_features import EITHER, Block
from .random_models import CONTEXTS, Case
from .verdicts import examine

STRUCTURES = ["full", "diag", "kron"]


class Net(nn.Module):
    def __init__(self, run=None):
        super().__init__()
        self.body, self.head, self.run = nn.Linear(3, 4), nn.Linear(4, 2), run

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))) if self.run is None else self.run(self, x)


class Attention(nn.Module):
    """Projections and a head around torch's fused attention."""

    def __init__(self, causal=False):
        super().__init__()
        self.causal, self.qkv, self.head = causal, nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, 2))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


def vectors(model, head):
    return Case(model, torch.randn(5, 3), torch.randint(2, (5,)), head)


def sequences(model, head, width=4):
    return Case(model, torch.randn(5, 3, width), torch.randint(2, (5,)), head)


def with_compiled(part):
    model = Net()
    setattr(model, part, torch.compile(getattr(model, part), backend="eager"))
    return model


def compiled_in_place():
    model = Net()
    model.compile(backend="aot_eager")
    return model


def compiled_method():
    model = Net()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def channels_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    return Case(model.to(memory_format=torch.channels_last), x, torch.randint(2, (5,)), "4")


def frozen_encoder():
    """A frozen encoder, which takes torch's fast path in evaluation mode."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), 1).requires_grad_(False)
    return Block(lambda m, x: m.head(m.encoder(x).mean(1)), encoder=encoder, head=nn.Linear(4, 2)).eval()


def trained_encoder():
    encoder = nn.TransformerEncoderLayer(4, 2, 3, batch_first=True)
    return Block(lambda m, x: m.head(m.encoder(x).mean(1)), encoder=encoder, head=nn.Linear(4, 2)).eval()


def padded_encoder():
    """A stack that torch runs on nested tensors without gradients, of which positions that are padding come back as zeros."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), 2)

    def run(m, x):
        return m.head(m.encoder(x, src_key_padding_mask=x[..., 0] > 0.5).mean(1))

    return Block(run, encoder=encoder, head=nn.Linear(4, 2)).eval()


def without_gradient(m, x):
    with torch.no_grad():
        h = torch.tanh(m.body(x))
    return m.head(h)


def frozen_backbone():
    model = Net(without_gradient)
    model.body.requires_grad_(False)
    return model


def checkpointed(reentrant):
    def run(m, x):
        x = x.detach().requires_grad_() if reentrant else x  # as callers of the re-entrant one have to
        return m.head(checkpoint(lambda x: torch.tanh(m.body(x)), x, use_reentrant=reentrant))

    return run


def with_spectral_norm():
    model = Net()
    parametrizations.spectral_norm(model.body)
    return model.eval()


MODELS = {
    "compiled": lambda: vectors(torch.compile(Net(), backend="aot_eager"), "_orig_mod.head"),
    "compiled layer": lambda: vectors(with_compiled("body"), "head"),
    "compiled last layer": lambda: vectors(with_compiled("head"), "head._orig_mod"),
    "compiled in place": lambda: vectors(compiled_in_place(), "head"),
    "compiled method": lambda: vectors(compiled_method(), "head"),
    "DataParallel": lambda: vectors(nn.DataParallel(Net()), "module.head"),
    "symbolically traced": lambda: vectors(torch.fx.symbolic_trace(Net()), "head"),
    "channels last": channels_last,
    "fused attention": lambda: sequences(Attention(), "head"),
    "causal attention": lambda: sequences(Attention(causal=True), "head"),
    "frozen encoder": lambda: sequences(frozen_encoder(), "head"),
    "trained encoder": lambda: sequences(trained_encoder(), "head"),
    "padded encoder": lambda: sequences(padded_encoder(), "head"),
    "frozen backbone": lambda: vectors(frozen_backbone(), "head"),
    "non-reentrant checkpoint": lambda: vectors(Net(checkpointed(False)), "head"),
    "spectral norm": lambda: vectors(with_spectral_norm(), "head"),
    "whole copy": lambda: vectors(copy.deepcopy(Net()), "head"),
}


@pytest.mark.filterwarnings("ignore:No Kronecker factors")
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_right(name, structure, subset):
    verdict = examine(planned(MODELS[name], structure, subset=subset))
    assert verdict.kind == "right", verdict


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["compiled", "fused attention", "trained encoder", "channels last"])
def test_predictions_without_a_graph(name, context):
    verdict = examine(planned(MODELS[name], "kron", context=context))
    assert verdict.kind == "right", verdict


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_distributed_data_parallel(process_group, structure, subset):
    wrapped = lambda: vectors(nn.parallel.DistributedDataParallel(Net()), "module.head")  # noqa: E731
    verdict = examine(planned(wrapped, structure, "float32", subset))
    assert verdict.kind == "right", verdict


def test_sharded_parameters_are_named(process_group):
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"'head.bias'\] are sharded .*full state dict"):
        Laplace(model, "classification")


@pytest.mark.parametrize("name", MODELS)
def test_a_fit_leaves_compilation_as_it_was(name):
    """What is compiled runs as written during a fit, and compiled again after it."""
    case = MODELS[name]()
    model = case.model.float()
    before = model(case.x)
    Laplace(model, "classification", "all", "diag").fit(case.batches(3))
    assert torch.equal(model(case.x), before)


REFUSED = {
    "scripted": (lambda x: torch.jit.script(Net().body), r"The model \(.*\) is scripted"),
    "traced": (lambda x: torch.jit.trace(Net(), x), r"The model \(TopLevelTracedModule\) is scripted or traced"),
    "scripted inside": (lambda x: nn.Sequential(torch.jit.script(nn.Linear(3, 2))), r"Module '0' \(.*\) is scripted"),
    "exported": (lambda x: torch.export.export(Net(), (x,)).module(), r"The model .* torch.export.*was exported"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_looked_into_are_named(name, subset):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Laplace(make(torch.randn(4, 3)), "classification", subset)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_transform_inside_the_model(structure):
    """Layers that run inside of a vmap are differentiated as they are; a last layer there is refused."""
    run = lambda m, x: torch.func.vmap(lambda t: m.head(torch.tanh(m.body(t))))(x)  # noqa: E731
    verdict = examine(planned(lambda: vectors(Net(run), "head"), structure))
    assert verdict.kind == "right", verdict
    with pytest.raises(ValueError, match="'head' runs inside of torch.func.vmap"):
        Laplace(Net(run), "classification", "last_layer", structure).fit([(torch.randn(3, 3), torch.tensor([0, 1, 0]))])


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_reentrant_checkpoints_and_backbones_without_gradient(structure, subset):
    for run in (checkpointed(True), without_gradient):
        verdict = examine(planned(lambda run=run: vectors(Net(run), "head"), structure, subset=subset, expected=EITHER))
        assert verdict.good, verdict


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_logit_of_a_bernoulli(structure):
    """Labels (batch,) fit outputs (batch, 1); outputs (batch,) are refused with the way out."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    la = Laplace(model, Bernoulli(), "all", structure)
    la.fit([(x, y)])
    column = Laplace(model, Bernoulli(), "all", structure)
    column.fit([(x, y[:, None].double())])
    assert torch.equal(la(x), column(x)) and la(x).shape == (6, 1)
    flat = nn.Sequential(model, nn.Flatten(0))
    with pytest.raises(ValueError, match=r"unsqueeze\(-1\).*labels of a Bernoulli may stay \(batch,\)"):
        Laplace(flat, Bernoulli(), "all", structure).fit([(x, y)])


class Biased(nn.Module):
    """A position bias that is indexed once in evaluation mode and kept, as LeViT's: in a dictionary, or as an attribute."""

    def __init__(self, attribute):
        super().__init__()
        self.attribute, self.kept = attribute, {}
        self.bias, self.head = nn.Parameter(torch.randn(2)), nn.Linear(3, 2)
        self.register_buffer("places", torch.tensor([0, 1, 1]))

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
            self.__dict__.pop("indexed", None)
        elif self.attribute:
            self.indexed = self.bias[self.places]
        return self

    def forward(self, x):
        if self.attribute:
            bias = self.bias[self.places] if self.training else self.indexed
        elif self.training:
            bias = self.bias[self.places]
        else:
            bias = self.kept.setdefault(str(x.device), self.bias[self.places])
        return self.head(torch.tanh(x + bias))


def biased(attribute):
    with torch.no_grad():
        model = Biased(attribute).double().eval()
        model(torch.randn(2, 3).double())  # what is kept now has no gradient
    return vectors(model, "head")


@pytest.mark.parametrize("attribute", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_modules_keep_between_passes_has_its_gradient(attribute, structure):
    def fresh():
        case = biased(attribute)
        case.model.train().eval()
        return case

    la = {}
    for name, made in (("stale", biased), ("fresh", lambda attribute: fresh())):
        torch.manual_seed(0)
        case = made(attribute)
        la[name] = Laplace(case.model, "classification", "all", structure)
        la[name].fit([(case.x.double(), case.y)])
    assert torch.equal(la["stale"].log_marginal_likelihood(), la["fresh"].log_marginal_likelihood())
    verdict = examine(planned(fresh, structure))
    assert verdict.kind == "right", verdict


class Inside(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


WRAPPERS = {
    "as it is": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "inside of another": Inside,
}


@pytest.mark.parametrize(
    "structure", ["full", "kron", "ekfac", "diag", "lowrank", "blockdiag", "gp", "last_layer", "subnetwork"]
)
@pytest.mark.parametrize(
    "saved, loaded", [("as it is", "compiled"), ("DataParallel", "as it is"), ("compiled", "inside of another")]
)
def test_a_state_goes_on_in_another_wrapper(saved, loaded, structure):
    torch.manual_seed(0)
    net, x, y = Net(), torch.randn(8, 3), torch.arange(8) % 2
    subset = structure if structure in ("last_layer", "subnetwork") else "all"
    options = {"subnetwork_indices": torch.tensor([1, 8, 20])} if subset == "subnetwork" else {}
    kind = "full" if subset != "all" else structure
    one, two = (
        Laplace(WRAPPERS[name](copy.deepcopy(net)), "classification", subset, kind, **options)
        for name in (saved, loaded)
    )
    one.fit([(x, y)])
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x), one(x))
    if structure not in ("lowrank", "gp"):
        two.fit([(x, y)], override=False)
        assert two.n_data == 16


def test_a_state_of_a_model_with_other_names_is_refused():
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    other = nn.Sequential(nn.Identity(), *copy.deepcopy(net))
    for subset in ("all", "last_layer"):
        la = Laplace(net, "classification", subset, "kron")
        la.fit([(x, y)])
        with pytest.raises(ValueError, match="which the model has not; it has"):
            Laplace(other, "classification", subset, "kron").load_state_dict(la.state_dict())


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_sampled_networks_of_data_parallel_models(structure):
    torch.manual_seed(0)
    net, x, y = Net(), torch.randn(8, 3), torch.arange(8) % 2
    found = []
    for model in (net, nn.DataParallel(copy.deepcopy(net))):
        la = Laplace(model, "classification", "all", structure)
        la.fit([(x, y)])
        draws = {"n_samples": 3, "generator": torch.Generator().manual_seed(0)}
        found += [la(x, pred_type="nn", link_approx="mc", **draws)]
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_attention_is_evaluated_as_it_is_trained_and_torchs_way_is_restored(subset):
    torch.manual_seed(0)
    model, x = padded_encoder().double(), torch.randn(5, 3, 4).double()
    la = Laplace(model, "regression", subset, "diag")
    la.fit([(x, torch.zeros(5, 2).double())])
    mean, _ = la(x)
    torch.testing.assert_close(mean, model(x).detach())  # with gradients, so as in training
    assert torch.backends.mha.get_fastpath_enabled()


class Sine(torch.autograd.Function):
    """Has no derivative in forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("backend", ["CurvlinopsGGN", "CurvlinopsHessian"])
def test_curvlinops_says_that_a_function_has_no_derivative_in_forward_mode(backend):
    model = Net(lambda m, x: m.head(Sine.apply(m.body(x))))
    la = Laplace(model, "regression", "all", "full", backend=getattr(curvature, backend))
    with pytest.raises(ValueError, match="which it differentiates in forward mode"):
        la.fit([(torch.randn(4, 3), torch.zeros(4, 2))])


def test_curvlinops_takes_a_kernel_of_attention_that_has_one():
    torch.manual_seed(0)
    model, x, y = Attention().double(), torch.randn(5, 3, 4).double(), torch.zeros(5, 2).double()
    one, other = (
        Laplace(model, "regression", "all", "full", backend=getattr(curvature, name))
        for name in ("CurvlinopsGGN", "NativeGGN")
    )
    one.fit([(x, y)])
    other.fit([(x, y)])
    torch.testing.assert_close(one.H, other.H)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_that_torch_keeps_are_no_others(structure, subset, first):
    """Inside of ``parametrize.cached``, networks drawn from the posterior ran with the weights of the mean."""
    torch.manual_seed(0)
    model, x, y = Net().double().eval(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    for layer in (model.body, model.head):
        parametrize.register_parametrization(layer, "weight", Doubled())

    def predicted():
        la = Laplace(model, "regression", subset, structure)
        la.fit([(x, y)])
        draws = la.functional_samples(x, "nn", 5, generator=torch.Generator().manual_seed(0))
        return *la(x), draws

    wanted = predicted()
    with parametrize.cached():
        kept = model.body.weight if first else None
        found = predicted()
        assert kept is None or model.body.weight is kept
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other)
