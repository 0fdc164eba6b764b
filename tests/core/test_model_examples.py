"""The examples with real models, run on tiny ones of their kind: they say what they are there to show, and their numbers are right."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertForSequenceClassification

import laplace_dist
from laplace import Laplace
from laplace.data.calling import adapted

from . import naive
from .test_examples import beside_each_other, load  # noqa: F401


class Depthwise(nn.Module):
    """A network of EfficientNet's kind: stem, expansion, depthwise and pointwise convolutions, normalised, capped."""

    def __init__(self, classes):
        super().__init__()
        layers = [nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()]
        layers += [nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()]
        layers += [nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()]
        layers += [nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x))


# ------------------------------------------------------------------ EfficientNet


def depthwise(classes=70):
    """Random weights, trained a little on the crops; 70 classes, so that jobs sample."""
    torch.manual_seed(0)
    model = Depthwise(classes)
    x, y = load("efficientnet").crops("train", size=16, n=32, classes=(0, 1)).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def small_crops(split, **kwargs):
    return load("efficientnet").crops(split, size=16, n=32, classes=(0, 1), **kwargs)


def test_an_efficientnet_has_two_posteriors_whose_numbers_are_those_of_dense_covariances():
    example = load("efficientnet")
    table = example.main(depthwise, small_crops)
    everything, last = table["all weights"], table["last layer"]
    assert (everything["weights"], last["weights"]) == (sum(p.numel() for p in depthwise().parameters()), 9 * 70)
    for row in (everything, last):
        assert row["NLL, crops"] < table["MAP"]["NLL, crops"] + 0.05, "no worse than MAP"
        assert row["gradient steps of a batch"] > 0
    la = Laplace(depthwise(), "classification", "last_layer", "kron", prior_precision=last["prior precision, evidence"])
    la.fit(torch.utils.data.DataLoader(small_crops("train"), batch_size=8))
    x = small_crops("test").tensors[0]
    assert abs(float(la.log_marginal_likelihood()) / 32 - last["evidence of an example"]) < 1e-4
    covariance = la._glm_predictive_distribution(x[:8])[1]
    largest = depthwise()(x[:8]).mean(0).topk(3).indices
    deviation = covariance.diagonal(dim1=1, dim2=2)[:, largest].sqrt().mean()
    assert abs(float(deviation) - last["deviation, crops"]) < 1e-4 * float(deviation)


def test_an_efficientnet_as_a_job_samples_all_weights_and_is_exact_in_the_last_layer(tmp_path):
    for subset, estimator in (("all", "mc"), ("last_layer", "ggn")):
        config = laplace_dist.Config(
            model=f"{__name__}:depthwise", data="tests.core.test_model_examples:small_crops",
            subset_of_weights=subset, batch_size=8, checkpoint=str(tmp_path / subset), skip_tune=True, skip_evaluate=True,
            skip_report=True,
        )  # fmt: skip
        laplace_dist.fit(config, executor=laplace_dist.Inline)
        la = laplace_dist.load_posterior(str(tmp_path / subset), depthwise())
        assert la.backend.estimator == estimator
        kwargs = {"stochastic": True, "seed": 0} if estimator == "mc" else {}
        alone = Laplace(depthwise(), "classification", subset, "kron", backend_kwargs=kwargs)
        alone.fit(torch.utils.data.DataLoader(small_crops("train"), batch_size=8))
        for name, value in alone.sums.to_tensors().items():
            assert torch.allclose(la.sums.to_tensors()[name], value, rtol=1e-5, atol=1e-9), name


# ------------------------------------------------------------------ MiniLM

WORDS, SIZES = 300, {"train": 30, "val": 30, "test": 40}


def hashed(text):
    """Words by their numbers, without a vocabulary to download."""
    return [2 + sum(map(ord, word.lower())) % (WORDS - 2) for word in text.split()][:20]


def bert(kind="float32"):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=40, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).to(getattr(torch, kind))


def few_sentences(split):
    return load("minilm").Sentences(split, hashed, SIZES)


