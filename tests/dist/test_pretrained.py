"""Models of `save_pretrained` as jobs, and weights in shards: the same numbers, and errors that name what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path

import dist_cases
import fsspec
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import laplace_dist
from laplace import Laplace
from laplace.data.calling import adapted
from laplace.likelihoods import WeightedCategorical
from laplace_dist.errors import SettingsError
from laplace_dist.report.loading import loading_lines
from laplace_dist.run.weights import load_model, weights_digest

WORDS = 12
IGNORED = WeightedCategorical(ignore_index=-100)


def ignoring():
    return IGNORED


class Texts(Dataset):
    """Padded token sequences: with one label each, or with the next word of every position, padding left out."""

    def __init__(self, split, words):
        generator = torch.Generator().manual_seed({"train": 0, "val": 1}.get(split, 2))
        ids = torch.randint(2, WORDS, (10, 6), generator=generator)
        mask = (torch.arange(6) < torch.randint(3, 7, (10, 1), generator=generator)).long()
        self.ids, self.mask = ids * mask, mask
        self.labels = torch.randint(3, (10,), generator=generator)
        if words:
            self.labels = torch.where(mask.roll(-1, 1) * mask == 1, ids.roll(-1, 1), -100)
            self.labels[:, -1] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


def texts(split, words=False):
    return Texts(split, words)


def bert(labels=3):
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6,
            max_position_embeddings=8, num_labels=labels,
        )
    )  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models: whole, in shards, of another task, in half precision."""
    root = tmp_path_factory.mktemp("saved")
    bert().save_pretrained(root / "bert")
    bert().save_pretrained(root / "sharded", max_shard_size="1KB")
    gpt2().save_pretrained(root / "gpt2")
    gpt2().half().save_pretrained(root / "half")
    BertModel(bert().config).save_pretrained(root / "body")
    return root


def config(checkpoint, folder, task="sequence-classification", **changes):
    return dist_cases.config(
        checkpoint, model=f"hf:{folder}", task=task, **{"data": "test_pretrained:texts", **changes}
    )


@pytest.mark.parametrize("name", ["bert", "sharded"])
def test_a_saved_classifier_is_fitted_as_in_one_process(folders, tmp_path, name):
    dist_cases.run_inline(config(tmp_path, folders / name))
    ours = laplace_dist.load_posterior(str(tmp_path), bert().eval())
    model = adapted(bert().eval())
    alone = Laplace(model, "classification", "all", "kron")
    alone.fit(DataLoader(texts("train"), batch_size=4))
    for factor, value in alone.sums.to_tensors().items():
        assert torch.allclose(ours.sums.to_tensors()[factor], value, rtol=1e-5, atol=1e-8), factor


def test_a_saved_language_model_is_fitted_with_the_next_words_as_labels(folders, tmp_path):
    chosen = config(
        tmp_path, folders / "gpt2", "causal-lm", data_args={"words": True}, likelihood="test_pretrained:ignoring",
        hessian_structure="diag", estimator="ggn",
    )  # fmt: skip
    dist_cases.run_inline(chosen)
    ours = laplace_dist.load_posterior(str(tmp_path), gpt2().eval())
    assert ours.model.transformer.wte.weight is ours.model.lm_head.weight, "tied, and stored once"
    alone = Laplace(adapted(gpt2().eval()), IGNORED, "all", "diag")
    alone.fit(DataLoader(texts("train", True), batch_size=4))
    assert torch.allclose(ours.H, alone.H, rtol=1e-4, atol=1e-8)
    assert ours.n_data == 10


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_a_classifier_of_another_problem_is_no_softmax(tmp_path, problem):
    model = bert()
    model.config.problem_type = problem
    model.save_pretrained(tmp_path / "saved")
    chosen = config(tmp_path / "run", tmp_path / "saved")
    if problem == "single_label_classification":
        assert load_model(chosen) is not None
        return
    with pytest.raises(SettingsError, match=f"--likelihood: got 'classification'.*problem_type='{problem}'; give"):
        load_model(chosen)
    assert load_model(chosen.model_copy(update={"likelihood": "my_module:f"})) is not None


def unshifted(split):
    """Labels as Hugging Face's collators make them: the words themselves, padding left out."""
    made = Texts(split, True)
    made.labels = torch.where(made.mask == 1, made.ids, -100)
    return made


def test_words_as_their_own_labels_are_refused_before_anything_starts(folders, tmp_path):
    chosen = config(
        tmp_path, folders / "gpt2", "causal-lm", data="test_pretrained:unshifted", likelihood="test_pretrained:ignoring"
    )
    with pytest.raises(
        SettingsError, match=r"--data: The labels are the input words.*labels\[:, :-1\] = input_ids\[:, 1:\]"
    ):
        dist_cases.run_inline(chosen)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_widened_exactly(folders, tmp_path):
    model = load_model(config(tmp_path, folders / "half", "causal-lm"))
    wanted = gpt2().half().state_dict()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, wanted[name].float()) for name, value in model.state_dict().items())


