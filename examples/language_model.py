"""A causal language model of GPT-2's shape: outputs ``(batch, time, vocabulary)``, positions left out, a sampled Fisher.

    python examples/language_model.py

builds a small GPT-2 with random weights (nothing is downloaded), trains it to predict the next word of sequences that a rule
makes, and fits Kronecker factors of all weights. Every position is a likelihood term of its own; those after the end of a
sequence carry the label -100 and add nothing. The exact curvature takes a backward pass for every word of every position, a
sampled Fisher one. It prints the negative log likelihood of new sequences, and how sure predictions are, also of random
words. As a job, from this folder:

    python ../jobs/fit_kron.py --model language_model:network --data language_model:sequences --batch-size 16 \
        --likelihood language_model:next_word
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from laplace import Laplace
from laplace.likelihoods import WeightedCategorical

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError as error:
    raise SystemExit(f'This example needs transformers: pip install -e ".[hf]" ({error})') from error

IGNORED, PAD, WORDS, LONGEST = -100, 0, 24, 10


def next_word() -> WeightedCategorical:
    """The likelihood of the next word, as ``--likelihood``: cross entropy without the positions that have none."""
    return WeightedCategorical(ignore_index=IGNORED)


class LanguageModel(nn.Module):
    """One mapping in, logits ``(batch, time, vocabulary)`` out."""

    def __init__(self, hf_model: nn.Module):
        super().__init__()
        self.hf_model = hf_model

    def forward(self, data: Mapping[str, Tensor]) -> Tensor:
        """Leave the labels where they are."""
        return self.hf_model(input_ids=data["input_ids"], attention_mask=data["attention_mask"], use_cache=False).logits


def network(words: int = WORDS, width: int = 16, layers: int = 2) -> LanguageModel:
    """A GPT-2 with random weights, whose table of words is also its last layer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=words, n_positions=LONGEST, n_embd=width, n_layer=layers, n_head=2, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config)).eval()


class Sequences(Dataset):
    """Words of which each follows from the one before by a step that may be off by one, cut at random."""

    def __init__(self, n: int, words: int, seed: int):
        """Draw them."""
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(1, words, (n,), generator=generator)]
        for _ in range(LONGEST):
            step = 3 + torch.randint(0, 2, (n,), generator=generator)
            ids.append((ids[-1] - 1 + step) % (words - 1) + 1)
        whole, lengths = torch.stack(ids, 1), torch.randint(4, LONGEST + 1, (n, 1), generator=generator)
        self.mask = (torch.arange(LONGEST) < lengths).long()
        self.ids = torch.where(self.mask == 1, whole[:, :-1], PAD)
        self.labels = torch.where(self.mask == 1, whole[:, 1:], IGNORED)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One of them, padded."""
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


def sequences(split: str, n: int = 64, words: int = WORDS) -> Sequences:
    """A split, as ``--data``."""
    return Sequences(n, words, {"train": 0, "val": 1}.get(split, 2))


def train(model: nn.Module, rows: Dataset, epochs: int) -> nn.Module:
    """Ordinary training by Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in DataLoader(rows, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch).mT, batch["labels"], ignore_index=IGNORED).backward()
            optimizer.step()
    return model.eval()


def posterior(model: nn.Module, rows: Dataset, structure: str = "kron", samples: int = 1, seed: int = 0) -> Laplace:
    """Curvature of all weights from labels drawn for every position."""
    kwargs = {"stochastic": True, "num_samples": samples, "seed": seed}
    la = Laplace(model, next_word(), "all", structure, backend_kwargs=kwargs)
    la.fit(DataLoader(rows, batch_size=16))
    return la


def scores(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean negative log likelihood, and accuracy, of the positions that have a label."""
    there = labels != IGNORED
    p, y = probabilities[there], labels[there]
    return float(-p.gather(-1, y[:, None]).log().mean()), float((p.argmax(-1) == y).double().mean())


def main(n: int = 64, epochs: int = 60) -> dict[str, dict[str, float]]:
    """Train, fit, and compare the network with its posterior predictive on new sequences and on random ones."""
    model = train(network(), sequences("train", n), epochs)
    la = posterior(model, sequences("train", n))
    la.optimize_prior_precision(
        method="gridsearch", val_loader=DataLoader(sequences("val"), batch_size=16), grid_size=13, pred_type="nn",
        link_approx="mc", n_samples=20,
    )  # fmt: skip
    batch = next(iter(DataLoader(sequences("test", 64), batch_size=64)))
    odd = {
        **batch,
        "input_ids": torch.randint(1, WORDS, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3)),
    }
    table = {}
    for name, predict in (
        ("MAP", lambda x: model(x).detach().softmax(-1)),
        ("all weights × kron", lambda x: la(x, pred_type="nn", link_approx="mc", n_samples=50)),
    ):
        probabilities, strange = predict(batch), predict(odd)
        nll, accuracy = scores(probabilities, batch["labels"])
        unsure = [
            float(torch.special.entr(p).sum(-1)[batch["labels"] != IGNORED].mean()) for p in (probabilities, strange)
        ]
        table[name] = {"nll": nll, "accuracy": accuracy, "entropy": unsure[0], "entropy of random words": unsure[1]}
        print(f"{name:18} " + "  ".join(f"{label} {value:.3f}" for label, value in table[name].items()))
    return table


if __name__ == "__main__":
    main()
