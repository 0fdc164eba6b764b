"""What is put around layers of random models: wrappers ``(rng, module, model)``, outer features ``(rng, model)``, inputs ``(rng, x)``."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from .random_features import EITHER, INPUTS, OUTER, VOCABULARY, WRAPPERS, Block, into, parameter

# --- wrappers: (rng, module with a weight, model) ---------------------------------------------------------------------


@into(WRAPPERS)
def weight_norm_old(rng, module, model):
    with_warnings_off(nn.utils.weight_norm, module)


@into(WRAPPERS)
def weight_norm(rng, module, model):
    parametrizations.weight_norm(module)


@into(WRAPPERS)
def spectral_norm_old(rng, module, model):
    nn.utils.spectral_norm(module)
    for _ in range(20):  # until its vectors are singular ones, as after training
        for hook in module._forward_pre_hooks.values():
            hook(module.train(), None)
    module.eval()


@into(WRAPPERS)
def spectral_norm(rng, module, model):
    parametrizations.spectral_norm(module)


@into(WRAPPERS)
def orthogonal(rng, module, model):
    parametrizations.orthogonal(module)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x - 0.1


@into(WRAPPERS)
def own_parametrization(rng, module, model):
    parametrize.register_parametrization(module, "weight", Doubled())


@into(WRAPPERS)
def pruned(rng, module, model):
    prune.random_unstructured(module, "weight", amount=0.4)


@into(WRAPPERS)
def pruned_made_permanent(rng, module, model):
    prune.random_unstructured(module, "weight", amount=0.4)
    prune.remove(module, "weight")


@into(WRAPPERS)
def frozen_weight(rng, module, model):
    module.weight.requires_grad_(False)


@into(WRAPPERS)
def frozen_bias(rng, module, model):
    if module.bias is not None:
        module.bias.requires_grad_(False)


@into(WRAPPERS)
def frozen_all_but_one(rng, module, model):
    for p in model.parameters():
        p.requires_grad_(p is module.weight)


@into(WRAPPERS)
def forward_hook_that_scales(rng, module, model):
    module.register_forward_hook(lambda m, args, out: 1.5 * out)


@into(WRAPPERS)
def forward_pre_hook_that_scales(rng, module, model):
    module.register_forward_pre_hook(lambda m, args: tuple(0.5 * x for x in args))


@into(WRAPPERS)
def left_in_training_mode(rng, module, model):
    model.train()


def with_warnings_off(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


# --- outer features: (rng, model) to a model --------------------------------------------------------------------------


@into(OUTER)
def scaled_output(rng, model):
    return Block(lambda m, x: 20 * m.net(x), net=model)


@into(OUTER)
def small_scaled_output(rng, model):
    """As scaled_output, of logits that vanish next to an absolute tolerance."""
    with torch.no_grad():
        for p in model.head.parameters():
            p.mul_(1e-6)
    return Block(lambda m, x: 20 * m.net(x), net=model)


@into(OUTER, EITHER)
def classes_first(rng, model):
    """Logits (batch, classes, positions): with as many positions as classes, both readings fit the targets."""
    return Block(lambda m, x: m.net(x).transpose(1, 2), net=model)


@into(OUTER)
def shifted_output(rng, model):
    return Block(lambda m, x: m.net(x) + m.shift, net=model, shift=parameter())


@into(OUTER)
def output_changed_in_place(rng, model):
    def run(m, x):
        out = m.net(x)
        out *= 0.5
        return out

    return Block(run, net=model)


@into(OUTER, EITHER)
def input_changed_in_place(rng, model):
    def run(m, x):
        if x.is_floating_point():
            x.mul_(0.5)
        else:
            x.add_(1).remainder_(VOCABULARY)
        return m.net(x)

    return Block(run, net=model)


@into(OUTER, EITHER)
def tuple_output(rng, model):
    return Block(lambda m, x: (m.net(x), None), net=model)


@into(OUTER, EITHER)
def dict_output(rng, model):
    return Block(lambda m, x: {"logits": m.net(x)}, net=model)


@into(OUTER)
def dict_input(rng, model):
    return Block(lambda m, x: m.net(x["input_ids"]), net=model)


@into(OUTER)
def dict_input_with_a_flag(rng, model):
    return Block(lambda m, x: m.net(x["input_ids"]) * (2.0 if x["doubled"] else 1.0), net=model)


@into(OUTER, EITHER)
def tuple_input(rng, model):
    return Block(lambda m, x: m.net(x[0]), net=model)


@into(OUTER, EITHER)
def one_value_per_example(rng, model):
    return Block(lambda m, x: m.net(x).flatten(1)[:, 0], net=model)


@into(OUTER, EITHER)
def feature_backbone_without_grad(rng, model):
    """All but the head runs under ``no_grad``."""

    def run(m, x):
        with torch.no_grad():
            h = m.net.features(x)
        return m.net.head(h)

    return Block(run, net=model)


@into(OUTER, EITHER)
def inference_backbone(rng, model):
    def run(m, x):
        with torch.inference_mode():
            h = m.net.features(x)
        return m.net.head(h.clone())  # no inference tensor any more

    return Block(run, net=model)


@into(OUTER)
def nested_sequential(rng, model):
    return nn.Sequential(nn.Identity(), nn.Sequential(model))


# --- input features: (rng, x) to x ------------------------------------------------------------------------------------


@into(INPUTS)
def blank_first(rng, x):
    x[0] = 0
    return x


@into(INPUTS)
def blank_last(rng, x):
    x[-1] = 0
    return x


@into(INPUTS)
def blank_probed(rng, x):
    """The eighth example, or the last of a smaller first batch, which libraries like to probe."""
    x[min(7, len(x) - 1)] = 0
    x[2] = 0
    return x


@into(INPUTS)
def blank_first_batch(rng, x):
    x[:3] = 0
    return x


@into(INPUTS)
def large_inputs(rng, x):
    return 4 * x if x.is_floating_point() else x


@into(INPUTS)
def equal_examples(rng, x):
    x[1] = x[0]
    return x


@into(INPUTS)
def half_blank_positions(rng, x):
    """The later half of every odd example is zero, as of padded sequences."""
    if x.ndim > 1 and x.shape[1] > 1:
        x[1::2, x.shape[1] // 2 :] = 0
    return x
