"""Small models drawn at random: layers × wrappers × inputs × outputs × precisions × likelihoods × structures × subsets.

``plan(seed)`` draws names alone and is cheap; ``Plan.build`` makes the model, the same one every time it is called. Seeds go
through the features in turn, so that consecutive seeds cover all of them; what surrounds the feature is random.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .random_features import ACTIVATIONS, EITHER, INPUTS, LAYERS, OUTER, REFUSE, RIGHT, VOCABULARY, WRAPPERS, Block
from .random_laws import LAWS, outputs_of

STRUCTURES = ("full", "diag", "kron")
CORRECTED = "ekfac"  # in place of some of those with factors
BY_LAYER = "blockdiag"  # in place of some that are dense
NO_SUMS = ("lowrank", "gp")
BACKENDS = ("curvlinops", "asdl", "backpack")
FOR_PACKAGES = frozenset({"linear", "tanh", "relu"})  # what all of them know
SUBSETS = ("all", "last_layer", "subnetwork")
LIKELIHOODS = ("classification", "regression", "reward_modeling")
PLAIN_OUTER = (
    "",
    "nested_sequential",
    "shifted_output",
    "dict_input",
    "dict_input_with_a_flag",
    "output_changed_in_place",
)
CONTEXTS = ("predicts under no_grad", "predicts under inference_mode")
PRECISIONS = ("float64", "float32", "bfloat16")  # the last is float32 under autocast
OUTPUTS = ("vector output", "sequence output")
SHAPES = {
    "vector": (3,),
    "sequence": (3, 3),
    "signal": (2, 5),
    "image": (2, 4, 4),
    "volume": (1, 3, 3, 3),
    "tokens": (4,),
}
for _place in ("vectors", "sequences", "spatial", "tokens", "kinds", "surroundings"):
    import_module(f"{__package__}.random_{_place}")  # fills the tables, in an order that what is drawn depends on
TABLES = (LAYERS, WRAPPERS, OUTER, INPUTS)
FEATURES = tuple(name for table in TABLES for name in table)
USUAL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NEED_THEIR_OUTPUT = (  # for their derivative
    "rnn_cell", "rnn", "gru", "gru_batch_second", "lstm", "packed_recurrence", "solved", "windows", "attention_with_a_mask",
)  # fmt: skip
BY_CHANCE = {
    "selected_positions",
    "packed_recurrence",
    "positions_first",
    "folded_positions_first",
    "weight_positions_first",
}
PERMUTING = ("channel_norm", "channels_last_linear")
IN_PLACE, ON_VIEW = "relu in place", "relu in place on a view"  # of layers whose output is a view of another tensor
CHOICES = (
    *STRUCTURES, CORRECTED, BY_LAYER, *NO_SUMS, *BACKENDS, *SUBSETS, *LIKELIHOODS, *LAWS, *PRECISIONS, *OUTPUTS, *ACTIVATIONS, ON_VIEW, "one by one", "wrapped head",
    "norm", *CONTEXTS,
)  # fmt: skip
NAMES = frozenset((*FEATURES, *CHOICES))
TOLERANCES = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 0.25}


class Network(nn.Module):
    """Layers, a reduction to what the head takes, and a linear head."""

    def __init__(self, layers, reduce, head):
        super().__init__()
        self.layers, self.reduce, self.head = nn.Sequential(*layers), reduce, head

    def features(self, x):
        return self.reduce(self.layers(x))

    def forward(self, x):
        return self.head(self.features(x))


@dataclass(frozen=True)
class Plan:
    """One random model in names.

    Attributes:
        seed: What it was drawn from; its weights and data follow from it as well.
        layers: Names of layers in order, see :mod:`tests.core.random_features`.
        activations: Names of what follows them.
        wrapped: Name of a wrapper, or none.
        wrapped_head: Whether the wrapper is around the head, not around a layer.
        outer: Name of an outer feature, or none.
        inputs: Name of an input feature, or none.
        context: In what the predictive is called, or nothing.
        output: Whether the model's outputs are ``(batch, classes)`` or ``(batch, positions, classes)``.
    """

    seed: int
    layers: tuple[str, ...]
    activations: tuple[str, ...]
    wrapped: str
    wrapped_head: bool
    outer: str
    inputs: str
    context: str
    output: str
    likelihood: str
    structure: str
    subset: str
    precision: str
    batch_size: int
    backend: str = ""

    @cached_property
    def names(self) -> frozenset[str]:
        """All features and choices."""
        found = {
            *self.layers,
            self.wrapped,
            self.outer,
            self.inputs,
            self.context,
            self.output,
            self.likelihood,
            self.structure,
            self.backend,
        }
        found |= {self.subset, self.precision, "one by one" if self.batch_size == 1 else ""}
        found |= {"wrapped head" if self.wrapped and self.wrapped_head else "", *self.activations}
        found |= {"norm" if any("norm" in name or name == "encoder_layer" for name in self.layers) else ""}
        for name, activation in zip(self.layers, self.activations, strict=True):
            if activation == IN_PLACE and (LAYERS[name].gives == "sequence" or name in PERMUTING):
                found.add(ON_VIEW)
        return frozenset(found - {""})

    @property
    def outcome(self) -> str:
        """What the library has to do with this model."""
        outcomes = {table[name].outcome for table in TABLES for name in self.names & table.keys()}
        if REFUSE in outcomes:
            return REFUSE
        last_layer = self.subset == "last_layer" and (self.outer or (self.wrapped and self.wrapped_head))
        if BY_CHANCE.intersection(self.layers) and self.batch_size <= 3:
            return EITHER  # rows of few examples, or of blank ones, may be in order by chance; later ones are refused
        bag = any(name.startswith("embedding_bag") for name in self.layers)  # whose gradient has no derivative
        if (
            self.backend
            or (self.structure == "lowrank" and bag)
            or (self.structure == "lowrank" and "autocast_inside" in self.layers)
            or (
                self.structure == "lowrank" and "sampled_on_a_grid" in self.layers
            )  # without second derivative before 2.14
        ):
            return EITHER  # packages refuse layers; a search among products of few digits may find nothing
        if self.precision == "bfloat16" and "bilinear" in self.layers:
            return EITHER  # the model itself does not run: autocast leaves the weights of bilinear layers as they are
        frozen = self.subset == "last_layer" and self.wrapped == "frozen_all_but_one"
        return EITHER if EITHER in outcomes or last_layer or frozen else RIGHT

    @property
    def tolerance(self) -> float:
        """Relative error that its precision leaves."""
        low = "autocast_inside" in self.layers and self.precision == "float32"
        return TOLERANCES["bfloat16" if low else self.precision]

    def __str__(self) -> str:
        parts = [
            " → ".join(
                f"{name} ({act})" if act else name for name, act in zip(self.layers, self.activations, strict=True)
            ),
            self.wrapped and f"{self.wrapped} around {'the head' if self.wrapped_head else 'a layer'}",
            self.outer,
            self.inputs,
            self.context,
            f"{self.output}, {self.likelihood}, {self.subset}, {self.structure}, {self.precision}, "
            f"batches of {self.batch_size}" + (f", {self.backend}" if self.backend else ""),
        ]
        return f"seed {self.seed}: " + "; ".join(part for part in parts if part)

    def build(self) -> Case:
        """The model and its data, in float32 or float64; every call makes the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _build(self, random.Random(f"model {self.seed}"))


