"""Hugging Face classifiers and LoRA: dict-like batches, tiny models from configurations, nothing downloaded."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from laplace import Laplace
from laplace.predictive import glm_distribution

from . import naive

BATCHES = {"dict": dict, "UserDict": UserDict, "BatchEncoding": BatchEncoding}


class Classifier(nn.Module):
    """The reference's wrapper: one dict-like argument, logits out."""

    def __init__(self, hf_model):
        super().__init__()
        self.hf_model = hf_model

    def forward(self, data):
        device = next(self.parameters()).device
        inputs = {key: data[key].to(device) for key in ("input_ids", "attention_mask")}
        return self.hf_model(**inputs).logits


class OneExample(nn.Module):
    """The same network as a function of token indices and mask in one tensor, for the naive reference."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model({"input_ids": x[:, 0], "attention_mask": x[:, 1]})


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=12, n_positions=6, n_embd=4, n_layer=1, n_head=2, num_labels=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return Classifier(GPT2ForSequenceClassification(config)).to(dtype).eval()


def bert(dtype=torch.float64):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6,
        max_position_embeddings=6, num_labels=3,
    )  # fmt: skip
    return Classifier(BertForSequenceClassification(config)).to(dtype).eval()


MODELS = {"gpt2": gpt2, "bert": bert}


def batches(kind="BatchEncoding", keys=("input_ids", "attention_mask", "labels")):
    """Two padded batches of different lengths."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n, length in ((3, 5), (2, 4)):
        ids, mask = torch.randint(2, 12, (n, length), generator=generator), torch.ones(n, length, dtype=torch.long)
        ids[0, 2:], mask[0, 2:] = 0, 0
        labels = torch.randint(3, (n,), generator=generator)
        found.append(BATCHES[kind](dict(zip(keys, (ids, mask, labels), strict=True))))
    return found


def dense(model, data):
    """Naive GGN over all batches, and naive Jacobians of each."""
    network, total, js = OneExample(model), 0.0, []
    for batch in data:
        x = torch.stack([batch["input_ids"], batch["attention_mask"]], 1)
        total = total + naive.full(network, x, batch["labels"], "classification", "ggn")
        js.append(naive.jacobians(network, x))
    return total, js


def check(la, model, data, structure):
    """Curvature (except Kron's) and predictive variance equal dense algebra."""
    h, js = dense(model, data)
    if structure == "kron":
        h = la.H_facs.to_matrix()
    elif structure == "diag":
        assert naive.relative_error(la.H, h.diagonal()) < 1e-9
        h = torch.diag(h.diagonal())
    else:
        assert naive.relative_error(la.H, h) < 1e-9
    precision = h + torch.eye(len(h), dtype=torch.float64)
    for batch, j in zip(data, js, strict=True):
        f, covariance = glm_distribution(la, batch)
        assert torch.allclose(f, model(batch))
        assert naive.relative_error(covariance, naive.glm_covariance(j, precision)) < 1e-8
        assert la(batch).shape == f.shape


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_all_weights(name, structure):
    model, data = MODELS[name](), batches()
    la = Laplace(model, "classification", "all", structure)
    la.fit(data)
    assert not [row[0] for row in la.coverage if "autograd" in row[2]]
    assert [row[0] for row in la.coverage if "its uses" in row[2]] == [
        n for n, _ in model.named_parameters() if "wpe" in n or "position_embeddings" in n
    ]
    check(la, model, data, structure)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=6, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = Classifier(LlamaForSequenceClassification(config)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_norms_of_llama_need_no_automatic_differentiation(structure):
    model, data = llama(), batches()
    la = Laplace(model, "classification", "all", structure)
    la.fit(data)
    assert not [row for row in la.coverage if "autograd" in row[2]]
    assert sum(row[2].startswith("LlamaRMSNorm") for row in la.coverage) == 3
    norms = torch.cat([torch.full((p.numel(),), "norm" in name) for name, p in model.named_parameters()])
    found = la.H if structure == "diag" else la.H_facs.to_matrix().diagonal()
    truth = dense(model, data)[0].diagonal()  # Llama's norms run in float32, whatever the model's type
    assert naive.relative_error(found[norms], truth[norms]) < 1e-6
    assert structure == "kron" or naive.relative_error(found, truth) < 1e-6


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("structure", ["diag", "kron"])
@pytest.mark.parametrize("name", MODELS)
def test_only_what_requires_gradients(name, structure, kind):
    """The reference's way to a last layer by hand: everything else frozen."""
    model, data = MODELS[name](), batches(kind)
    head = model.hf_model.score if name == "gpt2" else model.hf_model.classifier
    for p in model.parameters():
        p.requires_grad = False
    for p in head.parameters():
        p.requires_grad = True
    la = Laplace(model, "classification", "all", structure)
    la.fit(data)
    la.optimize_prior_precision(n_steps=3)
    la.prior_precision = 1.0
    check(la, model, data, structure)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "gp"])