def test_the_digest_is_over_all_shards_and_not_of_how_they_are_cut(folders, tmp_path):
    digests = {name: weights_digest(load_model(config(tmp_path, folders / name))) for name in ("bert", "sharded")}
    assert digests["bert"] == digests["sharded"] == weights_digest(bert())
    changed = tmp_path / "changed"
    shutil.copytree(folders / "sharded", changed)
    last = sorted(changed.glob("*.safetensors"))[-1]
    state = {name: value + 1 for name, value in safetensors.torch.load_file(last).items()}
    safetensors.torch.save_file(state, last, metadata={"format": "pt"})
    assert weights_digest(load_model(config(tmp_path, changed))) != digests["bert"]


def test_model_args_are_fields_of_the_configuration(folders, tmp_path):
    chosen = config(tmp_path, folders / "bert", model_args={"hidden_act": "relu"})
    assert load_model(chosen).config.hidden_act == "relu"
    with pytest.raises(SettingsError, match="--model-args: hiden_act is no field"):
        load_model(config(tmp_path, folders / "bert", model_args={"hiden_act": "relu"}))


def test_a_relative_folder_is_the_drivers(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    with dist_cases.inline_job(config(tmp_path / "run", "bert")) as job:
        assert job.config.model == f"hf:{folders / 'bert'}"


def test_the_lines_that_load_the_posterior_do(folders, tmp_path):
    chosen = config(tmp_path / "run", folders / "bert", hessian_structure="diag")
    dist_cases.run_inline(chosen)
    names: dict = {}
    exec(loading_lines(chosen, str(tmp_path / "run")), names)
    assert names["la"].n_data == 10


# ------------------------------------------------------------------ what is refused


def copied(folders, tmp_path, name="sharded"):
    return Path(shutil.copytree(folders / name, tmp_path / "copy"))


def harmed(folders, tmp_path, case):
    """Return a folder with this harm."""
    if case in ("body", "gpt2"):
        return folders / case
    folder = copied(
        folders, tmp_path, "bert" if case in ("pickle", "adapter", "no config", "odd config") else "sharded"
    )
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if case == "shard":
        shards[1].unlink()
    elif case == "cut":
        shards[1].write_bytes(shards[1].read_bytes()[:-5])
    elif case == "pickle":
        torch.save(bert().state_dict(), folder / "pytorch_model.bin")
        shards[0].unlink()
    elif case == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case == "odd config":
        (folder / "config.json").write_text("[1]")
    elif case in ("outside", "index"):
        values = json.loads(index.read_text())
        values["weight_map"]["classifier.bias"] = "../secret.safetensors"
        index.write_text(json.dumps(values) if case == "outside" else "{}")
    return folder


@pytest.mark.parametrize(
    ("case", "task", "says"),
    [
        ("gone", "sequence-classification", "there is no folder .*/gone'; expected hf: and the path.*hf download"),
        ("bert", "causal-lm", "--task: got 'causal-lm', which needs a BertLMHeadModel, but .* holds BertForSequenceClassification"),
        ("body", "sequence-classification", "needs a BertForSequenceClassification, but .* holds BertModel"),
        ("shard", "sequence-classification", "names model-00002-of-.*, which is missing"),
        ("cut", "sequence-classification", "cannot be loaded|no whole file"),
        ("pickle", "sequence-classification", r"holds its weights as pickles \(pytorch_model.bin\).*safe_serialization=True"),
        ("adapter", "sequence-classification", "holds an adapter of PEFT's alone"),
        ("no config", "sequence-classification", "holds no config.json"),
        ("odd config", "sequence-classification", "names no model_type"),
        ("outside", "sequence-classification", "names ../secret.safetensors; expected .safetensors files beside it"),
        ("index", "sequence-classification", "is no index of safetensors"),
    ],
)  # fmt: skip
def test_a_folder_that_is_none_is_refused_by_name(folders, tmp_path, case, task, says):
    folder = (
        tmp_path / "gone" if case == "gone" else folders / "bert" if case == "bert" else harmed(folders, tmp_path, case)
    )
    with pytest.raises(SettingsError, match=says) as caught:
        dist_cases.run_inline(config(tmp_path / "run", folder, task))
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_the_models_are_listed(folders, tmp_path):
    folder = copied(folders, tmp_path, "bert")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["head.weight"] = state.pop("classifier.weight")
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match="missing: classifier.weight; unexpected: head.weight"):
        load_model(config(tmp_path, folder))