@dataclass
class Case:
    """A model that is built, and its data.

    Attributes:
        model: In evaluation mode, unless a feature says otherwise.
        x: Inputs: a tensor, a dictionary or a tuple.
        y: Targets.
        head: Name of the module that is the last layer.
    """

    model: nn.Module
    x: Any
    y: torch.Tensor
    head: str

    def to(self, device: str) -> Case:
        """The same elsewhere; parameters stay the same objects."""
        x = torch.utils._pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), self.x)
        return Case(self.model.to(device), x, self.y.to(device), self.head)

    def batches(self, size: int) -> list:
        """What a data loader would give, in copies."""
        found = []
        for start in range(0, len(self.y), size):
            rows = slice(start, start + size)
            x, y = part(self.x, rows), self.y[rows]
            found.append({**x, "labels": y} if isinstance(x, dict) else (x, y))
        return found


def part(x: Any, rows: slice) -> Any:
    """Copies of some examples of a batch of inputs."""
    if isinstance(x, dict):
        return {key: part(value, rows) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(part(value, rows) for value in x)
    return x[rows].clone() if isinstance(x, torch.Tensor) else x


def plan(seed: int) -> Plan:
    """Draw a model's names."""
    rng = random.Random(seed)
    focus = FEATURES[seed % len(FEATURES)]
    layers, sequence = _layers(rng, "token_linear" if focus == "classes_first" else focus)
    output = rng.choice(OUTPUTS) if sequence else OUTPUTS[0]
    outer = focus if focus in OUTER else _some(rng, OUTER, 0.1)
    wrapped = focus if focus in WRAPPERS else _some(rng, WRAPPERS, 0.12)
    inputs = focus if focus in INPUTS else _some(rng, INPUTS, 0.15)
    if outer == "classes_first":
        outer, output = (outer, OUTPUTS[1]) if sequence else ("", output)
    if outer == "classes_first":
        likelihood = "classification"
    elif outer == "one_value_per_example":
        likelihood, output = "regression", OUTPUTS[0]
    else:
        likelihood = rng.choices(LIKELIHOODS, (10, 7, 1))[0]
    subset = rng.choices(SUBSETS, (7, 2, 2))[0]
    structure = rng.choice(STRUCTURES[:2] if subset == "subnetwork" else STRUCTURES)
    if likelihood == "reward_modeling":
        output = OUTPUTS[0]
        structure = "diag" if structure == "full" else structure
    elif likelihood == "regression" or outer in PLAIN_OUTER:
        drawn = rng.random()
        if drawn < 0.25 and inputs != "large_inputs" and outer in PLAIN_OUTER:
            likelihood, output = rng.choice(list(LAWS)), OUTPUTS[0]
        if 0.15 < drawn < 0.4 and subset == "all":
            structure = rng.choice(NO_SUMS)
    precision = rng.choices(PRECISIONS, (5, 4, 2))[0]
    refused = any(LAYERS[name].outcome == REFUSE for name in layers)  # nothing shows in batches of one
    if outer.endswith("scaled_output") and precision == "bfloat16":
        precision = "float32"  # next to curvature of a thousand times the prior, it leaves no digits of variances
    wrapped = "" if outer == "small_scaled_output" else wrapped
    batch_size = 3 if inputs.startswith("blank") else rng.choice((3, 4, 8) if refused else (1, 2, 3, 4, 8))
    head = rng.random() < 0.4 or not wrappable().intersection(layers)
    activations = tuple(_activation(rng, name) for name in layers)
    context = rng.choice(CONTEXTS) if rng.random() < 0.1 else ""
    backend = ""
    if focus == "linear" or rng.random() < 0.04:
        backend = rng.choice(BACKENDS)
        layers, activations = ("linear",) * len(layers), tuple(rng.choice(("tanh", "relu")) for _ in layers)
        wrapped = outer = inputs = context = ""
        output, subset, precision = OUTPUTS[0], "all", rng.choice(PRECISIONS[:2])
        likelihood, structure = rng.choice(LIKELIHOODS[:2]), rng.choice(STRUCTURES)
    elif structure == "kron" and rng.random() < 0.4:
        structure = CORRECTED
    elif structure == "full" and subset == "all" and likelihood != "reward_modeling" and rng.random() < 0.3:
        structure = BY_LAYER
    return Plan(
        seed, layers, activations, wrapped, head, outer, inputs, context, output, likelihood, structure, subset, precision,
        batch_size, backend,
    )  # fmt: skip


def _activation(rng: random.Random, name: str) -> str:
    if LAYERS[name].kind == "tokens":
        return ""
    found = rng.choice(list(ACTIVATIONS))
    return "relu" if found == IN_PLACE and name in NEED_THEIR_OUTPUT else found


@cache
def wrappable() -> frozenset[str]:
    """Names of the layers that hold a linear layer or convolution that a wrapper can be put around."""
    with torch.random.fork_rng(devices=[]):
        made = {n: f.apply(random.Random(0), SHAPES[f.kind])[0] for n, f in LAYERS.items()}
    return frozenset(n for n, module in made.items() if any(map(is_usual, module.modules())))


def is_usual(module: nn.Module) -> bool:
    """Whether wrappers can be put around a module."""
    return type(module) in USUAL and module.weight.is_contiguous()


def _some(rng: random.Random, table: dict, chance: float) -> str:
    return rng.choice(list(table)) if rng.random() < chance else ""


def _layers(rng: random.Random, focus: str) -> tuple[tuple[str, ...], bool]:
    """Names of layers that fit one another, and whether they end in a sequence."""
    kind = LAYERS[focus].kind if focus in LAYERS else rng.choice(list(SHAPES))
    found = []
    if focus in LAYERS:
        if kind not in ("tokens", "vector") and rng.random() < 0.4:
            found.append(_right(rng, kind, stays=True))
        if kind == "sequence" and rng.random() < 0.3:
            found.insert(0, "embedding")
        if kind == "vector" and rng.random() < 0.6:
            found.append("linear")
        found.append(focus)
        kind = LAYERS[focus].gives
    else:
        found.append(_right(rng, kind))
        kind = LAYERS[found[-1]].gives
    if rng.random() < 0.3:
        found.append(_right(rng, kind))
        kind = LAYERS[found[-1]].gives
    if kind != "sequence" and rng.random() < 0.4:
        found.append(_right(rng, "vector"))
    return tuple(found), kind == "sequence"


def _right(rng: random.Random, kind: str, stays: bool = False) -> str:
    right = [(n, f) for n, f in LAYERS.items() if f.kind == kind and f.outcome == RIGHT]
    names = [n for n, f in right if not stays or f.gives == kind]
    return rng.choice(names[:2] if rng.random() < 0.5 else names)  # the first of a kind are the usual ones


def _build(plan: Plan, rng: random.Random) -> Case:
    start = LAYERS[plan.layers[0]].kind
    kind, shape = start, SHAPES[start]
    modules = []
    for name, activation in zip(plan.layers, plan.activations, strict=True):
        if LAYERS[name].kind != kind:  # from positions or pixels to vectors
            shape, reduce = _reduction(rng, kind, shape)
            modules.append(reduce)
        if LAYERS[name].kind == "image" and min(shape[1:]) < 3:  # too small for kernels and their padding
            modules.append(nn.Upsample(scale_factor=3))
            shape = (shape[0], *(3 * n for n in shape[1:]))
        module, shape = LAYERS[name].apply(rng, shape)
        modules.append(module)
        if activation:
            modules.append(ACTIVATIONS[activation]())
        kind = LAYERS[name].gives
    reduce = nn.Identity()
    if plan.output == OUTPUTS[0] and kind != "vector":
        shape, reduce = _reduction(rng, kind, shape)
    classes = outputs_of(plan.likelihood, rng)
    network = Network(modules, reduce, nn.Linear(shape[-1], classes, bias=rng.random() < 0.85))
    _train(network)
    network.eval()
    if plan.wrapped:
        wrap(plan, rng, network)
    model = OUTER[plan.outer].apply(rng, network) if plan.outer else network
    model = nn.Sequential(*modules, network.head) if plan.backend else model  # all that BackPACK takes
    n = 8 if plan.inputs.startswith("blank") else rng.randint(5, 6)
    x = torch.randint(VOCABULARY, (n, *SHAPES[start])) if start == "tokens" else torch.randn(n, *SHAPES[start])
    if plan.inputs:
        x = INPUTS[plan.inputs].apply(rng, x)
    y = _targets(plan, n, shape[:-1], classes)
    if plan.precision == "float64":
        model, x, y = model.double(), _double(x), _double(y)
    head = next(name for name, module in model.named_modules() if module is network.head)
    return Case(model, _inputs(plan, x), y, head)


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def _train(network: nn.Module) -> None:
    """Weights of norms and biases that are not trivial, and running statistics as of training."""
    with torch.no_grad():
        for module in network.modules():
            for p in module.parameters(recurse=False):
                if not p.is_complex() and p.ndim == 1:
                    p.add_(0.3 * torch.randn_like(p))
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)


