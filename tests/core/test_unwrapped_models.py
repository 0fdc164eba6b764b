"""Models of Hugging Face's packages in a notebook, as they are: called with the keys of a batch, answering with a `ModelOutput`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from laplace import KronLaplace, Laplace, marglik_training
from laplace.data import unread
from laplace.data.calling import adapted
from laplace.utils import LastLayerSubnetMask

TIME, CLASSES = 6, 3


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=CLASSES, **sizes)).eval()


def sentences(key="labels", n=12):
    make = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, TIME + 1, (n,), generator=make)
    return [
        {
            "input_ids": torch.randint(20, (TIME,), generator=make),
            "attention_mask": (torch.arange(TIME) < lengths[i]).long(),
            key: torch.tensor(i % CLASSES),
        }
        for i in range(n)
    ]


class Wrapped(nn.Module):
    """The wrapper that laplace-torch asks for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, data):
        return self.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits


@pytest.mark.parametrize("key", ["labels", "target"])
@pytest.mark.parametrize(("subset", "structure"), [("all", "kron"), ("all", "diag"), ("last_layer", "full")])
def test_a_model_as_it_is_has_the_posterior_of_a_wrapped_one(subset, structure, key):
    loader = DataLoader(sentences(key), batch_size=4)
    batch = next(iter(loader))
    found = []
    for model in (bert(), Wrapped(bert())):
        la = Laplace(model, "classification", subset, structure, dict_key_y=key)
        la.fit(loader)
        la.optimize_prior_precision(method="marglik", n_steps=5)
        inputs = {name: value for name, value in batch.items() if name != key}
        found.append(
            (la.log_marginal_likelihood(), la(batch), la(inputs), la.sample(2, torch.Generator().manual_seed(0)))
        )
    for ours, wrapped in zip(*found, strict=True):
        torch.testing.assert_close(ours, wrapped, rtol=1e-4, atol=1e-5)


def test_the_model_of_the_user_stays_as_it_was_and_shares_its_weights():
    model = bert()
    la = KronLaplace(model, "classification")
    la.fit(DataLoader(sentences(), batch_size=4))
    assert (
        not model._forward_hooks
        and type(model(torch.zeros(1, 2, dtype=torch.long))).__name__ == "SequenceClassifierOutput"
    )
    assert la.model.classifier.weight is model.classifier.weight
    other = copy.deepcopy(la)
    batch = next(iter(DataLoader(sentences(), batch_size=4)))
    assert torch.equal(other(batch), la(batch))
    saved = la.state_dict()
    again = KronLaplace(bert(), "classification")
    again.load_state_dict(saved)
    torch.testing.assert_close(again(batch), la(batch))


def test_adapters_alone():
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    loader = DataLoader(sentences(), batch_size=4)
    la = Laplace(model.eval(), "classification", "all", "kron")
    la.fit(loader)
    names = [block.parameter for block in la.backend.spec.blocks]
    assert all("lora" in name or "classifier" in name for name in names) and any("lora" in name for name in names)
    assert la(next(iter(loader))).shape == (4, CLASSES)


def test_adapters_on_a_model_that_takes_the_mapping_itself():
    """Peft's own ``forward`` takes whatever there is, and hands it on."""
    model = get_peft_model(Wrapped(bert()), LoraConfig(r=2, target_modules=["query", "value"])).eval()
    loader = DataLoader(sentences(), batch_size=4)
    batch = next(iter(loader))
    la = Laplace(model, "classification", "all", "diag")
    la.fit(loader)
    assert la.n_data == 12 and la(batch).shape == (4, CLASSES) and la.model is model
    assert torch.equal(adapted(model)(batch), model(batch))


def test_a_language_model_takes_its_indices_alone():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    words = torch.randint(11, (6, 5))
    la = Laplace(model, "classification", "all", "diag")
    la.fit(DataLoader(list(zip(words[:, :-1], words[:, 1:], strict=True)), batch_size=3))
    torch.testing.assert_close(la(words[:2, :-1]).sum(-1), torch.ones(2, 4))


def test_training_on_the_evidence_and_masks_take_them_too():
    loader = DataLoader(sentences(), batch_size=4)
    model = bert()
    la, returned, margliks, _ = marglik_training(model, loader, hessian_structure="diag", n_epochs=2, n_hypersteps=1)
    assert returned is model and len(margliks) == 2 and la.model.classifier.weight is model.classifier.weight
    assert LastLayerSubnetMask(bert()).select(loader).numel() == CLASSES * 9


class PassesOn(BertForSequenceClassification):
    """A model that names its words alone, and hands on the rest."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids, **kwargs)


def renamed(batch, **names):
    return {names.get(key, key): value for key, value in batch.items()}


@pytest.mark.parametrize("key", ["attention_maks", "idx"])
@pytest.mark.parametrize("kind", [BertForSequenceClassification, PassesOn])
def test_a_key_that_the_model_swallows_is_refused_in_fits_and_predictions(kind, key):
    batch = next(iter(DataLoader(sentences(), batch_size=4)))
    la = Laplace(kind(bert().config).eval(), "classification", "last_layer", "diag")
    with pytest.raises(ValueError, match=f"takes '{key}' of the batch as further keywords"):
        la.fit([renamed(batch, attention_mask=key)])
    la.fit([batch])
    with pytest.raises(ValueError, match=f"takes '{key}' .* does nothing with them. Leave them out"):
        la({**batch, key: batch["attention_mask"]})


def test_keys_that_are_handed_on_or_change_nothing_by_chance_are_none_of_these():
    """A mask without padding changes nothing, but is read; words of examples are no tensors."""
    batch = next(iter(DataLoader(sentences(), batch_size=4)))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    la = Laplace(PassesOn(bert().config).eval(), "classification", "last_layer", "diag")
    la.fit([{**batch, "text": ["a", "b", "c", "d"]}])
    assert la.n_data == 4


def test_what_is_not_seen_to_be_read_but_changes_the_answer_is_taken(monkeypatch):
    """As in compiled code."""
    monkeypatch.setattr(unread._Reads, "__torch_function__", lambda self, f, types, a=(), k=None: f(*a, **(k or {})))
    la = Laplace(PassesOn(bert().config).eval(), "classification", "last_layer", "diag")
    la.fit(DataLoader(sentences(), batch_size=4))
    assert la.n_data == 12
