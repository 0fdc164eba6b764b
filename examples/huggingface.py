"""A Hugging Face classifier: a GPT-2 on dict-like batches, MAP against three posteriors.

    python examples/huggingface.py

builds a small GPT-2 from a configuration (nothing is downloaded), trains it on sentences whose labels are partly wrong, so that
the MAP is overconfident, and prints accuracy, NLL and ECE. Put your own model and tokenizer in the place of ``network`` and
``sentences``; the rest stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, MutableMapping

import torch
from torch import nn
from torch.utils.data import DataLoader

from laplace import Laplace
from laplace.utils.metrics import classification_scores, summarize_classification

try:
    from transformers import GPT2Config, GPT2ForSequenceClassification
except ImportError as error:
    raise SystemExit(f'This example needs transformers: pip install -e ".[hf]" ({error})') from error

PAD, GOOD, BAD, WORDS = 0, range(2, 6), range(6, 10), 14


class Classifier(nn.Module):
    """One dict-like argument in, logits ``(batch, classes)`` out: all that is asked of a model."""

    def __init__(self, hf_model: nn.Module):
        super().__init__()
        self.hf_model = hf_model

    def forward(self, data: MutableMapping) -> torch.Tensor:
        """Move the inputs to the model's device, and leave the labels where they are."""
        device = next(self.parameters()).device
        inputs = {key: data[key].to(device) for key in ("input_ids", "attention_mask")}
        return self.hf_model(**inputs).logits


def network() -> nn.Module:
    """A GPT-2 with one block of width sixteen."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=2, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return Classifier(GPT2ForSequenceClassification(config))


def sentences(n: int, seed: int, wrong: float = 0.1) -> DataLoader:
    """Batches of sentences of 6 to 12 words; the label says whether good words outnumber bad ones, but for some."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (n, 12), generator=generator)
    lengths = torch.randint(6, 13, (n, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    score = sum(((ids >= words[0]) & (ids <= words[-1])) * sign * mask for words, sign in ((GOOD, 1), (BAD, -1))).sum(1)
    flip = torch.rand(n, generator=generator) < wrong
    labels = ((score > 0) ^ flip).long()
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids * mask, mask, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=32)


def train(model: nn.Module, loader: Iterable, epochs: int) -> nn.Module:
    """Ordinary training by Adam of what requires gradients."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), batch["labels"]).backward()
            optimizer.step()
    return model.eval()


def posterior(model: nn.Module, subset: str, structure: str, **kwargs: str) -> Laplace:
    """Fit, and choose the prior precision by the validation loss."""
    la = Laplace(model, "classification", subset_of_weights=subset, hessian_structure=structure, **kwargs)
    la.fit(sentences(192, seed=1))
    la.optimize_prior_precision(method="gridsearch", val_loader=sentences(200, seed=2), grid_size=33)
    return la


def evaluate(predictors: dict[str, nn.Module | Laplace]) -> dict[str, dict[str, float]]:
    """Print and return accuracy, NLL and ECE of every predictor on test sentences."""
    table = {}
    for name, predictor in predictors.items():
        probs, labels = [], []
        for batch in sentences(1000, seed=3):
            out = predictor(batch).detach()
            probs.append(out.softmax(-1) if isinstance(predictor, nn.Module) else out)
            labels.append(batch["labels"])
        row = summarize_classification(classification_scores(torch.cat(probs), torch.cat(labels)))
        print(f"{name:18} accuracy {row['accuracy']:.3f}  NLL {row['nll']:.3f}  ECE {row['ece']:.3f}")
        table[name] = row
    return table


def main(epochs: int = 40) -> dict[str, dict[str, float]]:
    """Train, fit a last layer, all weights, and the parameters that were left with gradients."""
    model = train(network(), sentences(192, seed=1), epochs)
    predictors: dict[str, nn.Module | Laplace] = {
        "MAP": model,
        # The model picks the logits of the last word that is not padding; the features have to be picked in the same way.
        "last_layer × full": posterior(model, "last_layer", "full", feature_reduction="pick_last"),
        "all × kron": posterior(model, "all", "kron"),
    }
    partly = copy.deepcopy(model)
    for name, parameter in partly.named_parameters():
        parameter.requires_grad = ".mlp." in name
    predictors["mlp × diag"] = posterior(partly, "all", "diag")
    return evaluate(predictors)


if __name__ == "__main__":
    main()
