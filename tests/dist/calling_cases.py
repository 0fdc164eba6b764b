"""Models and data sets of every form in which a `DataLoader` and a network may meet."""

from __future__ import annotations

from collections import UserDict, namedtuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

N, CLASSES = 12, 3
Point = namedtuple("Point", "a b y")


def numbers(split: str = "train", n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    a, b = torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)
    return a, b, torch.randint(CLASSES, (n,), generator=generator)


class Rows(Dataset):
    """Examples made by a function from `a`, `b` and `y`."""

    def __init__(self, make, split: str = "train", n: int = N) -> None:
        self.make, self.rows = make, list(zip(*numbers(split, n), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.make(*self.rows[index])


FORMS = {
    "three in a row": lambda a, b, y: (a, b, y),
    "a list": lambda a, b, y: [a, b, y],
    "a named tuple": Point,
    "nested": lambda a, b, y: ((a, b), y),
    "numpy": lambda a, b, y: (a.numpy(), b.numpy(), np.int64(y)),
    "reversed and big-endian": lambda a, b, y: (a.flip(0).numpy()[::-1], b.numpy().astype(">f4"), int(y)),
    "a mapping": lambda a, b, y: {"a": a, "b": b, "labels": int(y)},
    "a mapping and y": lambda a, b, y: ({"a": a, "b": b}, int(y)),
    "a nested mapping": lambda a, b, y: {"a": a, "more": {"b": b}, "labels": y},
}


def rows(split: str, form: str) -> Dataset:
    return Rows(FORMS[form], split)


class Two(nn.Module):
    """The network of all forms; the ways in which it is called differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, CLASSES)
        self.scale = nn.Parameter(torch.ones(CLASSES))
        self.register_buffer("offset", torch.zeros(1))

    def of(self, a, b):
        return self.last(self.first(torch.cat([a, b], -1)).tanh() + self.offset)


class TwoArguments(Two):
    def forward(self, a, b):
        return self.of(a, b)


class OneList(Two):
    def forward(self, x):
        return self.of(x[0], x[1])


class OneMapping(Two):
    def forward(self, batch):
        return self.of(batch["a"], batch["b"])


class NestedMapping(Two):
    def forward(self, a, more):
        return self.of(a, more["b"])


class Anything(Two):
    def forward(self, **inputs):
        return UserDict(logits=self.of(inputs["a"], inputs["b"]), rest=None)


MODELS = {kind.__name__: kind for kind in (TwoArguments, OneList, OneMapping, NestedMapping, Anything)}


def model(kind: str = "TwoArguments") -> nn.Module:
    network = MODELS[kind]().eval()
    network.scale.requires_grad_(False)
    return network


# ------------------------------------------------------------------ Hugging Face

WORDS, LENGTH = 12, 5


def bert() -> nn.Module:
    """A classifier of Hugging Face's, as it comes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=8, num_labels=CLASSES, **shape)
    return BertForSequenceClassification(config).eval()


class Sentences(Dataset):
    """Padded sentences, as a tokenizer gives them."""

    def __init__(self, split: str, key: str = "labels", kind: type = dict) -> None:
        generator = torch.Generator().manual_seed(len(split))
        self.ids = torch.randint(2, WORDS, (N, LENGTH), generator=generator)
        self.lengths = torch.randint(2, LENGTH + 1, (N,), generator=generator)
        self.y = torch.randint(CLASSES, (N,), generator=generator)
        self.key, self.kind = key, kind

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int):
        mask = (torch.arange(LENGTH) < self.lengths[index]).long()
        return self.kind({"input_ids": self.ids[index] * mask, "attention_mask": mask, self.key: self.y[index]})


def sentences(split: str, key: str = "labels") -> Dataset:
    return Sentences(split, key)


def to_encoding(items):
    """A function for `--collate` that returns what a tokenizer's `pad` does."""
    from torch.utils.data import default_collate
    from transformers import BatchEncoding

    return BatchEncoding(default_collate(items))


def plain(split: str) -> TensorDataset:
    a, _, y = numbers(split)
    return TensorDataset(a, y)


# ------------------------------------------------------------------ strings


class Reader(nn.Module):
    """A network whose inputs are strings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(2, CLASSES)

    def forward(self, texts):
        return self.last(torch.tensor([[float(len(text)), float(text.count("e"))] for text in texts]))


def reader() -> nn.Module:
    return Reader().eval()


def texts(split: str) -> list:
    return [
        (word, i % CLASSES)
        for i, word in enumerate(
            ["these", "are", "not", "the", "words", "that", "anyone", "has", "been", "waiting", "for"]
        )
    ]