def test_a_task_belongs_to_a_folder(folders, tmp_path):
    for changes in ({"task": None}, {"model": "dist_cases:convnet"}):
        with pytest.raises(SettingsError, match="--task: got"):
            dist_cases.run_inline(config(tmp_path / "run", folders / "bert").model_copy(update=changes))


def test_the_missing_package_is_named_with_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingsError, match=r"needs Hugging Face's transformers.*laplace-dist\[hf\]"):
        load_model(config(tmp_path, folders / "bert"))


# ------------------------------------------------------------------ --weights in shards


def head(width=4):
    """A network of one's own, with a tied weight."""
    torch.manual_seed(3)
    model = nn.ModuleDict(
        {"one": nn.Linear(width, width), "two": nn.Linear(width, width), "norm": nn.BatchNorm1d(width)}
    )
    model["two"].weight = model["one"].weight
    return model.eval()


def write_shards(folder, state, cuts=3):
    """Write tensors as so many shards with an index, as `save_pretrained` does."""
    folder.mkdir(parents=True)
    names, where = sorted(state), {}
    for number in range(cuts):
        file = f"part-{number}.safetensors"
        some = {name: state[name] for name in names[number::cuts]}
        safetensors.torch.save_file(some, folder / file)
        where.update(dict.fromkeys(some, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def own(weights, width=4, **changes):
    values = {"model": "test_pretrained:head", "model_args": {"width": width}, "weights": str(weights), **changes}
    return dist_cases.config("unused", **values)


@pytest.fixture
def shards(tmp_path):
    """The shards of `head` with other values; the tied weight is stored once."""
    state = {name: value + 1 for name, value in head().state_dict().items() if name != "two.weight"}
    return write_shards(tmp_path / "shards", state), state


def test_shards_are_loaded_from_the_folder_its_index_and_a_url(shards):
    folder, state = shards
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/shards", recursive=True)
    places = [folder, folder / "model.safetensors.index.json", f"file://{folder}", "memory://shards"]
    for place in [*places, "memory://shards/model.safetensors.index.json"]:
        model = load_model(own(place))
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
        assert model["two"].weight is model["one"].weight
    memory.rm("/shards", recursive=True)


def test_a_folder_with_one_file_needs_no_index(tmp_path):
    safetensors.torch.save_file(dict(dist_cases.convnet().state_dict()), tmp_path / "weights.safetensors")
    chosen = dist_cases.config("unused", weights=str(tmp_path))
    assert weights_digest(load_model(chosen)) == weights_digest(dist_cases.convnet())


def test_one_shard_at_a_time_is_in_memory(shards, monkeypatch):
    alive, most, load = [], [], safetensors.torch.load_file

    def watched(path):
        most.append(sum(reference() is not None for reference in alive))
        found = load(path)
        alive.extend(weakref.ref(value) for value in found.values())
        return found

    monkeypatch.setattr(safetensors.torch, "load_file", watched)
    load_model(own(shards[0]))
    assert most == [0, 0, 0], "tensors of earlier shards that were still there"


def test_names_are_compared_before_a_shard_is_read(shards, monkeypatch):
    folder, state = shards
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: pytest.fail("it was read"))
    smaller = write_shards(folder.parent / "less", {n: v for n, v in state.items() if n != "one.bias"})
    with pytest.raises(SettingsError, match="--weights .*missing: one.bias"):
        load_model(own(smaller))


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("shard", "index.json' names part-1.safetensors, which is missing"),
        ("cut", "part-1.safetensors' is no whole file of safetensors"),
        ("swapped", "part-1.safetensors' does not hold the tensors that its index says"),
        (
            "shape",
            r"these weights do not fit the model. of another shape: norm.bias \[4\] in the file, \[5\] in the model",
        ),
        ("index", "holds part-0.safetensors, part-1.safetensors, part-2.safetensors and no .*index.json"),
        ("other index", "there is no .*other.safetensors.index.json"),
        ("pickle", "as pickles .pytorch_model.bin., which can run code"),
        ("empty", "holds no .safetensors; it holds nothing"),
    ],
)
def test_bad_shards_are_refused_by_name(shards, case, says):
    folder, _ = shards
    place, width = folder, 4
    if case == "shard":
        (folder / "part-1.safetensors").unlink()
    elif case == "cut":
        (folder / "part-1.safetensors").write_bytes((folder / "part-1.safetensors").read_bytes()[:-3])
    elif case == "swapped":
        shutil.copy(folder / "part-0.safetensors", folder / "part-1.safetensors")
    elif case == "shape":
        width = 5
    elif case == "index":
        (folder / "model.safetensors.index.json").unlink()
    elif case == "other index":
        place = folder / "other.safetensors.index.json"
    else:
        place = folder.parent / "else"
        place.mkdir()
        if case == "pickle":
            torch.save(head().state_dict(), place / "pytorch_model.bin")
    with pytest.raises(SettingsError, match=says):
        load_model(own(place, width))