def test_a_bert_on_text_gains_by_every_posterior_as_a_job(tmp_path):
    table = load("minilm").main(tmp_path, bert, f"{__name__}:few_sentences", few_sentences, epochs=25, rate=1e-2)
    assert table["MAP"]["accuracy"] > 1 / 3, "a guess is right for one of three"
    for name, base in (("last layer", "MAP"), ("all weights", "MAP"), ("LoRA alone", "MAP with LoRA")):
        assert table[name]["nll"] < table[base]["nll"] - 0.05, name
        assert abs(table[name]["accuracy"] - table[base]["accuracy"]) < 0.03
    lora = laplace_dist.load_posterior(
        str(tmp_path / "lora"), load("minilm").adapters(str(tmp_path / "model")), tuned=False
    )
    assert {name.split(".")[-3] for name in lora.backend.named_params} == {"lora_A", "lora_B"}, "adapters alone"


def test_padded_tokens_change_no_number():
    minilm, found = load("minilm"), {}
    rows = [few_sentences("train")[i] for i in range(12)]
    for more in (0, 9):
        model = adapted(bert("float64").eval())
        batches = [minilm.pad(rows[:5], more), minilm.pad(rows[5:], more)]
        for subset, structure in (("last_layer", "full"), ("all", "kron"), ("all", "diag")):
            la = Laplace(model, "classification", subset, structure)
            la.fit(batches)
            found[subset, structure, more] = {
                **la.sums.to_tensors(),
                "predictive": la(batches[0]),
                "f": model(batches[0]),
            }
    for subset, structure, _ in found:
        for name, value in found[subset, structure, 0].items():
            other = found[subset, structure, 9][name]
            assert torch.allclose(other, value, rtol=1e-6, atol=1e-14), (
                subset,
                structure,
                name,
            )  # zero but for rounding


def padded_more(rows):
    return load("minilm").pad(rows, 9)


def test_padded_tokens_change_no_number_of_a_job(tmp_path):
    for name in ("pad", "padded_more"):
        config = laplace_dist.Config(
            model=f"{__name__}:bert", model_args={"kind": "float64"}, data=f"{__name__}:few_sentences", batch_size=16,
            collate="minilm:pad" if name == "pad" else f"{__name__}:padded_more", checkpoint=str(tmp_path / name),
            skip_tune=True, skip_evaluate=True, skip_report=True,
        )  # fmt: skip
        laplace_dist.fit(config, executor=laplace_dist.Inline)
    one, other = (laplace_dist.load_posterior(str(tmp_path / name), bert("float64")) for name in ("pad", "padded_more"))
    for name, value in one.sums.to_tensors().items():
        assert torch.allclose(other.sums.to_tensors()[name], value, rtol=1e-6, atol=1e-14), name


def test_sentences_are_real_distinct_and_of_their_topics():
    minilm = load("minilm")
    texts = minilm.texts()
    assert all(len(own) >= sum(minilm.SIZES.values()) for own in texts.values())
    assert len(set().union(*texts.values())) == sum(map(len, texts.values()))
    splits = {split: minilm.Sentences(split, str, SIZES) for split in SIZES}
    assert [len(splits[split]) for split in SIZES] == [3 * n for n in SIZES.values()]
    assert not {ids for ids, _ in splits["train"].rows} & {ids for ids, _ in splits["test"].rows}


# ------------------------------------------------------------------ a language model


def test_a_language_model_is_better_than_its_map(capsys):
    table = load("language_model").main(n=48, epochs=40)
    laplace, best = table["all weights × kron"], table["MAP"]
    assert best["accuracy"] > 0.4, "of two words one follows; a guess is right for one of 23"
    assert laplace["nll"] < best["nll"] - 0.2
    assert laplace["entropy"] > best["entropy"]