def test_last_layer_picks_the_position_that_the_model_picks(structure):
    """GPT-2 classifies by the last token that is not padding, another position in every example."""
    model, data = gpt2(), batches()
    la = Laplace(model, "classification", "last_layer", structure, feature_reduction="pick_last")
    la.fit(data)
    assert la.model.last_layer_name == "hf_model.score"
    alone = gpt2()
    for name, p in alone.named_parameters():
        p.requires_grad = name == "hf_model.score.weight"
    other = Laplace(alone, "classification", "all", structure)
    other.fit(data)
    for batch in data:
        one, two = glm_distribution(la, batch), glm_distribution(other, batch)
        if structure != "kron":  # all positions share the input factor of the layer as such
            assert naive.relative_error(one[1], two[1]) < 1e-8
        assert torch.allclose(one[0], two[0])
    la.optimize_prior_precision(n_steps=3)
    assert la(data[0]).shape == (3, 3)
    sampled = la(data[0], pred_type="gp" if structure == "gp" else "glm", link_approx="mc", n_samples=5)
    assert sampled.shape == (3, 3)


def test_the_wrong_reduction_is_refused():
    for reduction in (None, "average", "pick_first"):
        la = Laplace(gpt2(), "classification", "last_layer", "diag", feature_reduction=reduction)
        if reduction == "pick_first":  # finds the model's own position all the same
            la.fit(batches())
            continue
        with pytest.raises(ValueError, match="state the model's own reduction with feature_reduction"):
            la.fit(batches())


def test_bert_ends_in_a_pooled_layer():
    model, data = bert(), batches()
    la = Laplace(model, "classification", "last_layer", "full")
    la.fit(data)
    for n, p in model.named_parameters():
        p.requires_grad = n.startswith("hf_model.classifier")
    check(la, model, data, "full")


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("name, target", [("gpt2", "c_attn"), ("bert", "query")])
def test_lora(name, target, structure):
    """PEFT freezes everything but its own weights, and these are all that has a distribution."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[target], lora_dropout=0.1, bias="none")
    if name == "gpt2":
        config.fan_in_fan_out = True
    model, data = get_peft_model(MODELS[name](), config).double().eval(), batches()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(generator=torch.Generator().manual_seed(0))
    la = Laplace(model, "classification", "all", structure)
    la.fit(data)
    assert all("lora_" in row[0] and row[2] == "Linear" for row in la.coverage) and len(la.coverage) == 2
    check(la, model, data, structure)
    draws = la(data[0], pred_type="nn", link_approx="mc", n_samples=3)
    assert draws.shape == (3, 3)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_bfloat16_models_have_float64_sums(structure, subset):
    kwargs = {"feature_reduction": "pick_last"} if subset == "last_layer" else {}
    data, found = batches(), []
    for dtype in (torch.bfloat16, torch.float32):
        model = gpt2(torch.bfloat16).to(dtype)  # the same rounded weights
        la = Laplace(model, "classification", subset, structure, **kwargs)
        la.fit(data)
        assert all(t.dtype is torch.float64 for t in la.sums.tensors.values())
        assert all(p.dtype is dtype for p in model.parameters())
        found.append(la(data[0]))
    assert found[0].dtype is torch.float32
    assert torch.allclose(*found, atol=0.03)


def test_other_keys():
    data = batches(keys=("tokens", "attention_mask", "target"))

    class Renamed(Classifier):
        def forward(self, data):
            return super().forward({"input_ids": data["tokens"], "attention_mask": data["attention_mask"]})

    model = Renamed(gpt2().hf_model).eval()
    la = Laplace(model, "classification", "all", "diag", dict_key_x="tokens", dict_key_y="target")
    la.fit(data)
    other = Laplace(gpt2(), "classification", "all", "diag")
    other.fit(batches())
    assert naive.relative_error(la.H, other.H) < 1e-12
    la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=3)
    with pytest.raises(ValueError, match="need the key 'labels' \\(dict_key_y\\), got"):
        Laplace(model, "classification", "all", "diag", dict_key_x="tokens").fit(data)


def test_gradients_of_a_network_that_refuses_vmap():
    """Attention masks look at values, so torch.func cannot batch them; one example at a time can."""
    model, batch = gpt2(), batches()[0]
    la = Laplace(model, "classification", "all", "diag")
    la.fit([batch])
    js, f = la.backend.functorch_jacobians(batch)
    assert naive.relative_error(js, dense(model, [batch])[1][0]) < 1e-10
    assert torch.allclose(f, model(batch))