def wrap(plan: Plan, rng: random.Random, network: Network) -> None:
    """Apply the wrapper to the head, or to a plain layer."""
    plain = [m for m in network.layers.modules() if is_usual(m)]
    module = network.head if plan.wrapped_head else rng.choice(plain)
    WRAPPERS[plan.wrapped].apply(rng, module, network)


def _reduction(rng: random.Random, kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], nn.Module]:
    if kind == "sequence":
        how = rng.choice(("mean", "last", "flatten"))
        if how == "mean":
            return shape[1:], Block(lambda m, x: x.mean(1))
        if how == "last":
            return shape[1:], Block(lambda m, x: x[:, -1])
    if torch.Size(shape).numel() > 40:
        return shape[:1], Block(lambda m, x: x.flatten(2).mean(2))
    return (torch.Size(shape).numel(),), nn.Flatten()


def _targets(plan: Plan, n: int, positions: tuple[int, ...], classes: int) -> torch.Tensor:
    if plan.outer == "one_value_per_example":
        return torch.randn(n)
    if plan.likelihood == "regression":
        return torch.randn(n, *positions, classes)
    if plan.likelihood in LAWS:
        return LAWS[plan.likelihood].targets(n, classes)
    return torch.randint(classes, (n, *positions))


def _inputs(plan: Plan, x: torch.Tensor) -> Any:
    if plan.outer == "dict_input":
        return {"input_ids": x}
    if plan.outer == "dict_input_with_a_flag":
        return {"input_ids": x, "doubled": True}
    return (x, x.clone()) if plan.outer == "tuple_input" else x