def test_sampled_factors_of_a_language_model_equal_a_dense_reference():
    """Every layer's inputs and output gradients by plain autograd, one sequence at a time, in float64."""
    example = load("language_model")
    model, rows = example.network(12, 8, 1).double().eval(), example.sequences("train", 6, 12)
    la = example.posterior(model, rows, samples=2, seed=5)
    sums = la.sums.to_tensors()
    layer, wanted = model.hf_model.transformer.h[0].mlp.c_fc, {"A": 0.0, "B": 0.0}
    law = example.next_word()
    for index in range(6):
        batch = {key: value[None] for key, value in rows[index].items()}
        kept = []
        handle = layer.register_forward_hook(lambda m, args, out, kept=kept: kept.extend([args[0], out]))
        f = model(batch)
        handle.remove()
        for v in law.sampled_gradients(f.detach(), batch["labels"], 2, 5, index):
            assert not v[0, batch["labels"][0] == example.IGNORED].any(), "positions without a label pull on nothing"
            g = torch.autograd.grad((f * v).sum(), kept[1], retain_graph=True)[0][0]
            wanted["B"] = wanted["B"] + g.T @ g
        a = kept[0][0, batch["attention_mask"][0] == 1].detach()
        wanted["A"] = wanted["A"] + a.T @ a / len(a)
    name = next(key.rpartition("/")[0] for key in sums if "mlp.c_fc.weight" in key)
    for side, value in wanted.items():
        assert naive.relative_error(sums[f"{name}/{side}"], value) < 1e-10, side


def test_the_sampled_fisher_of_a_language_model_tends_to_the_dense_curvature():
    example = load("language_model")
    model, rows = example.network(8, 4, 1).double().eval(), example.sequences("train", 4, 8)
    total = 0.0
    for row in (rows[i] for i in range(4)):
        batch = {key: value[None] for key, value in row.items()}
        there = batch["labels"][0] != example.IGNORED
        f = model(batch)
        js = torch.stack([_gradient(model, f[0, t, c]) for t in there.nonzero()[:, 0] for c in range(8)])
        p = f[0, there].detach().softmax(-1)
        hessian = torch.block_diag(*(q.diag() - torch.outer(q, q) for q in p))
        total = total + js.T @ hessian @ js
    exact = example.posterior(model, rows, "diag", samples=1)
    exact.backend.stochastic = False
    exact.fit(torch.utils.data.DataLoader(rows, batch_size=4))
    assert naive.relative_error(exact.H, total.diagonal()) < 1e-10
    errors = [
        naive.relative_error(example.posterior(model, rows, "diag", samples=s).H, total.diagonal()) for s in (4, 256)
    ]
    assert errors[1] < 0.12 and errors[1] < errors[0] / 4, "as one over the root of the number of samples"


def _gradient(model, output):
    return torch.cat([g.flatten() for g in torch.autograd.grad(output, list(model.parameters()), retain_graph=True)])


# ------------------------------------------------------------------ coverage


def resnet():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    return model.eval()


def vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=4, mlp_dim=6, num_classes=3
    )
    nn.init.normal_(model.heads.head.weight)
    nn.init.normal_(model.class_token)
    return model.eval()


def test_the_report_lists_every_parameter_of_a_resnet_and_of_a_vision_transformer_with_its_policy(capsys):
    models = {"resnet": (resnet(), torch.randn(2, 3, 32, 32)), "vit": (vit(), torch.randn(2, 3, 8, 8))}
    reports = load("coverage").main(models)
    said = capsys.readouterr().out
    for name, (model, _) in models.items():
        rows = reports[name].coverage
        assert [row[0] for row in rows] == [parameter for parameter, _ in model.named_parameters()]
        assert all(row[0] in said for row in rows) and reports[name].refused is None
        for parameter, kind, why in rows:
            diagonal = "bn" in parameter or "downsample.1" in parameter or ".ln" in parameter
            diagonal = diagonal or parameter in ("class_token", "encoder.pos_embedding")
            assert kind == ("diag" if diagonal else "kron"), (parameter, why)
            assert not diagonal or why.endswith("diagonal block")
    why = {row[0]: row[2] for row in reports["vit"].coverage}
    assert why["class_token"] == "its uses in the graph: VisionTransformer; diagonal block"
    assert why["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] == "products in MultiheadAttention"


def test_curvature_of_a_vision_transformer_with_packed_projections_equals_dense_algebra():
    model, x, y = vit().double(), torch.randn(5, 3, 8, 8).double(), torch.randint(3, (5,))
    la = Laplace(model, "classification", "all", "diag")
    la.fit([(x, y)])
    dense = naive.full(model, x, y, "classification", "ggn").diagonal()
    assert naive.relative_error(la.H, dense) < 1e-9
